"""Refits while other threads use the same plan."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from refitkit.model import CallRef
from tests.fakes import FakeModule, OpenEngine, call_row, leaf_for, make_plan, op_call, same_state
from tests.unit.pipeline.test_delta import Scene
from tests.unit.recipe.test_threads import InTheMiddle

NAMES = ("a", "b", "c", "d", "e")
TURNS = 20


def computing() -> Scene:
    """A module of two engines whose slots are all computed: minus a weight, plus the first one."""
    engines = [OpenEngine(f"e{n}", {f"{n}{x}": torch.zeros(2) for x in NAMES}) for n in (0, 1)]
    slots = [slot for engine in engines for slot in engine.slots.values()]
    calls = [op_call("neg.default", f"@{name}") for name in NAMES]
    calls += [op_call("add.Tensor", CallRef(call=n), "@a") for n in range(len(NAMES))]
    rows = [
        call_row(slot, number % len(NAMES) + len(NAMES), *{NAMES[number % len(NAMES)]: 0, "a": 0})
        for number, slot in enumerate(slots)
    ]
    plan = make_plan(rows, leaves=[leaf_for(slots[0], fqn=name) for name in NAMES], calls=calls)
    return Scene(FakeModule(engines), plan)


def given(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, generator=generator) for name in NAMES}


def wanted(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{n}{name}": weights["a"] - weights[name] for n in (0, 1) for name in NAMES}


def materialized(scene: Scene, seed: int) -> bool:
    assert scene.compiled.plan is not None
    found = scene.compiled.plan.materialize(given(seed))
    return same_state({**found["e0"], **found["e1"]}, wanted(given(seed)))


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_another_thread_materializes_in_the_middle_of_a_refit(name: str, delta: bool) -> None:
    scene = computing()
    scene.refit(given(0), delta=delta)
    weights = InTheMiddle(given(1), name, lambda: materialized(scene, 2))
    scene.refit(weights, delta=delta)
    assert weights.happened
    assert all(weights.happened)
    assert same_state(scene.holds(), wanted(given(1)))


def test_a_refit_in_the_middle_of_what_another_thread_materializes() -> None:
    scene = computing()
    assert scene.compiled.plan is not None

    def refit() -> bool:
        scene.refit(given(4), delta=False)
        return same_state(scene.holds(), wanted(given(4)))

    weights = InTheMiddle(given(3), "c", refit)
    found = scene.compiled.plan.materialize(weights)
    assert all(weights.happened)
    assert same_state({**found["e0"], **found["e1"]}, wanted(given(3)))
    assert same_state(scene.holds(), wanted(given(4)))


def test_a_thread_refits_while_others_materialize() -> None:
    scene, together = computing(), threading.Barrier(3, timeout=60)

    def refits(_: int) -> bool:
        right = True
        for turn in range(TURNS):
            together.wait()
            scene.refit(given(turn), delta=bool(turn % 2))
            right &= same_state(scene.holds(), wanted(given(turn)))
        return right

    def materializes(number: int) -> bool:
        right = True
        for turn in range(TURNS):
            together.wait()
            right &= materialized(scene, 100 * number + turn)
        return right

    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(work, n) for n, work in enumerate([refits, *[materializes] * 2])]
        assert [one.result() for one in found] == [True] * 3
