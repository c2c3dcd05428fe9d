"""The strategy ``recipe``: what the plan says, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from refitkit.builtin.strategies.recipe import RecipeStrategy
from refitkit.model import CallRef, LedgerRow, PinnedRef, SlotState
from refitkit.protocols import MappingStrategy, MapRequest
from refitkit.recipe import TensorMap
from tests.fakes import (
    call_row,
    guard_of,
    make_module,
    make_plan,
    make_slot,
    op_call,
    pinned_row,
    recipe_row,
)

W, M, U = make_slot("w"), make_slot("m"), make_slot("u")
UNMAPPED = LedgerRow(slot=U, state=SlotState.UNMAPPED, reason="nobody knows")
PLAN = make_plan([recipe_row(W), pinned_row(M), UNMAPPED], pinned={"m": torch.ones(2)})


def mapped(weights: dict[str, torch.Tensor], plan: Any = PLAN, wanted: Any = None) -> Any:
    rows = PLAN.ledger if wanted is None else wanted
    return RecipeStrategy().map(MapRequest(plan, make_module(), TensorMap(weights), tuple(rows)))


def test_it_is_a_strategy() -> None:
    strategy = RecipeStrategy()
    assert isinstance(strategy, MappingStrategy)
    assert (strategy.name, strategy.priority) == ("recipe", 10)


def test_it_serves_what_the_plan_has_a_value_for() -> None:
    weight = torch.zeros(2)
    found = mapped({"w": weight})
    assert found.values.keys() == {W.key, M.key}
    assert found.values[W.key].load().data_ptr() == weight.data_ptr()
    assert (found.values[W.key].sources, found.values[M.key].sources) == (("w",), ())
    assert {value.strategy for value in found.values.values()} == {"recipe"}
    assert found.declined == {U.key: "nobody knows"}


def test_it_says_what_the_source_lacks() -> None:
    found = mapped({})
    assert found.values.keys() == {M.key}
    assert found.declined[W.key] == "the source has no 'w'"


def test_it_answers_only_what_it_is_asked() -> None:
    assert mapped({"w": torch.zeros(2)}, wanted=[PLAN.ledger[1]]).values.keys() == {M.key}
    found = mapped({}, wanted=[])
    assert (found.values, found.declined) == ({}, {})


def test_a_plan_of_another_kind_has_no_recipes() -> None:
    """A plugin may bring a plan of its own, and a strategy that reads it."""
    found = mapped({"w": torch.zeros(2)}, plan=SimpleNamespace(data=PLAN.data))
    assert found.values == {}
    assert set(found.declined.values()) == {"the plan has no recipes"}


NEGATED = op_call("neg.default", "@w")
KEPT = LedgerRow(slot=M, state=SlotState.FROZEN, value=PinnedRef(name="m"), reason="a literal")
FROZEN = LedgerRow(slot=U, state=SlotState.FROZEN, reason="a literal that nobody needs")
GUARDED = make_plan(
    [call_row(W, 0, "w"), KEPT, FROZEN],
    calls=[NEGATED],
    guards=[guard_of(CallRef(call=0), -torch.ones(2), "bool() of w")],
    pinned={"m": torch.ones(2)},
)


def test_guards_that_hold_change_nothing() -> None:
    found = mapped({"w": torch.ones(2)}, GUARDED, GUARDED.ledger[:2])
    assert found.values.keys() == {W.key, M.key}
    assert found.values[W.key].load().tolist() == [-1.0, -1.0]
    assert (found.values[W.key].sources, found.values[W.key].identity) == (("w",), False)
    assert found.values[M.key].pinned
    assert found.declined == {}


def test_with_a_broken_guard_nothing_is_served_and_frozen_slots_may_differ_too() -> None:
    found = mapped({"w": torch.zeros(2)}, GUARDED, GUARDED.ledger[:1])
    assert found.values == {}
    assert found.declined.keys() == {W.key, M.key, U.key}
    assert "bool() of w" in found.declined[W.key]
    assert "[-1.0, -1.0]" in found.declined[W.key]


def test_further_broken_guards_are_counted() -> None:
    plan = make_plan(
        GUARDED.ledger, calls=[NEGATED], guards=GUARDED.data.guards * 3, pinned={"m": torch.ones(2)}
    )
    assert "and 2 more" in mapped({"w": torch.zeros(2)}, plan).declined[W.key]
