"""However many parts there are, one tensor of one of them is in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit import TaskVectors, WeightedAverage
from refitkit.builtin.merges import sources
from refitkit.recipe import TensorMap
from refitkit.testing.oracles import NewMemory
from tests.unit.builtin.merges.helpers import opened, same

if TYPE_CHECKING:
    from collections.abc import Callable

COUNT = 1000


class Read(TensorMap):
    """Reads anew what it is asked for, as from a file."""

    def get(self, fqn: str) -> torch.Tensor:
        return super().get(fqn).clone()


class Peak(NewMemory):
    """The most new memory that was held after an op."""

    peak = 0

    def __torch_dispatch__(self, *call: Any) -> Any:
        result = super().__torch_dispatch__(*call)
        self.peak = max(self.peak, sum(s.nbytes for s in self._new.values() if not s.expired()))
        return result


def parts(count: int, dtype: torch.dtype) -> list[tuple[Any, float]]:
    states = [{n: torch.randn(COUNT).to(dtype) for n in "abcd"} for _ in range(count)]
    return [(Read(state), 1.0) for state in states]


def tasks(count: int, dtype: torch.dtype) -> TaskVectors:
    (base, _), *others = parts(count, dtype)
    return TaskVectors(base, others)


MERGES: dict[str, Callable[[int, torch.dtype], object]] = {
    "average": lambda *how: WeightedAverage(parts(*how)),
    "sum": lambda *how: WeightedAverage(parts(*how), normalize=False),
    "tasks": tasks,
}


def peak_of(merge: object) -> tuple[int, int]:
    """Bytes at the peak while all is read, and in the end."""
    source = opened(merge)
    with Peak() as memory:
        for name in source.names():
            source.info(name)
        opening = memory.kept()
        for name in source.names():
            source.get(name)
    assert opening == 0
    return memory.peak, memory.kept()


@pytest.mark.parametrize("kind", MERGES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_parts_are_read_one_by_one(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_PIECE", COUNT // 20)
    few, many = (peak_of(MERGES[kind](count, dtype)) for count in (3, 12))
    assert few == many
    assert few[1] == 0
    first = value = dtype.itemsize
    total, equal, pieces = 4, 1, 1  # bytes for each element
    assert few[0] <= COUNT * (first + value + total + equal + pieces)


SHAPES = [(), (0, 3), (1,), (29,), (1, 29), (29, 1), (5, 29), (29, 5), (3, 1, 5, 2), (2, 97)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 30])
def test_pieces_do_not_matter(
    dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    states = [{str(s): torch.randn(s, dtype=dtype) for s in SHAPES} for _ in range(3)]
    states[2] = {n: v.t().contiguous().t() if v.dim() == 2 else v for n, v in states[2].items()}
    for state in states[1:]:
        for name, value in state.items():
            if value.dim():
                value[..., ::2] = states[0][name][..., ::2]
    shares = [(state, share) for state, share in zip(states, (0.1, 0.7, 1.3), strict=True)]
    merges = WeightedAverage(shares), TaskVectors(states[0], shares[1:])
    whole = [{name: opened(merge).get(name) for name in states[0]} for merge in merges]
    monkeypatch.setattr(sources, "_PIECE", size)
    for merge, wanted in zip(merges, whole, strict=True):
        source = opened(merge)
        assert all(same(source.get(name), value) for name, value in wanted.items())


def test_pieces_are_no_larger_than_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PIECE", 30)
    for shape in SHAPES:
        pieces = list(sources._pieces(torch.ones(shape), torch.ones(shape)))
        assert sum(piece.numel() for piece, _ in pieces) == torch.ones(shape).numel()
        assert all(piece.numel() <= 30 for piece, _ in pieces)
