"""Converters that look at weights: a session imports this module by name."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import tensorrt
import torch
from torch_tensorrt.dynamo._SourceIR import SourceIR
from torch_tensorrt.dynamo.conversion import ConverterPriority, dynamo_tensorrt_converter, impl
from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor

_address_of = torch.Tensor.data_ptr


def _times(ctx: Any, target: Any, name: str, x: Any, factor: Any) -> Any:
    made = get_trt_tensor(ctx, factor, f"{name}_factor")
    return impl.elementwise.mul(ctx, target, SourceIR.ATEN, name, x, made)


@dynamo_tensorrt_converter(torch.ops.aten.copysign.Tensor, priority=ConverterPriority.HIGH)
def branches(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
    """Looks whether a number is large, and takes the weight itself or a number."""
    x, weight = args
    large = weight.reshape(-1)[0].item() > 1
    return _times(ctx, target, name, x, weight if large else 2.0)


@dynamo_tensorrt_converter(torch.ops.aten.hypot.default, priority=ConverterPriority.HIGH)
def folds(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
    """Makes the largest element a number of the network, through NumPy."""
    x, weight = args
    largest = weight.numpy().max()
    return _times(ctx, target, name, x, np.array([largest], dtype=np.float32))


@dynamo_tensorrt_converter(torch.ops.aten.nextafter.default, priority=ConverterPriority.HIGH)
def updates(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
    """Changes a copy of a weight in place: through views, an array, and by assignment."""
    x, weight = args
    made = weight.clone()
    made[1:3].mul_(3)
    made.view(2, 2).t()[0].add_(weight[2:])
    torch.from_numpy(made.numpy())[3:].neg_()
    made[0] = weight[3]
    return _times(ctx, target, name, x, made)


@dynamo_tensorrt_converter(torch.ops.aten.igammac.default, priority=ConverterPriority.HIGH)
def changes(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
    """Changes the weight itself, through a view."""
    x, weight = args
    weight.detach().view(2, 2)[0].add_(1)
    return _times(ctx, target, name, x, weight)


@dynamo_tensorrt_converter(torch.ops.aten.igamma.default, priority=ConverterPriority.HIGH)
def fills(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
    """Fills an array of NumPy's own with the weight, which nobody sees."""
    x, weight = args
    plain = np.empty(4, np.float32)
    plain[:] = weight.numpy()
    return _times(ctx, target, name, x, plain)


@dynamo_tensorrt_converter(torch.ops.aten.special_zeta.default, priority=ConverterPriority.HIGH)
def reads_memory(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
    """Makes a number of what lies at the weight's address, with a method that it had before."""
    x, weight = args
    number = ctypes.c_float.from_address(_address_of(weight)).value
    return _times(ctx, target, name, x, weight * number)


@dynamo_tensorrt_converter(
    torch.ops.aten.special_hermite_polynomial_h.default, priority=ConverterPriority.HIGH
)
def packs(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
    """Makes two weights of four bits a byte, as for NVFP4: eight levels and a sign."""
    x, weight = args
    levels = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    codes = torch.bucketize(weight.abs(), levels) + 8 * (weight < 0)
    packed = (codes[1::2] * 16 + codes[::2]).to(torch.uint8)
    four = get_trt_tensor(
        ctx, packed, f"{name}_weights_fp4", target_quantized_type=tensorrt.DataType.FP4
    )
    scale = get_trt_tensor(ctx, torch.ones(()), f"{name}_scale")
    wide = ctx.net.add_dequantize(four, scale, tensorrt.DataType.FLOAT).get_output(0)
    return impl.elementwise.mul(ctx, target, SourceIR.ATEN, name, x, wide)
