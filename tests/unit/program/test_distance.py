"""How far tensors are apart, held against sums that Python makes of their elements."""

from __future__ import annotations

import math

import pytest
import torch

from refitkit.model.slot import ITEM_BYTES
from refitkit.program import distance as module
from refitkit.program.distance import Distance, distance, is_whole
from tests.fakes import PeakMemory

FLOATS = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float8_e5m2"]
WHOLE = ["bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"]
inf, nan = math.inf, math.nan


def dtype_of(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def tensors(name: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, g = dtype_of(name), torch.Generator().manual_seed(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    a, b = (torch.randn(count, generator=g, dtype=wide) for _ in "ab")
    if is_whole(dtype):
        a, b = (t.abs().mul(1.5).floor() for t in (a, b))
    return a.to(dtype), b.to(dtype)


def by_hand(a: torch.Tensor, b: torch.Tensor) -> Distance:
    """From Python's own numbers, exactly summed."""
    wide = torch.complex128 if a.is_complex() else torch.float64
    x, y = a.reshape(-1).to(wide).tolist(), b.reshape(-1).to(wide).tolist()
    gaps = [abs(q - p) for p, q in zip(x, y, strict=True)]
    return Distance(
        math.sqrt(math.fsum(gap * gap for gap in gaps)),
        math.sqrt(math.fsum(abs(p) ** 2 for p in x)),
        max(gaps, default=0.0),
        sum(p != q for p, q in zip(x, y, strict=True)),
        len(x),
    )


@pytest.mark.parametrize("count", [1, 4095, 4096, 10_001])
@pytest.mark.parametrize("name", FLOATS)
def test_floats(monkeypatch: pytest.MonkeyPatch, name: str, count: int) -> None:
    monkeypatch.setattr(module, "CHUNK", 5000)
    a, b = tensors(name, count)
    found, wanted = distance(a, b), by_hand(a, b)
    exact = 1e-12 if name in {"float64", "complex128"} else 1e-5
    assert found.apart == pytest.approx(wanted.apart, rel=exact)
    assert found.length == pytest.approx(wanted.length, rel=exact)
    assert found.largest == pytest.approx(wanted.largest, rel=1e-6)
    assert (found.differing, found.count) == (wanted.differing, wanted.count)
    assert found.relative == pytest.approx(wanted.apart / wanted.length, rel=1e-5)
    assert found.share == wanted.differing / count
    assert distance(a, a) == Distance(0, found.length, 0, 0, count)


@pytest.mark.parametrize("name", WHOLE)
def test_of_integers_and_flags_the_share_counts(name: str) -> None:
    a, b = tensors(name, 5001)
    found, wanted = distance(a, b), by_hand(a, b)
    assert 0 < found.relative < 1
    assert found.relative == found.share == wanted.differing / 5001
    assert found.largest == wanted.largest
    assert distance(a, a).relative == 0


def test_every_dtype_there_is_can_be_measured() -> None:
    for name in ITEM_BYTES:
        raw = torch.arange(1, 113, dtype=torch.uint8)  # 127 is no number in some of them
        pair = raw, raw.flip(0)
        a, b = (t > 56 if name == "bool" else t.view(dtype_of(name)) for t in pair)
        assert distance(a, a).relative == 0, name
        assert distance(a, b).relative > 0, name
        assert distance(a, b).differing == len(a), name


@pytest.mark.parametrize(
    ("old", "new", "relative", "largest", "share"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0, 0, 0),
        ([0.0, 0.0], [0.0, 2.0], inf, 2, 0.5),
        ([3.0, 4.0], [0.0, 0.0], 1, 4, 1),
        ([3.0, 4.0], [-3.0, -4.0], 2, 8, 1),
        ([0.0, 1.0], [-0.0, 1.0], 0, 0, 0.5),
        ([], [], 0, 0, 0),
        ([1.0, nan, inf], [3.0, nan, inf], 2, 2, 1 / 3),  # what stays is not finite, and stays
        ([1.0, nan], [1.0, 1.0], inf, inf, 0.5),
        ([1.0, 1.0], [1.0, nan], inf, inf, 0.5),
        ([1.0, inf], [1.0, -inf], inf, inf, 0.5),
        ([nan], [nan], 0, 0, 0),
        ([1e30, 1e30], [3e30, 3e30], 2, 2e30, 1),  # squares are too large for float32
        ([1e-30, 1e-30], [3e-30, 3e-30], 2, 2e-30, 1),  # and too small
    ],
)
def test_what_it_says_where_norms_alone_would_not(
    old: list[float], new: list[float], relative: float, largest: float, share: float
) -> None:
    found = distance(torch.tensor(old), torch.tensor(new))
    assert found.relative == pytest.approx(relative, rel=1e-6)
    assert found.largest == pytest.approx(largest, rel=1e-6)
    assert found.share == share


def test_squares_too_large_for_float64() -> None:
    old = torch.tensor([1e200, 0.0], dtype=torch.float64)
    assert distance(old, -2 * old).relative == 3
    tiny = torch.tensor([1e-200], dtype=torch.float64)
    assert distance(tiny, 3 * tiny).relative == pytest.approx(2)


def test_elements_are_compared_in_logical_order() -> None:
    a = torch.arange(12.0).reshape(3, 4) + 1
    b = a.t().contiguous().t()
    assert a.stride() != b.stride()
    assert distance(a, b).differing == 0
    assert distance(a[:, ::2], b[:, ::2]).differing == 0
    z = torch.complex(a, a)
    assert distance(z.conj(), z).differing == 12
    assert distance(z.conj().imag, -a).differing == 0


@pytest.mark.parametrize("name", ["complex64", "complex128"])
def test_a_complex_number_differs_where_a_part_does(name: str) -> None:
    a = torch.ones(3, dtype=dtype_of(name))
    assert distance(a, a + torch.tensor([0, 1, 1j])).differing == 2


def test_gradients_do_not_matter() -> None:
    a = torch.nn.Parameter(torch.ones(3))
    assert distance(a, a * 2).relative == 1


def test_a_long_tensor_in_pieces_is_measured_as_a_whole_one() -> None:
    a, b = tensors("float32", 2 * module.CHUNK + 7)
    found = distance(a, b)
    assert found.relative == pytest.approx(float((b - a).double().norm() / a.double().norm()))
    assert found.count == len(a)


def test_a_large_tensor_takes_little_memory() -> None:
    a = torch.ones(8 * module.CHUNK, dtype=torch.bfloat16)
    b = a * 2
    with PeakMemory() as memory:
        assert distance(a, b).relative == 1
    assert 0 < memory.peak < 64e6
