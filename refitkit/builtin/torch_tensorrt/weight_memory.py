"""Reading weights out of network layers, whatever their dtype.

``tensorrt`` gives weights as NumPy arrays where NumPy knows the dtype, and else as
``tensorrt.Weights``, which tell no address. There the address is read from the object itself: a
pybind11 instance holds, after its header, a pointer to the C++ value, and ``nvinfer1::Weights`` is
``{DataType type; void const* values; int64_t count;}`` (``NvInferRuntimeBase.h``). Type and count
that lie there are compared with what the object says before the address is used.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

from refitkit.builtin.torch_tensorrt.weighttypes import fact_of_trt, torch_name
from refitkit.errors import EngineError
from refitkit.program import dtypes


class _CWeights(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


def tensor_of(weights: Any) -> torch.Tensor:
    """A flat view of weights that a layer holds: valid while the layer's memory lives.

    Types with two elements in a byte are given as bytes.

    Args:
        weights: What an attribute of a layer gave: a NumPy array or ``tensorrt.Weights``.

    Raises:
        EngineError: This build of tensorrt keeps its weights in another way.
    """
    if isinstance(weights, np.ndarray):
        return torch.from_numpy(weights).reshape(-1)
    dtype = dtype_of(weights.dtype)
    if not weights.size:
        return torch.empty(0, dtype=dtype)
    count = fact_of_trt("", weights.dtype, weights.size).count
    # its own nbytes is 2**64 minus the count for types of four bits (tensorrt_rtx 1.6.1)
    raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(_address(weights))
    return torch.frombuffer(raw, dtype=dtype)


def dtype_of(kind: Any) -> torch.dtype:
    """Torch's dtype for a ``tensorrt.DataType``; ``uint8`` for those with two elements in a byte.

    Raises:
        EngineError: torch has none.
    """
    name = torch_name(kind.name)
    if name is None:
        raise EngineError(f"torch has no dtype for TensorRT's {kind.name}.")
    return dtypes.dtype_of(name)


def _address(weights: Any) -> int:
    value = ctypes.c_void_p.from_address(id(weights) + object.__basicsize__).value
    if value is None:
        raise _unknown_layout()
    found = _CWeights.from_address(value)
    if (found.type, found.count) != (int(weights.dtype), weights.size) or not found.values:
        raise _unknown_layout()
    return int(found.values)


def _unknown_layout() -> EngineError:
    return EngineError("This build of tensorrt keeps weights of networks in a way unknown to us.")
