"""torchao's own quantization, by rule. Nothing of its rounding is written again here."""

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
    """A weight as torchao quantizes it: a tensor of one of its own classes.

    Args:
        rule: How.
        weight: In float, of any device. It is not changed.
    """
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
    with torch.no_grad():
        quantize_(holder, config_of(rule), filter_fn=lambda module, _: module is holder)
    return holder.weight.detach()


def parts_of(tensor: Any) -> list[torch.Tensor]:
    """The plain tensors that a quantized one is made of, in the order in which it is unwrapped.

    As ``torchao.utils.UnwrapTensorSubclass.right_inverse`` (0.18) takes it apart.
    """
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def config_of(rule: Rule) -> Any:
    """The config of a rule, as torchao has it. It leaves inductor's settings alone."""
    if isinstance(rule, Int8WeightOnly):
        whole = {"row": PerRow(), "tensor": PerTensor()}
        granularity = PerGroup(rule.group_size) if rule.group_size else whole[rule.granularity]
        return Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{rule.bits}"),
        granularity=PerGroup(rule.group_size) if rule.group_size else PerAxis(0),
        mapping_type=MappingType[rule.mapping.upper()],
        scale_dtype=dtype_of(rule.scale_dtype) if rule.scale_dtype else None,
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm(rule.algorithm),
    )
