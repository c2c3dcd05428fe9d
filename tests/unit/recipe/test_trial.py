"""Recipes that return other bits than recorded are dropped: a value was changed without an op."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.model import CallRef, SlotState
from refitkit.recipe.record import find_mismatches
from tests.fakes import call_row, leaf_for, make_slot, op_call, pinned_row, recipe_row
from tests.unit.recipe.recorder import agree, like, record, truth

if TYPE_CHECKING:
    from refitkit.model import LedgerRow, OpCall

NAN = float("nan")


def written_by_c(tensor: torch.Tensor, *values: float) -> torch.Tensor:
    """Write to a tensor as a C library does: without an op and without a new tensor version."""
    new = (ctypes.c_float * len(values))(*values)
    ctypes.memmove(tensor.data_ptr(), new, ctypes.sizeof(new))
    return tensor


def leaves() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(6.0) + 1, "b": torch.ones(6)}


def test_a_value_that_a_library_in_c_has_changed_has_no_recipe() -> None:
    def function(w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return written_by_c(w * 2, 0.5, 7.0), w + b, w

    recording = record(function, leaves())
    assert recording.states == {"y0": "unmapped", "y1": "recipe", "y2": "recipe"}
    assert "changed without an op" in recording.rows["y0"].reason
    assert recording.rows["y0"].sources == ()
    assert recording.ops == ["add.Tensor"]  # calls that nothing uses are not in the plan


def test_what_follows_from_such_a_value_has_none_either() -> None:
    def function(w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        derived = w * 2
        before = derived + b
        written_by_c(derived, 0.5)
        return before, derived.neg(), derived.view(2, 3).t()

    recording = record(function, leaves())
    assert recording.states == {"y0": "recipe", "y1": "unmapped", "y2": "unmapped"}


def test_one_bit_is_enough() -> None:
    """The sign of a zero counts, and a NaN equals itself."""
    weights = {"w": torch.tensor([0.0, NAN, 1.0])}
    assert record(lambda w: written_by_c(w * 1, -0.0), weights).state == "unmapped"
    assert record(lambda w: written_by_c(w * 1, 0.0), weights).state == "recipe"


def test_literals_are_what_they_were_last() -> None:
    """Literals are stored as the slots had them, so they cannot mismatch."""

    def function(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return written_by_c(torch.zeros(2), 5.0, 6.0)

    recording = record(function, leaves())
    assert recording.state == "frozen"
    assert agree(recording.values(like(leaves())), truth(function, leaves()))


SLOT = make_slot("s")
KEPT = {"kept": torch.tensor([3.0, 4.0])}


@pytest.mark.parametrize(
    ("row", "calls", "value", "found"),
    [
        (recipe_row(SLOT, "w"), [], [1.0, 2.0], False),
        (recipe_row(SLOT, "w"), [], [1.0, 2.5], True),
        (recipe_row(SLOT, "lacking"), [], [1.0, 2.0], True),
        (pinned_row(SLOT, name="kept"), [], [3.0, 4.0], False),
        (pinned_row(SLOT, name="kept"), [], [3.0, -4.0], True),
        (call_row(SLOT, 0, "w"), [op_call("neg.default", "@w")], [-1.0, -2.0], False),
        (call_row(SLOT, 0, "w"), [op_call("abs.default", "@w")], [-1.0, -2.0], True),
        (call_row(SLOT, 0, "w"), [op_call("reshape.default", "@w", (7,))], [1.0, 2.0], True),
        (recipe_row(SLOT).model_copy(update={"state": SlotState.FROZEN}), [], [9.0, 9.0], False),
    ],
    ids=str,
)
def test_mismatches_are_found(row: LedgerRow, calls: list[OpCall], value: Any, found: bool) -> None:
    tensors, values = {"w": torch.tensor([1.0, 2.0])}, {SLOT.key: torch.tensor(value)}
    leaf = leaf_for(SLOT, fqn="w")
    assert list(find_mismatches([row], calls, [leaf], tensors, KEPT, values)) == [SLOT.key] * found


def test_values_may_lie_in_memory_as_they_like() -> None:
    """A slot's value is flat and may lie in the memory of the leaf."""
    slot, w = make_slot("s", (3, 2)), torch.arange(6.0).view(2, 3)
    turned = op_call("permute.default", "@w", (1, 0), shape=(3, 2))
    for row, calls, value, wrong in (
        (recipe_row(slot, "w"), [], w.view(-1), 0),
        (recipe_row(slot, "w"), [], w.view(-1)[:4], 1),
        (recipe_row(slot, "w"), [], w.t(), 1),
        (recipe_row(slot, "w"), [], w, 0),
        (recipe_row(slot, "w"), [], w.view(torch.int32).view(-1), 1),
        (call_row(slot, 0, "w"), [turned], w.t().reshape(-1), 0),
        (call_row(slot, 0, "w"), [turned], w.view(-1), 1),
        (call_row(slot, 0, "w"), [turned], w.t(), 0),
    ):
        found = find_mismatches(
            [row], calls, [leaf_for(slot, fqn="w")], {"w": w}, {}, {slot.key: value}
        )
        assert len(list(found)) == wrong


def test_what_was_computed_is_not_kept_for_the_next_slot() -> None:
    """Slots are tried one after another, in the order in which recipes share calls."""
    slots = [make_slot(name) for name in ("a", "b")]
    calls = [op_call("neg.default", "@w"), op_call("abs.default", CallRef(call=0))]
    rows = [call_row(slots[0], 0, "w"), call_row(slots[1], 1, "w")]
    values = {slots[0].key: torch.tensor([-1.0, -2.0]), slots[1].key: torch.tensor([1.0, 2.0])}
    leaf, w = leaf_for(slots[0], fqn="w"), {"w": torch.tensor([1.0, 2.0])}
    assert list(find_mismatches(rows, calls, [leaf], w, {}, values)) == []
