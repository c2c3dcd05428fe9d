"""Weights that torchao quantizes: float in, its own parts out.

torchao is imported when a weight is quantized or a scheme is read, not before.
"""

from refitkit_quant.torchao_rules.groups import offered

__all__ = ["offered"]
