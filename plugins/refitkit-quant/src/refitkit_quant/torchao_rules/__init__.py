"""Rules for weights that torchao quantizes: from a float weight to torchao's own parts.

Only quantizing a weight and reading a scheme import torchao.
"""

from refitkit_quant.torchao_rules.groups import weight_groups

__all__ = ["weight_groups"]
