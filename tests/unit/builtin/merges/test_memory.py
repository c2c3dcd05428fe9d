"""However many parts there are, one tensor of one of them is in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit import TaskVectors, WeightedAverage
from refitkit.recipe import TensorMap
from refitkit.testing.memory import NewMemory
from tests.unit.builtin.merges.helpers import opened

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
        self.peak = max(self.peak, sum(s.nbytes for s in self._seen.values() if not s.expired()))
        return result


def parts(count: int) -> list[tuple[Any, float]]:
    states = [{n: torch.randn(COUNT, dtype=torch.float16) for n in "abcd"} for _ in range(count)]
    return [(Read(state), 1.0) for state in states]


MERGES: dict[str, Callable[[int], object]] = {
    "average": lambda count: WeightedAverage(parts(count)),
    "sum": lambda count: WeightedAverage(parts(count), normalize=False),
    "tasks": lambda count: TaskVectors(Read(parts(1)[0][0]._tensors), parts(count - 1)),
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
def test_parts_are_read_one_by_one(kind: str) -> None:
    few, many = peak_of(MERGES[kind](3)), peak_of(MERGES[kind](12))
    assert few == many
    assert few[1] == 0
    assert few[0] <= 7 * 4 * COUNT  # some tensors of float32 and masks, made on the way
