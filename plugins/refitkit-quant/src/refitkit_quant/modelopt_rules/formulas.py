"""The formulas of NVIDIA ModelOpt 0.47, each with its source."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

Format: TypeAlias = Literal["fp8", "int8"]

BOUND: dict[Format, float] = {"fp8": 448.0, "int8": 127.0}
"""What the largest absolute value becomes: ``TensorQuantizer.maxbound``."""

STORED: dict[str, Format] = {"float8_e4m3fn": "fp8", "int8": "int8"}
"""What a checkpoint of quantized weights holds, by its dtype."""

_EPSILON = 1.0 / (1 << 24)


def largest(weight: torch.Tensor, axis: int | None) -> torch.Tensor:
    """``_amax`` of a weight that was calibrated with ``max``.

    ``reduce_amax`` in ``modelopt/torch/quantization/utils/core_utils.py``: the larger one of the
    absolute values of minimum and maximum, over all dimensions but ``axis``.

    Returns:
        One element where ``axis`` is None, else one for each of its indices, in their dimension.
    """
    if axis is None:
        low, high = torch.aminmax(weight)
    else:
        others = [dim for dim in range(weight.dim()) if dim != axis % weight.dim()]
        low, high = (
            torch.amin(weight, others, keepdim=True),
            torch.amax(weight, others, keepdim=True),
        )
    return torch.maximum(low.abs(), high.abs())


def scale_of(amax: torch.Tensor, kind: Format) -> torch.Tensor:
    """The exported scale, in float32.

    ``get_scaling_factor`` in ``modelopt/torch/export/quant_utils.py``: amax.float() / maxbound.
    """
    return amax.float() / BOUND[kind]


def represented(weight: torch.Tensor, amax: torch.Tensor, kind: Format) -> torch.Tensor:
    """A weight after quantization and back, in float32.

    ``_fp8_eager`` and ``_tensor_quant`` in ``modelopt/torch/quantization/tensor_quant.py``, there
    with amax of no more than 2**-24 as zero.
    """
    bound, wide = BOUND[kind], amax.float()
    safe = torch.where(wide <= _EPSILON, 1.0 if kind == "fp8" else bound, wide)
    if kind == "fp8":
        scale = bound / safe  # a number by a tensor: torch multiplies by the reciprocal
        scaled = (weight.float() * scale).clamp(-bound, bound)
        return scaled.to(torch.float8_e4m3fn).float() * (1 / scale)
    scale = torch.full_like(safe, bound) / safe
    return (weight.float() * scale).round().clamp(-bound - 1, bound) / scale


def restored(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight that a checkpoint's quantized one stands for, in float32.

    ``dequantize`` in ``modelopt/torch/quantization/qtensor``, ``fp8_tensor.py`` and
    ``int8_tensor.py``.
    """
    return values.float() * scale.float()


def amax_for(scale: torch.Tensor, kind: Format, dtype: torch.dtype) -> torch.Tensor | None:
    """The amax from which a scale was computed; None where there is none in this dtype.

    Dividing it by ``maxbound`` gives the scale again, bit for bit. If any amax does, the one
    nearest to the exact product does: either its neighbours are further apart than what rounds to
    one scale, or it is within half a step of the scale itself.
    """
    wanted = scale.float()
    found = (wanted.double() * BOUND[kind]).to(dtype)  # exact in float64, then rounded once
    return found if torch.equal(scale_of(found, kind), wanted) else None
