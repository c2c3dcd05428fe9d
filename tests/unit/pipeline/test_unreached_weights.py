"""Every weight that a program uses reaches a slot, or the plan says why it need not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.errors import NotRefittableError, UnmappedSlotError
from refitkit.model import LeafKind, LedgerRow, PinnedRef, SlotState, SourceRef
from refitkit.pipeline import Pipeline, needs
from refitkit.protocols import Mapped, SlotValue
from refitkit.recipe import RefitPlan
from tests.fakes import (
    BACKEND,
    FakePlugin,
    guard_of,
    leaf_for,
    make_module,
    make_slot,
    plan_for,
    weights_for,
)
from tests.unit.pipeline.test_mapping import Strategies, Strategy

if TYPE_CHECKING:
    from collections.abc import Callable

    from refitkit.model import PlanData


class Net(torch.nn.Module):
    """Three weights; of the third only the shape is read."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(2, 2)
        self.shape = torch.nn.Linear(2, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + torch.ones_like(self.shape.weight)


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Net().eval(), (torch.ones(2, 2),))


class Losing(FakePlugin):
    """A backend whose draft is changed: as if a converter had made literals of weights."""

    def __init__(self, change: Callable[[LedgerRow], LedgerRow | None]) -> None:
        super().__init__()
        draft = self.backend.draft

        def changed(*args: Any) -> Any:
            made = draft(*args)
            rows = tuple(row for row in map(change, made.rows) if row is not None)
            pinned = {"literal:x": torch.ones(2)}
            return replace(made, rows=rows, pinned=pinned)

        self.backend.draft = changed  # type: ignore[method-assign]


def frozen(row: LedgerRow) -> LedgerRow:
    """The bias as a literal; the weight that only lends its shape as well."""
    if row.slot.name == "a.weight":
        return row
    value = PinnedRef(name="literal:x") if row.slot.name == "a.bias" else None
    return LedgerRow(slot=row.slot, state=SlotState.FROZEN, value=value)


def test_a_weight_without_a_slot_is_an_error_with_its_name(
    program: torch.export.ExportedProgram,
) -> None:
    """Also where a plugin has a strategy that gives no value for it."""
    idle = Strategies(Strategy("idle", ()))
    for plugins in ([Losing(frozen)], [Losing(frozen), idle]):
        with pytest.raises(NotRefittableError, match="reach no slot") as info:
            Pipeline(plugins=plugins).compile(program, BACKEND, prove=False)
        assert [problem.subject for problem in info.value.problems] == ["a.bias"]


def test_offline_it_is_one_where_no_plugin_could_map_it(
    program: torch.export.ExportedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "_has_plugin_strategies", lambda _: False)
    with pytest.raises(NotRefittableError, match="reach no slot") as info:
        Pipeline(plugins=[Losing(frozen)]).plan(program, backend=BACKEND)
    assert [problem.subject for problem in info.value.problems] == ["a.bias"]


def test_the_plan_states_why_a_weight_needs_no_slot(
    program: torch.export.ExportedProgram,
) -> None:
    plugin = Losing(frozen)
    value = program.state_dict["a.bias"].detach()
    guard = guard_of(SourceRef(fqn="a.bias"), value, "bool() of it")
    draft = plugin.backend.draft
    plugin.backend.draft = lambda *args: replace(draft(*args), guards=(guard,))  # type: ignore[method-assign]
    plan = Pipeline(plugins=[plugin]).plan(program, backend=BACKEND)
    assert list(plan.data.unreached) == ["a.bias"]
    assert "guard" in plan.data.unreached["a.bias"]
    assert RefitPlan.from_bytes(plan.to_bytes()).data.unreached == plan.data.unreached


def test_slots_of_unknown_origin_may_hold_it(program: torch.export.ExportedProgram) -> None:
    def unknown(row: LedgerRow) -> LedgerRow:
        found = frozen(row)
        state = SlotState.UNMAPPED if row.slot.name == "a.bias" else found.state
        return (
            found.model_copy(update={"state": state, "value": None})
            if (state is SlotState.UNMAPPED)
            else found
        )

    plan = Pipeline(plugins=[Losing(unknown)]).plan(program, backend=BACKEND)
    assert "a.bias" not in plan.data.unreached


# -- at the refit ---------------------------------------------------------------------------------


def scene(*plugins: object, **fields: Any) -> tuple[Pipeline, Any, dict[str, torch.Tensor]]:
    """A module with the weight ``lost`` in its plan, which no row follows from."""
    module, pipeline = make_module(1), Pipeline(plugins=[FakePlugin(), *plugins])
    slot = make_slot("lost")
    plan = plan_for(module)
    lost = leaf_for(slot, fields.pop("kind", LeafKind.PARAMETER))
    leaves = (*plan.data.leaves, lost.model_copy(update=fields.pop("leaf", {})))
    compiled = pipeline.load(module)
    compiled.plan = plan.noting(leaves=leaves, **fields)
    return pipeline, compiled, {**weights_for(module, 1.0), "lost": torch.ones(2)}


def lost_in(pipeline: Pipeline, compiled: Any, weights: Any, **how: Any) -> list[str]:
    before = {slot.name: compiled.read(slot.name) for slot in compiled.slots}
    with pytest.raises(UnmappedSlotError, match="old values") as info:
        pipeline.refit(compiled, weights, verify="none", **how)
    assert all(torch.equal(compiled.read(name), value) for name, value in before.items())
    return [problem.subject for problem in info.value.problems]


def test_a_refit_names_a_weight_that_reaches_no_slot() -> None:
    assert lost_in(*scene()) == ["lost"]


def test_so_does_a_refit_in_part_that_has_it() -> None:
    pipeline, compiled, weights = scene()
    (other,) = [name for name in weights if name.endswith("bias")]
    given = {"lost": weights["lost"], other: weights[other]}
    assert lost_in(pipeline, compiled, given, partial=True) == ["lost"]
    del given["lost"]
    assert pipeline.refit(compiled, given, partial=True).report.outcome == "committed"


def test_so_does_verify() -> None:
    pipeline, compiled, weights = scene()
    with pytest.raises(UnmappedSlotError, match="lost"):
        pipeline.verify(compiled, weights)


ALLOWED: dict[str, dict[str, Any]] = {
    "stated": {"unreached": {"lost": "only its shape is read"}},
    "guarded": {"guards": (guard_of(SourceRef(fqn="lost"), torch.ones(2), "bool() of it"),)},
    "not used": {"leaf": {"used": False}},
    "without elements": {"leaf": {"shape": (0,)}},
    "kept by the plan": {"kind": LeafKind.NON_PERSISTENT_BUFFER},
}


@pytest.mark.parametrize("why", ALLOWED)
def test_where_it_need_not_the_refit_goes_on(why: str) -> None:
    pipeline, compiled, weights = scene(**ALLOWED[why])
    if why in {"not used", "without elements", "kept by the plan"}:
        del weights["lost"]
    if why == "without elements":
        weights["lost"] = torch.ones(0)
    assert pipeline.refit(compiled, weights).report.outcome == "committed"


def test_another_name_of_the_tensor_is_enough() -> None:
    pipeline, compiled, weights = scene()
    plan: RefitPlan = compiled.plan
    data: PlanData = plan.data
    bias = next(leaf for leaf in data.leaves if leaf.fqn.endswith("bias"))
    leaves = [
        bias.model_copy(update={"fqn": "lost"}) if leaf.fqn == "lost" else leaf
        for leaf in data.leaves
    ]
    compiled.plan = plan.noting(ties=((bias.fqn, "lost"),), leaves=tuple(leaves))
    weights["lost"] = weights[bias.fqn]
    assert pipeline.refit(compiled, weights).report.outcome == "committed"


def test_a_strategy_that_puts_it_into_a_slot_is_enough() -> None:
    def answer(request: Any) -> Mapped:
        row = next(one for one in request.wanted if one.slot.name.endswith("bias"))
        new = request.source.get("lost")
        return Mapped({row.slot.key: SlotValue(row.slot, "mine", ("lost",), lambda: new)})

    mine = Strategy("mine", (), priority=1, answer=answer)
    pipeline, compiled, weights = scene(Strategies(mine))
    assert pipeline.refit(compiled, weights).report.outcome == "committed"
