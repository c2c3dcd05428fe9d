"""State that calls write, with engines of every kind: who keeps it, who cannot, and the report."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from refitkit.errors import NotRefittableError
from refitkit.model import Leaf, LeafKind
from refitkit.recipe.reads import state_slots
from tests.fakes import (
    FakeEngine,
    FakeModule,
    Loaded,
    OpenEngine,
    make_plan,
    make_slot,
    pinned_row,
    recipe_row,
)

ZEROS, ONES, TWOS = torch.zeros(2), torch.ones(2), torch.full((2,), 2.0)
WEIGHTS = {"a": TWOS, "b": TWOS}


class Scene(Loaded):
    """Two engines, each with a weight and a cache that the plan keeps as zeros."""

    def __init__(self, *kinds: type[FakeEngine]) -> None:
        pairs = list(zip(kinds, "ab", strict=True))
        engines = [kind(f"e{n}", {n: ZEROS, f"cache-{n}": ONES}) for kind, n in pairs]
        super().__init__(FakeModule(engines))
        rows, leaves = [], []
        for engine, (_, name) in zip(engines, pairs, strict=True):
            weight, cache = engine.slots[name], engine.slots[f"cache-{name}"]
            rows += [recipe_row(weight), pinned_row(cache, cache.name)]
            facts: dict[str, Any] = {"dtype": "float32", "shape": (2,)}
            leaves.append(Leaf(fqn=name, kind=LeafKind.PARAMETER, **facts))
            kind = LeafKind.NON_PERSISTENT_BUFFER
            leaves.append(Leaf(fqn=cache.name, kind=kind, mutated=True, **facts))
        pinned = {f"cache-{name}": ZEROS for name in "ab"}
        self.compiled.plan = make_plan(rows, leaves=leaves, pinned=pinned)

    def refit(self, **how: Any) -> Any:
        """The report of a refit; what engines hold is compared with it."""
        report = self.pipeline.refit(self.compiled, WEIGHTS, **how).report
        for row in report.state:
            held = self.holds()[row.slot].tolist()
            assert held == {"kept": [1.0, 1.0], "reset": [0.0, 0.0]}[row.outcome]
        assert self.holds()["a"].tolist() == self.holds()["b"].tolist() == [2.0, 2.0]
        return report


HOWS: list[dict[str, Any]] = [{}, {"delta": True}, {"rollback": False}, {"inputs": (ONES,)}]


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_engines_that_take_all_at_once_cannot_keep_it_and_the_report_says_so(
    how: dict[str, Any],
) -> None:
    scene = Scene(OpenEngine, FakeEngine)
    how = {**how, "verify": "none"}
    for _ in range(2):
        report = scene.refit(**how)
        assert [row.outcome for row in report.state] == ["kept", "reset"]
        notes = [note for note in report.notes if note.startswith("state")]
        assert [note.partition(": ")[2] for note in notes] == [
            "ea/cache-a (reset_state=True resets it)",
            "eb/cache-b",
        ]
        assert report.slots_written == 3 or how.get("delta")
        reasons = {row.slot: row.reason for row in report.ledger}
        assert reasons["cache-a"].startswith("kept: calls of the module write it")
    assert [row.outcome for row in scene.refit(reset_state=True, verify="none").state] == [
        "reset",
        "reset",
    ]


class Forgetful(OpenEngine):
    """It has lost what slots hold, which a refit in part needs."""

    def stage_partial(self, values: Any) -> Any:
        raise NotRefittableError("nobody knows what this engine holds")


def test_state_is_kept_where_another_engine_has_lost_what_it_holds() -> None:
    """The refit writes all of that engine then, and still not the state of the others."""
    engines = [
        OpenEngine("ea", {"a": ZEROS, "cache": ONES}),
        Forgetful("eb", {"b": ZEROS, "c": ZEROS}),
    ]
    scene = Loaded(FakeModule(engines))
    slots = {name: slot for engine in engines for name, slot in engine.slots.items()}
    cache = slots.pop("cache").model_copy(update={"mutable": True})
    scene.compiled.plan = make_plan(
        [*map(recipe_row, slots.values()), pinned_row(cache)], pinned={"cache": ZEROS}
    )
    first = dict.fromkeys("abc", ONES)
    for weights in (first, {**first, "b": TWOS}):
        report = scene.pipeline.refit(scene.compiled, weights, delta=True).report
        assert [row.outcome for row in report.state] == ["kept"]
    assert (report.slots_written, report.slots_unchanged) == (3, 0)
    held = {name: value.tolist()[0] for name, value in scene.holds().items()}
    assert held == {"a": 1.0, "cache": 1.0, "b": 2.0, "c": 1.0}


def test_an_engine_that_has_lost_its_state_refuses() -> None:
    scene = Scene(OpenEngine, Forgetful)
    before = scene.module.holds()
    with pytest.raises(NotRefittableError, match="nobody knows"):
        scene.refit()
    assert all(torch.equal(value, before[name]) for name, value in scene.module.holds().items())
    assert {row.outcome for row in scene.refit(reset_state=True).state} == {"reset"}


def test_a_constant_that_holds_what_state_held_is_no_state() -> None:
    slots = [make_slot("cache"), make_slot("constant")]
    leaf = Leaf(
        fqn="cache",
        kind=LeafKind.NON_PERSISTENT_BUFFER,
        dtype="float32",
        shape=(2,),
        mutated=True,
    )
    plan = make_plan(
        [pinned_row(slots[0], "cache"), pinned_row(slots[1], "cache")],
        leaves=[leaf],
        pinned={"cache": ZEROS, "constant": ZEROS},
    )
    assert state_slots(plan) == (("model", "cache"),)
    plan = make_plan([recipe_row(slots[1].model_copy(update={"mutable": True}))])
    assert state_slots(plan) == (("model", "constant"),)
