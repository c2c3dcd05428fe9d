"""Formulas of NVIDIA ModelOpt 0.47, each with its source file."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

Format: TypeAlias = Literal["fp8", "int8"]

BOUND: dict[Format, float] = {"fp8": 448.0, "int8": 127.0}
"""Quantized value of the largest absolute value: ``TensorQuantizer.maxbound``."""

STORED: dict[str, Format] = {"float8_e4m3fn": "fp8", "int8": "int8"}
"""Format of quantized weights in a checkpoint, by their dtype."""

_EPSILON = 1.0 / (1 << 24)


def largest(weight: torch.Tensor, axis: int | None) -> torch.Tensor:
    """``_amax`` of a weight that was calibrated with ``max``.

    Formula of ``reduce_amax`` in ``modelopt/torch/quantization/utils/core_utils.py``: the larger
    absolute value of minimum and maximum, over all dimensions except ``axis``.

    Returns:
        A scalar if ``axis`` is None. Otherwise one element for each index of ``axis``; the other
        dimensions have size 1.
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
    """The exported scale, in float32: ``amax.float() / maxbound``.

    Formula of ``get_scaling_factor`` in ``modelopt/torch/export/quant_utils.py``.
    """
    return amax.float() / BOUND[kind]


def represented(weight: torch.Tensor, amax: torch.Tensor, kind: Format) -> torch.Tensor:
    """A weight after quantization and dequantization, in float32.

    Formulas of ``_fp8_eager`` and ``_tensor_quant`` in
    ``modelopt/torch/quantization/tensor_quant.py``, which treat an amax of at most 2**-24 as zero.
    """
    bound, wide = BOUND[kind], amax.float()
    safe = torch.where(wide <= _EPSILON, 1.0 if kind == "fp8" else bound, wide)
    if kind == "fp8":
        # torch divides a number by a tensor as a product with the reciprocal. This is the same
        # operation as ModelOpt's, so the bits are equal.
        scale = bound / safe
        scaled = (weight.float() * scale).clamp(-bound, bound)
        return scaled.to(torch.float8_e4m3fn).float() * (1 / scale)
    scale = torch.full_like(safe, bound) / safe
    return (weight.float() * scale).round().clamp(-bound - 1, bound) / scale


def restored(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight that quantized values of a checkpoint represent, in float32.

    Formula of ``dequantize`` in ``fp8_tensor.py`` and ``int8_tensor.py`` in
    ``modelopt/torch/quantization/qtensor``.
    """
    return values.float() * scale.float()


def amax_for(scale: torch.Tensor, kind: Format, dtype: torch.dtype) -> torch.Tensor | None:
    """The amax from which a scale was computed; None if no amax of this dtype gives the scale.

    The returned amax divided by ``maxbound`` is the scale, bit for bit. It is enough to try the
    amax nearest to the exact product. Either its neighbours are further apart than the range that
    rounds to one scale, or it is within half a step of the scale.
    """
    wanted = scale.float()
    # The product of a float32 and a bound of at most 9 bits is exact in float64; round it once.
    found = (wanted.double() * BOUND[kind]).to(dtype)
    return found if torch.equal(scale_of(found, kind), wanted) else None
