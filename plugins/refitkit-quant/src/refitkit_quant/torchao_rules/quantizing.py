"""Quantize a weight by a rule with torchao itself, so that roundings are torchao's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from refitkit.program.dtypes import dtype_of
from torchao.quantization import (
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import (
    IntxChooseQParamsAlgorithm,
)

from refitkit_quant.scheme import Int8WeightOnly

if TYPE_CHECKING:
    from refitkit_quant.scheme import Rule


def quantized(rule: Rule, weight: torch.Tensor) -> Any:
    """A weight that torchao quantized: a tensor of one of torchao's classes.

    Args:
        rule: Rule of the scheme.
        weight: Float weight on any device; it is not changed.
    """
    # quantize_ takes modules only, so put the weight into one.
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
    # The filter selects the holder itself: by default quantize_ takes only Linear layers.
    with torch.no_grad():
        quantize_(holder, config_of(rule), filter_fn=lambda module, _: module is holder)
    return holder.weight.detach()


def parts_of(tensor: Any) -> list[torch.Tensor]:
    """The plain tensors of a quantized tensor, in the order of ``unwrap_tensor_subclass``.

    As in ``torchao.utils.UnwrapTensorSubclass.right_inverse`` (0.18).
    """
    # The names of torchao's own fields, without parts that are None.
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def config_of(rule: Rule) -> Any:
    """Torchao's config for a rule, which does not change the settings of inductor."""
    if isinstance(rule, Int8WeightOnly):
        whole = {"row": PerRow(), "tensor": PerTensor()}
        # PerGroup is the only granularity with a size.
        granularity = PerGroup(rule.group_size) if rule.group_size else whole[rule.granularity]
        return Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{rule.bits}"),
        granularity=PerGroup(rule.group_size) if rule.group_size else PerAxis(0),
        mapping_type=MappingType[rule.mapping.upper()],
        scale_dtype=dtype_of(rule.scale_dtype) if rule.scale_dtype else None,
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm(rule.algorithm),
    )
