"""Tensors compared as bits, held against their bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refitkit.model.slot import ITEM_BYTES
from refitkit.program.bits import dense_strides, is_dense, same_bits
from refitkit.program.dtypes import dtype_name, dtype_of

DTYPES = [
    torch.bool, torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.float32,
    torch.int64, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn,
]  # fmt: skip


def tensor_of(
    content: bytes, dtype: torch.dtype, shape: tuple[int, ...], order: Any, offset: int, step: int
) -> torch.Tensor:
    """These bytes as the elements of a tensor, in order, however it lies in memory."""
    plain = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype).reshape(shape)
    numel = plain.numel()
    memory = torch.zeros(offset + numel * step + 1, dtype=dtype)
    place = memory[offset : offset + numel * step : step]
    inverse = [order.index(d) for d in range(len(shape))]
    placed = place.view([shape[d] for d in order]).permute(inverse)
    placed.copy_(plain)
    return placed


layouts = st.tuples(
    st.permutations([0, 1]), st.integers(0, 5), st.integers(1, 3)
)  # order, offset, step


@given(st.sampled_from(DTYPES), st.integers(1, 5), st.integers(1, 5), layouts, layouts, st.data())
@settings(max_examples=200)
def test_bits_are_compared_wherever_they_lie(
    dtype: torch.dtype, rows: int, columns: int, one: Any, two: Any, data: st.DataObject
) -> None:
    size = rows * columns * dtype.itemsize
    limit = 1 if dtype is torch.bool else 255
    content = bytes(data.draw(st.lists(st.integers(0, limit), min_size=size, max_size=size)))
    other = bytearray(content)
    if data.draw(st.booleans()):
        other[data.draw(st.integers(0, size - 1))] ^= 1
    a = tensor_of(content, dtype, (rows, columns), *one)
    b = tensor_of(bytes(other), dtype, (rows, columns), *two)
    assert same_bits(a, b) == (content == other)
    assert same_bits(b, a) == (content == other)


def test_only_the_first_elements_can_be_compared() -> None:
    a, b = torch.arange(6.0), torch.arange(6.0)
    b[4] = -1
    assert same_bits(a, b, 4)
    assert not same_bits(a, b, 5)
    assert not same_bits(a, b, 100)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.tensor(0.0), torch.tensor(-0.0), False),
        (torch.tensor(float("nan")), torch.tensor(float("nan")), True),
        (torch.ones(2), torch.ones(2).double(), False),
        (torch.ones(2), torch.ones(2).int(), False),
        (torch.ones(4), torch.ones(2, 2), False),
        (torch.ones(0, 2), torch.ones(0, 2), True),
        (torch.ones(0, 2), torch.ones(0, 3), False),
        (torch.ones(1).expand(4), torch.ones(4), True),
        (torch.ones(1).expand(4), torch.ones(1).expand(4), True),
        (torch.ones(2, requires_grad=True), torch.nn.Parameter(torch.ones(2)), True),
        (torch.arange(1.0, 9.0), torch.arange(9.0)[1:], True),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j]), True),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j]), False),
        (torch.tensor([1 + 2j]).conj().imag, torch.tensor([-2.0]), True),
    ],
)
def test_cases(a: torch.Tensor, b: torch.Tensor, same: bool) -> None:
    assert same_bits(a, b) == same
    assert same_bits(b, a) == same


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.ones(2, 3), True),
        (torch.ones(2, 3).t(), True),
        (torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.ones(2, 3, 4).permute(2, 0, 1), True),
        (torch.ones(()), True),
        (torch.ones(1, 1), True),
        (torch.ones(0, 3), True),
        (torch.ones(4, 4)[:, :2], False),
        (torch.ones(4)[::2], False),
        (torch.ones(1).expand(3), False),
        (torch.ones(1, 3).expand(2, 3), False),
        (torch.ones(4).as_strided((2, 2), (1, 1)), False),
        (torch.ones(9)[3:], True),
    ],
)
def test_dense(tensor: torch.Tensor, dense: bool) -> None:
    assert is_dense(tensor) == dense


def test_dense_strides_are_those_of_torch() -> None:
    shape = torch.Size([2, 3, 4])
    assert dense_strides(shape, (0, 1, 2)) == torch.empty(shape).stride()
    permuted = torch.empty(4, 2, 3).permute(1, 2, 0)
    assert dense_strides(shape, (2, 0, 1)) == permuted.stride()


@pytest.mark.parametrize("name", sorted(ITEM_BYTES))
def test_dtypes_and_names(name: str) -> None:
    dtype = dtype_of(name)
    assert dtype_name(dtype) == name
    assert dtype.itemsize == ITEM_BYTES[name]


def test_a_dtype_that_torch_lacks() -> None:
    with pytest.raises(KeyError):
        dtype_of("float23")
