"""Whether elements are finite, of every type."""

from __future__ import annotations

import math

import pytest
import torch

from refitkit.program.bits import all_finite, counted, finite

NARROW = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]
WIDE = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("size", [1, 2, 31, 1000])
def test_one_bad_element_anywhere_is_found(size: int, bad: float) -> None:
    for at in {0, size // 2, size - 1}:
        value = torch.ones(size)
        assert all_finite(value)
        value[at] = bad
        assert not all_finite(value)
        assert not all_finite(-value.expand(2, size).t())


@pytest.mark.parametrize("dtype", NARROW + WIDE + COMPLEX, ids=str)
def test_every_type_of_floats(dtype: torch.dtype) -> None:
    good, bad = (torch.tensor([1.0, x, 3.0]).to(dtype) for x in (2.0, math.nan))
    assert all_finite(good)
    assert not all_finite(bad)
    assert finite(bad).tolist() == [True, False, True]
    assert all_finite(good[:0])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_element_of_eight_bits(dtype: torch.dtype) -> None:
    for byte in range(256):
        value = torch.zeros(3, 5, dtype=torch.uint8)
        value[1, 2] = byte
        good = math.isfinite(value.view(dtype)[1, 2].item())
        assert all_finite(value.view(dtype)) == good
        assert all_finite(value.view(dtype).t()[1:]) == good


def test_conjugates_and_negatives_are_looked_at_as_they_are() -> None:
    value = torch.tensor([1 + 2j, complex(0, math.inf)])
    assert not all_finite(value.conj())
    assert not all_finite(value.conj().imag)
    assert all_finite(value[:1].conj())


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_integers_and_flags_are_always_finite(dtype: torch.dtype) -> None:
    assert all_finite(torch.ones(2).to(dtype))


def test_an_imaginary_part_counts() -> None:
    assert not all_finite(torch.complex(torch.ones(2), torch.tensor([0.0, math.inf])))


def test_opposite_infinities_do_not_cancel_out() -> None:
    assert not all_finite(torch.tensor([math.inf, 1.0, -math.inf]))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_a_sum_that_is_too_large_accuses_nobody(dtype: torch.dtype) -> None:
    large = torch.full((300, 300), torch.finfo(dtype).max, dtype=dtype)
    assert not large.sum().isfinite()
    assert all_finite(large)
    assert all_finite(large[:2] * torch.tensor([[1], [-1]], dtype=dtype))
    large[200, 3] = math.nan
    assert not all_finite(large)


def test_what_messages_say() -> None:
    bad = torch.zeros(3, 4, dtype=torch.bool)
    bad[1, 2] = bad[2, 0] = True
    assert counted(bad) == "2 of 12 elements, the first at (1, 2)"
    assert counted(torch.tensor(True)) == "1 of 1 elements, the first at ()"
