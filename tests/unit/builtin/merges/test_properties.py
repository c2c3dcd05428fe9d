"""Merges of any values and numbers, against plain float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refitkit import TaskVectors, WeightedAverage
from tests.unit.builtin.merges.helpers import opened, same

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
NUMBERS = st.lists(st.floats(-4, 4, allow_nan=False), min_size=1, max_size=5)
SHARES = st.lists(st.floats(0.001, 1000), min_size=1, max_size=5)
COUNT = 64


@st.composite
def values(draw: st.DrawFn, dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    """Tensors of one dtype: some elements equal in all, magnitudes over some decades."""
    seed = draw(st.integers(0, 2**32 - 1))
    spread = draw(st.sampled_from([0.0, 1.0, 3.0]))
    random = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        normal, scale = (torch.randn(COUNT, generator=random, dtype=torch.float64) for _ in "ab")
        made.append((normal * 10 ** (scale * spread).clamp(-4, 2)).to(dtype))
    for other in made[1:]:
        other[: COUNT // 4] = made[0][: COUNT // 4]
    return made


def within(
    found: torch.Tensor, wanted: torch.Tensor, magnitude: torch.Tensor, steps: int
) -> torch.Tensor:
    """Whether a sum of some steps of given magnitude, rounded once, can be this far off.

    Each step (a number in float32, a difference, a product, a sum) is off by half a unit of the
    dtype of the sum; the result by half a unit of its own, or of the smallest number there is.
    """
    wide = torch.finfo(torch.float64 if found.dtype is torch.float64 else torch.float32)
    own = torch.finfo(found.dtype)
    allowed = magnitude * steps * wide.eps + wanted.abs() * own.eps + own.tiny * own.eps
    return (found.double() - wanted).abs() <= allowed


def given_parts(numbers: st.SearchStrategy[list[float]], more: int) -> Callable[..., object]:
    @st.composite
    def drawn(draw: st.DrawFn) -> tuple[list[float], list[torch.Tensor]]:
        shares = draw(numbers)
        return shares, draw(values(draw(DTYPES), len(shares) + more))

    return given(drawn())  # type: ignore[return-value]


@settings(max_examples=150)
@given_parts(SHARES, 0)
def test_averages(drawn: tuple[list[float], list[torch.Tensor]]) -> None:
    shares, parts = drawn
    made = opened(WeightedAverage([({"w": p}, s) for p, s in zip(parts, shares, strict=True)]))
    found = made.get("w")
    terms = [p.double() * (s / sum(shares)) for p, s in zip(parts, shares, strict=True)]
    magnitude = sum(term.abs() for term in terms)
    assert isinstance(magnitude, torch.Tensor)
    assert within(found, sum(terms), magnitude, len(parts) + 2).all()  # type: ignore[arg-type]
    assert same(found[: COUNT // 4], parts[0][: COUNT // 4])
    assert found.dtype is parts[0].dtype


@settings(max_examples=150)
@given_parts(NUMBERS, 1)
def test_task_vectors(drawn: tuple[list[float], list[torch.Tensor]]) -> None:
    scales, (base, *tuned) = drawn
    tasks = [({"w": t}, s) for t, s in zip(tuned, scales, strict=True)]
    found = opened(TaskVectors({"w": base}, tasks)).get("w")
    wide = base.double()
    wanted, magnitude = wide.clone(), wide.abs()
    for task, scale in zip(tuned, scales, strict=True):
        wanted += scale * (task.double() - wide)
        magnitude += abs(scale) * (task.double().abs() + wide.abs())
    assert within(found, wanted, magnitude, len(scales) + 3).all()
    assert same(found[: COUNT // 4], base[: COUNT // 4])


@settings(max_examples=50)
@given(st.data())
def test_reading_again_in_any_order_gives_the_same_bits(data: st.DataObject) -> None:
    dtype = data.draw(DTYPES)
    names = "abcd"
    parts = [dict(zip(names, data.draw(values(dtype, len(names))), strict=True)) for _ in range(3)]
    merge = WeightedAverage([(part, data.draw(st.floats(0.1, 10))) for part in parts])
    source, again = opened(merge), opened(merge)
    first = {name: source.get(name) for name in names}
    for name in data.draw(st.permutations(names)):
        assert same(again.get(name), first[name])
        assert same(source.get(name), first[name])
