"""A plan names what its proof and its layers needed of plugins, and is refused without that."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console

import refitkit
from refitkit.cli.ledger import print_plan
from refitkit.errors import NotRefittableError, PlanMismatchError
from refitkit.model import LayerType, LedgerRow, Need, PinnedRef, SlotState
from refitkit.pipeline import Pipeline
from refitkit.pipeline.targets import PLAN_MEMBER
from refitkit.protocols import Mapped, SlotValue
from refitkit.recipe import RefitPlan
from tests.fakes import BACKEND, FakePlugin
from tests.unit.pipeline.test_mapping import Strategies, Strategy
from tests.unit.pipeline.test_unreached_weights import Losing

if TYPE_CHECKING:
    from pathlib import Path


class Net(torch.nn.Module):
    """A matrix, and a bias whose slot some plugin has to serve."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Net().eval(), (torch.ones(2, 2),))


def unknown(row: LedgerRow) -> LedgerRow:
    """The bias as a constant that nobody saw being made."""
    if row.slot.name != "a.bias":
        return row
    return LedgerRow(slot=row.slot, state=SlotState.UNMAPPED, reason="not seen")


def frozen(row: LedgerRow) -> LedgerRow:
    """The bias as a literal."""
    if row.slot.name != "a.bias":
        return row
    return LedgerRow(slot=row.slot, state=SlotState.FROZEN, value=PinnedRef(name="literal:x"))


def mapper(**more: Any) -> Strategies:
    def answer(request: Any) -> Mapped:
        found = {}
        for row in request.wanted:
            if row.slot.name == "a.bias":
                new = request.source.get("a.bias")
                found[row.slot.key] = SlotValue(row.slot, "bias-map", ("a.bias",), lambda n=new: n)
        return Mapped(found)

    return Strategies(Strategy("bias-map", (), answer=answer, **more), name="mapper")


def weights() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.ones(2, 2), "a.bias": torch.full((2,), 5.0)}


def proved(program: torch.export.ExportedProgram) -> refitkit.CompiledModule:
    """A module whose proof was served by the plugin's strategy."""
    return Pipeline(plugins=[Losing(unknown), mapper(priority=20)]).compile(program, BACKEND)


def test_a_proof_records_the_strategies_that_served_it(
    program: torch.export.ExportedProgram,
) -> None:
    plan = proved(program).plan
    assert plan
    assert [(need.kind, need.name, need.plugin) for need in plan.data.needs] == [
        ("strategy", "bias-map", "mapper"),
        ("strategy", "recipe", "strategies"),
    ]
    assert RefitPlan.from_bytes(plan.to_bytes()).data.needs == plan.data.needs
    unproved = Pipeline(plugins=[FakePlugin()]).compile(program, BACKEND, prove=False)
    assert unproved.plan
    assert unproved.plan.data.needs == ()


def test_without_the_strategy_a_refit_is_refused_and_names_its_plugin(
    program: torch.export.ExportedProgram,
) -> None:
    """Although another strategy has a value for the slot."""
    compiled = proved(program)
    before = compiled.read("a.bias")
    other = Strategies(Strategy("other", {"a.bias"}, priority=20), name="another")
    pipeline = Pipeline(plugins=[FakePlugin(), other])
    for act in (pipeline.refit, pipeline.verify):
        with pytest.raises(PlanMismatchError, match="needs plugins") as info:
            act(compiled, weights())
        (problem,) = info.value.problems
        assert problem.subject == "strategy 'bias-map'"
        assert problem.kind == "missing"
        assert "'mapper'" in problem.wanted
    assert torch.equal(compiled.read("a.bias"), before)
    with_it = Pipeline(plugins=[FakePlugin(), mapper(priority=20)])
    with_it.refit(compiled, weights())
    assert torch.equal(compiled.read("a.bias"), weights()["a.bias"])


def test_settings_that_leave_the_strategy_out_are_refused(
    program: torch.export.ExportedProgram,
) -> None:
    plugins = [Losing(unknown), mapper(priority=20)]
    with pytest.raises(PlanMismatchError, match="left out"):
        Pipeline({"strategies": ["recipe"]}, plugins).refit(proved(program), weights())


def test_a_plan_made_again_for_a_proved_module_keeps_what_it_needs(
    program: torch.export.ExportedProgram,
) -> None:
    compiled = proved(program)
    plugin = Losing(unknown)
    plan = Pipeline(plugins=[plugin]).plan(program, compiled)
    with pytest.raises(PlanMismatchError, match="bias-map"):
        Pipeline(plugins=[plugin]).refit(compiled, weights(), plan=plan)


def test_a_slot_that_the_plan_keeps_is_served_as_in_the_proof(
    program: torch.export.ExportedProgram,
) -> None:
    """The strategy came first then; where it comes last, the plan's own value would be taken."""
    first = Pipeline(plugins=[Losing(frozen), mapper(priority=1)])
    compiled = first.compile(program, BACKEND)
    assert compiled.plan
    assert compiled.plan.data.needs[0].slots == ("a/a.bias",)
    compiled.plan = compiled.plan.noting(unreached={"a.bias": "somebody says so"})
    last = Pipeline(plugins=[FakePlugin(), mapper(priority=20)])
    with pytest.raises(PlanMismatchError, match="other strategies gave the values") as info:
        last.refit(compiled, weights())
    assert [problem.subject for problem in info.value.problems] == ["a/a.bias"]
    first.refit(compiled, weights())


class Layers:
    """A plugin with a layer type."""

    name = "layers"

    @refitkit.hookimpl
    def refitkit_layer_types(self) -> list[LayerType]:
        return [LayerType(name="POOL", interface="IPoolLayer", weights=(("kernel", "KERNEL"),))]


class Layered(FakePlugin):
    """A backend that found weights in layers of two types."""

    def __init__(self) -> None:
        super().__init__()
        draft = self.backend.draft
        self.backend.draft = lambda *args: _with_layers(draft(*args))  # type: ignore[method-assign]


def _with_layers(draft: Any) -> Any:
    return replace(draft, layer_types=("CONSTANT", "POOL"))


def test_layer_types_that_held_weights_are_needed_unless_built_in(
    program: torch.export.ExportedProgram,
) -> None:
    made = Pipeline(plugins=[Layered(), Layers()]).compile(program, BACKEND, prove=False)
    assert made.plan
    assert made.plan.data.needs == (Need(kind="layer type", name="POOL", plugin="layers"),)
    with pytest.raises(PlanMismatchError, match=r"layer type 'POOL': missing.*'layers'"):
        Pipeline(plugins=[Layered()]).refit(made, weights())
    Pipeline(plugins=[Layered(), Layers()]).refit(made, weights())


def test_a_saved_module_shows_what_it_needs(
    program: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    plugin, compiled = FakePlugin(), proved(program)
    assert compiled.plan
    plugin.backend.described = {"backend": BACKEND}
    plugin.backend.attached = {PLAN_MEMBER: compiled.plan.to_bytes()}
    (tmp_path / "saved").touch()
    described = Pipeline(plugins=[plugin]).describe(tmp_path / "saved")
    assert "strategy bias-map of the plugin 'mapper'" in described["needs"]
    json.dumps(described)


def test_a_printed_plan_shows_what_it_needs_and_which_weights_have_no_slot(
    program: torch.export.ExportedProgram,
) -> None:
    plan = proved(program).plan
    assert plan
    console = Console(width=200, record=True, file=io.StringIO())
    print_plan(console, plan.noting(unreached={"a.weight": "only its shape is read"}))
    shown = console.export_text()
    assert "strategy bias-map of the plugin 'mapper'" in shown
    assert "a.weight: only its shape is read" in shown


# -- proofs that fail -----------------------------------------------------------------------------


def test_a_failed_proof_names_the_slots_that_kept_their_old_value(
    program: torch.export.ExportedProgram,
) -> None:
    stale = Strategy(
        "stale",
        (),
        priority=1,
        answer=lambda request: Mapped(
            {
                row.slot.key: SlotValue(row.slot, "stale", ("a.bias",), lambda: old)
                for row in request.wanted
                if row.slot.name == "a.bias"
            }
        ),
    )
    old = program.state_dict["a.bias"].detach().clone()
    with pytest.raises(NotRefittableError, match="kept their old value") as info:
        Pipeline(plugins=[FakePlugin(), Strategies(stale)]).compile(program, BACKEND)
    kept = [one.subject for one in info.value.problems if one.kind == "kept its old value"]
    assert kept == ["a/a.bias"]


def test_where_engines_cannot_be_read_the_error_says_so(
    program: torch.export.ExportedProgram,
) -> None:
    wrong = Strategy(
        "wrong",
        (),
        priority=1,
        answer=lambda request: Mapped(
            {
                row.slot.key: SlotValue(row.slot, "wrong", ("a.bias",), lambda: torch.zeros(2))
                for row in request.wanted
                if row.slot.name == "a.bias"
            }
        ),
    )
    pipeline = Pipeline(plugins=[FakePlugin(), Strategies(wrong)])
    original = program.state_dict["a.bias"].detach().clone()
    assert original.any()
    with pytest.raises(NotRefittableError) as info:
        pipeline.compile(program, BACKEND, {"mute": True})
    assert [one.kind for one in info.value.problems if one.subject == "a"] == [
        "the engine cannot be read, so it does not show which slots kept their old value"
    ]
