"""Converters that look at weights: a session imports this module by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch_tensorrt.dynamo._SourceIR import SourceIR
from torch_tensorrt.dynamo.conversion import ConverterPriority, dynamo_tensorrt_converter, impl
from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor


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
