"""Weights that NVIDIA ModelOpt quantizes in the graph: float weight and ``_amax`` move together.

What is computed at a refit needs no modelopt: the few formulas are written out, with their sources.
"""

from refitkit_quant.modelopt_rules.groups import offered

__all__ = ["offered"]
