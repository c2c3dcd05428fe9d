"""Distances from samples: of values that lie anywhere, and of those that lie in one piece."""

from __future__ import annotations

import math

import pytest
import torch

from refitkit.pipeline import samples
from refitkit.pipeline.samples import SAMPLE, of_memory, of_pairs
from refitkit.protocols import Place, Places, SideBySide

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.int8,
    torch.int64,
    torch.bool,
]
COUNTS = [0, 1, 63, 64, 65, SAMPLE, SAMPLE + 1, 5000]


def one(dtype: torch.dtype, count: int, seed: int) -> torch.Tensor:
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 3
    return drawn.to(dtype)


def side_by_side(
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> SideBySide:
    """All of them in two pieces of memory, with gaps that hold garbage."""
    places, end = [], 0
    for name, (old, _) in pairs.items():
        places.append(Place(name, old.dtype, end, old.numel()))
        end += -(-old.nbytes // 16) * 16 + 16
    memories = [torch.full((end + 3,), 255, dtype=torch.uint8) for _ in "ab"]
    for place, both in zip(places, pairs.values(), strict=True):
        for memory, value in zip(memories, both, strict=True):
            memory[place.offset : place.offset + value.nbytes] = value.view(torch.uint8)
    return SideBySide(*memories, Places(places))


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_memory_and_pairs_say_the_same(on_a_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU slots are put together otherwise; what comes out is the same."""
    pairs = {
        f"{str(dtype)[6:]} {count}": (one(dtype, count, 1), one(dtype, count, 2))
        for dtype in DTYPES
        for count in COUNTS
    }
    if on_a_gpu:
        monkeypatch.setattr(samples, "_FEW", SAMPLE)
    found = of_memory(side_by_side(pairs))
    wanted = of_pairs(list(pairs.values()))
    assert list(found) == list(pairs)
    for (name, told), moved in zip(found.items(), wanted, strict=True):
        assert told == pytest.approx(moved, rel=1e-5), name
    assert sum(bool(relative) for relative, _ in found.values()) > len(DTYPES) * 6


@pytest.mark.parametrize("count", COUNTS[1:])
def test_what_is_not_finite_and_what_is_zero(count: int) -> None:
    zeros, ones = torch.zeros(count), torch.ones(count)
    mask, large = torch.full((count,), -math.inf), torch.full((count,), 1e30)
    broken = ones.clone()
    broken[0] = math.nan
    pairs = {
        "same": (ones, ones),
        "stays": (mask, mask),
        "stays nan": (broken, broken),
        "breaks": (ones, broken),
        "from zeros": (zeros, ones),
        "large": (large, large * 2),
    }
    wanted = {
        "stays": (0, 0),
        "stays nan": (0, 0),
        "breaks": (math.inf, math.inf),
        "from zeros": (math.inf, 1),
        "large": (pytest.approx(1), pytest.approx(1e30)),
        "same": (0, 0),
    }
    assert of_memory(side_by_side(pairs)) == wanted
    assert dict(zip(pairs, of_pairs(list(pairs.values())), strict=True)) == wanted


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point or d.is_complex])
def test_elements_that_are_no_numbers_in_any_type(dtype: torch.dtype) -> None:
    old = torch.ones(70).to(dtype)
    old[3] = math.nan
    new = old.clone()
    new[5] = 2
    moved = (pytest.approx(69**-0.5), 1)
    assert of_memory(side_by_side({"w": (old, new)})) == {"w": moved}
    assert of_pairs([(old, new)]) == [moved]
    new[4] = math.nan
    assert of_memory(side_by_side({"w": (old, new)})) == {"w": (math.inf, math.inf)}
    assert of_pairs([(old, new)]) == [(math.inf, math.inf)]


def test_another_default_device_spoils_nothing() -> None:
    """Where samples lie is found out once, at whatever time that is."""
    both = side_by_side({"w": (torch.ones(5000), torch.ones(5000) * 2)})
    with torch.device("meta"):
        assert of_memory(both) == {"w": (1, 1)}
    assert of_memory(both) == {"w": (1, 1)}
