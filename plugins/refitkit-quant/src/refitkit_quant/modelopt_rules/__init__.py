"""Rules for weights that NVIDIA ModelOpt quantizes in the graph: float weight and ``_amax``.

A refit needs no modelopt: :mod:`~refitkit_quant.modelopt_rules.formulas` has the formulas.
"""

from refitkit_quant.modelopt_rules.groups import weight_groups

__all__ = ["weight_groups"]
