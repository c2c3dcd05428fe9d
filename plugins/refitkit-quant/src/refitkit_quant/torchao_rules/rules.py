"""Which rules may have made a quantized tensor, as far as it tells itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from refitkit.program.dtypes import dtype_name
from torchao.quantization import (
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    PerGroup,
    PerRow,
    PerTensor,
)

from refitkit_quant.scheme import Int8WeightOnly, IntxWeightOnly

if TYPE_CHECKING:
    from refitkit_quant.scheme import Rule

Mapping: TypeAlias = Literal["symmetric", "asymmetric", "symmetric_no_clipping_err"]
Algorithm: TypeAlias = Literal["affine", "hqq_scale_only"]

_MAPPINGS: tuple[Mapping, ...] = ("symmetric", "symmetric_no_clipping_err", "asymmetric")
_RULED = "Int8Tensor of weight-only quantization and IntxUnpackedToInt8Tensor have one"


def refusal(tensor: Any) -> str:
    """Why there is no rule for a quantized tensor; empty if there is."""
    if type(tensor) is Int8Tensor:
        static = (tensor.act_quant_scale, tensor.act_quant_zero_point, tensor.act_pre_scale)
        if tensor.act_quant_kwargs is not None or any(part is not None for part in static):
            return "its activations are quantized or scaled, too"
        if tensor.reduce_range or _has_zero_points(tensor):
            return "an Int8Tensor that Int8WeightOnlyConfig does not make"
        return "" if _granularity(tensor) else f"blocks of {tuple(tensor.block_size)}"
    if type(tensor) is IntxUnpackedToInt8Tensor:
        if tensor.activation_quantization is not None:
            return "its activations are quantized, too"
        return "" if _is_by_rows(tensor) else f"blocks of {tuple(tensor.block_size)}"
    return f"a {type(tensor).__name__}; {_RULED}"


def candidates(tensor: Any) -> list[Rule]:
    """Every rule that may have made a tensor, of those that its fields and zero points admit."""
    if type(tensor) is Int8Tensor:
        return [_int8(tensor)]
    moved = _has_zero_points(tensor)
    rules: list[Rule] = [
        _intx(tensor, mapping, "affine")
        for mapping in _MAPPINGS
        if mapping == "asymmetric" or not moved
    ]
    if not moved and tensor.dim() == 2:  # noqa: PLR2004 - it is for matrices alone
        rules.append(_intx(tensor, "symmetric", "hqq_scale_only"))
    return rules


def rule_of(config: Any, tensor: Any) -> Rule | None:
    """The rule of a config of torchao's; None where the tensor shows another one."""
    rule: Rule
    if isinstance(config, Int8WeightOnlyConfig) and type(tensor) is Int8Tensor:
        rule = _int8(tensor)
        given = config.granularity
        alike = {PerRow: "row", PerTensor: "tensor", PerGroup: "group"}.get(type(given))
        size = getattr(given, "group_size", None)
        same = alike == rule.granularity and size == rule.group_size
        whole_row = isinstance(given, PerGroup) and size == tensor.shape[-1]
        return rule if same or (whole_row and rule.granularity == "row") else None
    if isinstance(config, IntxWeightOnlyConfig) and type(tensor) is IntxUnpackedToInt8Tensor:
        mapping = cast("Mapping", config.mapping_type.name.lower())
        algorithm = cast("Algorithm", config.intx_choose_qparams_algorithm.value)
        rule = _intx(tensor, mapping, algorithm)
        size = getattr(config.granularity, "group_size", _row(tensor))
        bits = int(dtype_name(config.weight_dtype).removeprefix("int"))
        found = (rule.bits, rule.group_size or _row(tensor))
        return rule if found == (bits, size) else None
    return None


def _int8(tensor: Any) -> Int8WeightOnly:
    granularity = cast("Literal['row', 'group', 'tensor']", _granularity(tensor))
    size = tensor.block_size[-1] if granularity == "group" else None
    return Int8WeightOnly(granularity=granularity, group_size=size)


def _granularity(tensor: Any) -> str:
    """What has a scale of its own; empty where it is nothing that there is a rule for."""
    blocks, shape = tuple(tensor.block_size), tuple(tensor.shape)
    if blocks == (*(1,) * (len(shape) - 1), shape[-1]):
        return "row"
    if blocks == shape:
        return "tensor"
    return "group" if set(blocks[:-1]) <= {1} else ""


def _intx(tensor: Any, mapping: Mapping, algorithm: Algorithm) -> IntxWeightOnly:
    size, own = tensor.block_size[1], tensor.scale.dtype != tensor.dtype
    return IntxWeightOnly(
        bits=int(dtype_name(tensor.target_dtype).removeprefix("int")),
        group_size=None if size == _row(tensor) else size,
        mapping=mapping,
        algorithm=algorithm,
        scale_dtype=dtype_name(tensor.scale.dtype) if own else None,
    )


def _is_by_rows(tensor: Any) -> bool:
    """Whether blocks lie in rows: of a matrix, or, of a convolution, along its input channels."""
    blocks = tuple(tensor.block_size)
    return len(blocks) in {2, 4} and blocks[0] == 1 and set(blocks[2:]) <= {1}


def _row(tensor: Any) -> int:
    return int(tensor.shape[1])


def _has_zero_points(tensor: Any) -> bool:
    points = tensor.zero_point
    return points is not None and bool((points != 0).any())
