"""One plan in several threads at once, with other weights in each."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

from refitkit.recipe import TensorMap
from tests.unit.recipe.recorder import Recording, Tensors, agree, like, record, truth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROUNDS = 25


def leaves() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    small = {f"g{n}": torch.randn(6, generator=generator) for n in range(6)}
    w = torch.randn(6, 6, generator=generator)
    return {"w": w, "i": torch.tensor([2, 0, 1, 0, 5, 4]), **small}


def function(w: torch.Tensor, i: torch.Tensor, **small: torch.Tensor) -> list[torch.Tensor]:
    """Compute a batch of small folds, a table that refits keep, and values that depend on both."""
    folds = [(one * 2 + one).neg() for one in small.values()]
    table = (i * 2.5)[:, None] + i
    return [*folds, w * folds[0], w[i] + table, table, w, w.t() * folds[1]]


def recorded() -> Recording:
    return record(function, leaves())


def in_threads(count: int, work: Callable[[int], bool]) -> list[bool]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


@pytest.mark.parametrize("count", [2, 4])
def test_threads_that_materialize_at_once_get_their_own_values(count: int) -> None:
    plan, together = recorded(), threading.Barrier(count, timeout=60)

    def work(number: int) -> bool:
        right = True
        for turn in range(ROUNDS):
            weights = like(leaves(), seed=number * ROUNDS + turn)
            together.wait()
            right &= agree(plan.values(weights), truth(function, weights))
        return right

    assert all(in_threads(count, work))


def test_threads_that_take_turns_slot_by_slot_get_their_own_values() -> None:
    """Each thread has computed a part of its values when the other one continues."""
    plan = recorded().plan
    state = [like(leaves(), seed) for seed in (1, 2)]
    turns = [threading.Semaphore(1), threading.Semaphore(0)]

    def work(number: int) -> bool:
        found, slots, more = {}, plan.iter_slots(state[number]), True
        while more:
            assert turns[number].acquire(timeout=60)
            more = (one := next(slots, None)) is not None
            found |= {one[0].name: one[1].clone()} if one else {}
            turns[1 - number].release()
        return agree(found, truth(function, state[number]))

    assert in_threads(2, work) == [True, True]


def test_values_of_one_replay_may_be_read_by_several_threads() -> None:
    """In any order and more than once, as an engine that stages in parallel would read them."""
    plan, weights = recorded().plan, like(leaves())
    wanted = truth(function, weights)
    for _ in range(ROUNDS):
        values = plan.values_of(plan.ledger, TensorMap(weights))
        loads = {slot: one.load for (_, slot), one in values.items() if not isinstance(one, str)}
        together = threading.Barrier(3, timeout=60)

        def work(number: int, loads=loads, together=together) -> bool:  # type: ignore[no-untyped-def]
            names = sorted(loads, reverse=bool(number % 2))
            together.wait()
            return agree({name: loads[name]() for name in names}, wanted)

        assert all(in_threads(3, work))


class InTheMiddle(Mapping[str, torch.Tensor]):
    """Weights that run a function in another thread before one of them is read."""

    def __init__(self, tensors: Tensors, name: str, then: Callable[[], bool]) -> None:
        self._tensors, self._name, self._then = tensors, name, then
        self.happened: list[bool] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == self._name:
            with ThreadPoolExecutor(1) as pool:
                self.happened.append(pool.submit(self._then).result(timeout=60))
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@pytest.mark.parametrize("name", ["w", "i", "g3"])
def test_another_thread_may_materialize_in_the_middle_of_it(name: str) -> None:
    """Another thread computes while one run has computed half of its values and kept tables."""
    plan, one, other = recorded(), like(leaves(), 1), like(leaves(), 2)
    weights = InTheMiddle(one, name, lambda: agree(plan.values(other), truth(function, other)))
    slots = plan.plan.iter_slots(weights)
    assert agree({slot.name: value for slot, value in slots}, truth(function, one))
    assert weights.happened
    assert all(weights.happened)
