"""Weights of layers as tensors: NumPy's as they are, TensorRT's by their address."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from refitkit.builtin.torch_tensorrt import networks
from refitkit.errors import EngineError


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.int8])
def test_arrays_are_seen_and_not_copied(dtype: Any) -> None:
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    view = networks.tensor_of(array)
    assert view.shape == (6,)
    array[1, 2] = 9
    assert view[5] == 9


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("FP8", torch.float8_e4m3fn), ("INT4", torch.uint8), ("FP4", torch.uint8)],
)
def test_dtypes_that_numpy_lacks(name: str, dtype: torch.dtype) -> None:
    assert networks.torch_dtype_of(SimpleNamespace(name=name)) is dtype


def test_no_elements_are_an_empty_tensor_and_no_address_is_read() -> None:
    weights = SimpleNamespace(size=0, dtype=SimpleNamespace(name="FP8"))
    found = networks.tensor_of(weights)
    assert (found.numel(), found.dtype) == (0, torch.float8_e4m3fn)


class Kind:
    """Stands for a ``tensorrt.DataType``."""

    def __init__(self, number: int, name: str) -> None:
        self.number, self.name = number, name

    def __int__(self) -> int:
        return self.number


def held(
    *, number: int, size: int, lies: tuple[int, int | None, int], name: str = "FP8"
) -> tuple[Any, Any]:
    """What an object says, and what lies where its pointer leads; the second keeps that alive."""
    inner = networks._CWeights(*lies)
    weights = SimpleNamespace(dtype=Kind(number, name), size=size)
    return weights, inner


@pytest.mark.parametrize(
    "lies", [(7, 1, 4), (6, 1, 5), (6, None, 4)], ids=["type", "count", "no values"]
)
def test_another_layout_is_noticed_before_its_address_is_used(
    monkeypatch: pytest.MonkeyPatch, lies: tuple[int, int | None, int]
) -> None:
    weights, inner = held(number=6, size=4, lies=lies)
    pointer = ctypes.c_void_p(ctypes.addressof(inner))

    class Pointing(ctypes.c_void_p):
        @classmethod
        def from_address(cls, _: int) -> Any:
            return pointer

    monkeypatch.setattr(networks.ctypes, "c_void_p", Pointing)
    with pytest.raises(EngineError, match="unknown layout"):
        networks.tensor_of(weights)


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("FP8", torch.float8_e4m3fn, 8),
        ("BF16", torch.bfloat16, 4),
        ("FP4", torch.uint8, 16),
        ("FP4", torch.uint8, 15),
        ("INT4", torch.uint8, 16),
    ],
)
def test_what_agrees_is_read_where_it_lies(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, size: int
) -> None:
    """TensorRT counts elements; types of four bits have two of them in a byte."""
    memory = torch.arange(8, dtype=torch.uint8)
    weights, inner = held(number=6, size=size, lies=(6, memory.data_ptr(), size), name=name)
    pointer = ctypes.c_void_p(ctypes.addressof(inner))

    class Pointing(ctypes.c_void_p):
        @classmethod
        def from_address(cls, _: int) -> Any:
            return pointer

    monkeypatch.setattr(networks.ctypes, "c_void_p", Pointing)
    found = networks.tensor_of(weights)
    assert (found.dtype, found.nbytes) == (dtype, memory.nbytes)
    assert found.data_ptr() == memory.data_ptr()
