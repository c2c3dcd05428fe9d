"""Proofs by trial clear values that nobody saw being made, or name them where they fail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit import hookimpl
from refitkit.errors import NotRefittableError
from refitkit.model import LeafKind
from refitkit.pipeline import Pipeline
from refitkit.pipeline.proof import Proof
from refitkit.protocols import Mapped, SlotValue
from tests.fakes import BACKEND, leaf_for, make_plan, make_slot, recipe_row
from tests.unit.pipeline.test_mapping import Strategies, Strategy
from tests.unit.pipeline.test_needs import Net
from tests.unit.pipeline.test_unreached_weights import Losing

if TYPE_CHECKING:
    from refitkit.model import LedgerRow

UNSEEN = "nobody saw it"
BIAS = "a/a.bias"


class Listener:
    """Collects the texts of all events."""

    name = "listener"

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    @hookimpl
    def refitkit_event(self, event: Any) -> None:
        self._texts.append(str(event))


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Net().eval(), (torch.ones(2, 2),))


def unseen(row: LedgerRow) -> LedgerRow:
    mark: dict[str, Any] = {"unseen": True, "reason": UNSEEN}
    return row.model_copy(update=mark) if row.slot.name == "a.bias" else row


def wrong() -> Strategies:
    """A plugin that gives the bias zeros, whatever the weights are."""

    def answer(request: Any) -> Mapped:
        return Mapped(
            {
                row.slot.key: SlotValue(row.slot, "wrong", ("a.bias",), lambda: torch.zeros(2))
                for row in request.wanted
                if row.slot.name == "a.bias"
            }
        )

    return Strategies(Strategy("wrong", (), priority=1, answer=answer))


def test_without_a_proof_the_mark_stays(program: torch.export.ExportedProgram) -> None:
    steps: list[str] = []
    pipeline = Pipeline(plugins=[Losing(unseen), Listener(steps)])
    compiled = pipeline.compile(program, BACKEND, prove=False)
    assert compiled.plan
    assert compiled.plan.data.unseen == [BIAS]
    assert [text for text in steps if "made outside of torch" in text and BIAS in text]


def test_a_proof_that_passes_clears_it(program: torch.export.ExportedProgram) -> None:
    steps: list[str] = []
    pipeline = Pipeline(plugins=[Losing(unseen), Listener(steps)])
    compiled = pipeline.compile(program, BACKEND)
    assert compiled.plan
    assert compiled.plan.data.unseen == []
    (row,) = [row for row in compiled.plan.ledger if row.slot.name == "a.bias"]
    assert "proof by trial" in row.reason
    assert not [text for text in steps if "made outside of torch" in text]


def test_a_plan_made_again_for_a_proved_module_is_clear_too(
    program: torch.export.ExportedProgram,
) -> None:
    pipeline = Pipeline(plugins=[Losing(unseen)])
    compiled = pipeline.compile(program, BACKEND)
    again = pipeline.plan(program, compiled)
    assert compiled.plan
    assert again.ledger == compiled.plan.ledger
    assert again.data.needs == compiled.plan.data.needs
    other = pipeline.compile(program, BACKEND, prove=False)
    assert pipeline.plan(program, other).data.unseen == [BIAS]


def test_a_proof_that_fails_names_it_where_engines_cannot_be_read(
    program: torch.export.ExportedProgram,
) -> None:
    with pytest.raises(NotRefittableError) as info:
        Pipeline(plugins=[Losing(unseen), wrong()]).compile(program, BACKEND, {"mute": True})
    first = info.value.problems[0]
    assert (first.subject, first.kind, first.hint) == (BIAS, "may hold a weight", UNSEEN)


@pytest.mark.parametrize(
    ("dtype", "kind", "used", "cleared"),
    [
        ("float16", LeafKind.PARAMETER, True, True),
        ("int64", LeafKind.BUFFER, True, False),
        ("float8_e4m3fn", LeafKind.PARAMETER, True, False),
        ("int64", LeafKind.BUFFER, False, True),
        ("int64", LeafKind.CONSTANT, True, True),
    ],
)
def test_what_a_proof_does_not_move_proves_nothing(
    dtype: str, kind: LeafKind, used: bool, cleared: bool
) -> None:
    bias = make_slot("a.bias")
    leaf = leaf_for(make_slot("other", dtype=dtype), kind).model_copy(update={"used": used})
    plan = make_plan([unseen(recipe_row(bias))], leaves=[leaf_for(bias), leaf])
    assert plan.data.unseen
    assert bool(Proof().noted_in(plan).data.unseen) is not cleared
    assert Proof("no inputs").noted_in(plan).data.unseen
