"""Converters that read weights where no recording sees it, with and without a declaration."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numpy as np
import torch

import refitkit

_address_of = torch.Tensor.data_ptr


def _halves(weight: torch.Tensor) -> np.ndarray:
    """Half of each element, read and computed in C."""
    raw = ctypes.string_at(_address_of(weight), weight.nbytes)
    numbers = struct.unpack(f"{weight.numel()}f", raw)
    packed = struct.pack(f"{weight.numel()}f", *[number / 2 for number in numbers])
    return np.frombuffer(bytearray(packed), "f")


def _times(ctx: Any, x: Any, values: np.ndarray) -> Any:
    import tensorrt as trt

    ctx.cpu_weights_reference_holder.append(values)
    constant = ctx.net.add_constant([1] * (len(x.shape) - 1) + [values.size], values)
    constant.name = "made"
    factor = constant.get_output(0)
    return ctx.net.add_elementwise(x, factor, trt.ElementWiseOperation.PROD).get_output(0)


@refitkit.tensorrt_converter(torch.ops.aten.copysign.Tensor, priority="HIGH")
def by_formula(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
    x, weight = args
    made = refitkit.made_of(_halves(weight), weight, formula=lambda w: w * 0.5)
    return _times(ctx, x, made)


@refitkit.tensorrt_converter(torch.ops.aten.hypot.default, priority="HIGH")
def by_a_wrong_formula(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
    x, weight = args
    made = refitkit.made_of(_halves(weight), weight, formula=lambda w: w * 0.25)
    return _times(ctx, x, made)


@refitkit.tensorrt_converter(torch.ops.aten.nextafter.default, priority="HIGH")
def without_a_formula(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
    x, weight = args
    return _times(ctx, x, refitkit.made_of(_halves(weight), weight))


@refitkit.tensorrt_converter(torch.ops.aten.igamma.default, priority="HIGH")
def by_name(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
    x, weight = args
    return _times(ctx, x, refitkit.made_of(_halves(weight), "weight"))


@refitkit.tensorrt_converter(torch.ops.aten.igammac.default, priority="HIGH")
def silently(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
    x, weight = args
    return _times(ctx, x, _halves(weight))


@refitkit.tensorrt_converter(torch.ops.aten.special_zeta.default, priority="HIGH")
def table(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
    """Multiplies by a table of its own, which nobody sees being made either."""
    x, _ = args
    return _times(ctx, x, np.frombuffer(bytearray(struct.pack("4f", 0.5, 1.5, 2.5, 3.5)), "f"))
