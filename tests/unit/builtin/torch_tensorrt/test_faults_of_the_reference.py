"""Faults of the reference that show without it: docs/explanation/differences.md."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit import Pipeline
from refitkit.errors import (
    NotRefittableError,
    PlanMismatchError,
    RefitError,
    UnmappedSlotError,
)
from refitkit.model import LedgerRow, SlotState, Step
from refitkit.recipe import TensorMap
from tests.fakes import (
    FakeModule,
    FakePlugin,
    OpenEngine,
    TrippingPlugin,
    Tripwire,
    make_module,
    make_plan,
    plan_for,
    same_state,
)
from tests.unit.builtin.torch_tensorrt.scenes import Opener, TrtModule, expected, weights_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from refitkit.protocols import SlotValue

RUNTIMES = ("python", "cpp")


class Weights(TensorMap):
    """Weights that come in a program."""

    program = SimpleNamespace()


class Rebuilt(TrtModule):
    """A module whose weights can be read off a program, if that goes well."""

    rebuild: Callable[[], Any]

    def rebuilt(self, *_: Any) -> Any:
        return self.rebuild()


def out_of_memory() -> Any:
    raise RuntimeError("out of memory")


def all_but_one() -> Any:
    values: dict[str, dict[str, torch.Tensor]] = {}
    for path, value in expected(1).items():
        engine, _, slot = path.partition("/")
        values.setdefault(engine, {})[slot] = value
    values["e1"].popitem()
    return values


@pytest.mark.parametrize(
    ("rebuild", "kind"), [(out_of_memory, RefitError), (all_but_one, PlanMismatchError)]
)
def test_failures_of_a_rebuild_are_raised_and_change_nothing(
    rebuild: Callable[[], Any], kind: type[RefitError]
) -> None:
    """2.11 swallows them; a weight that is not found keeps its old value, with a warning."""
    module = Rebuilt(RUNTIMES, Tripwire())
    module.rebuild = rebuild
    pipeline = Pipeline({"strategies": ("rebuild",)}, plugins=[Opener()])
    with pytest.raises(kind):
        pipeline.refit(pipeline.load(module), Weights(weights_of(1)), verify="none")
    assert same_state(module.holds(), expected(0))


def test_a_refit_in_part_that_reaches_no_slot_is_refused() -> None:
    """It would be committed with nothing written, and say that the weights were the same."""
    module = make_module(1)
    rows = [
        LedgerRow(slot=row.slot, state=SlotState.UNMAPPED, reason="not recorded")
        for row in plan_for(module).ledger
    ]
    plan = make_plan(rows, leaves=plan_for(module).data.leaves)
    compiled = Pipeline(plugins=[FakePlugin()]).load(module)
    with pytest.raises(UnmappedSlotError, match="Pass all weights") as info:
        refitkit.refit(compiled, {"e0.bias": torch.ones(2)}, plan=plan, partial=True)
    assert {p.subject for p in info.value.problems} == {"e0.bias", "e0/e0.bias", "e0/e0.weight"}
    assert compiled.version == 0


# ---- a compiler that drops a weight -------------------------------------------------------------


class Forgetful(OpenEngine):
    """A refit leaves its biases out."""

    def _stage(self, values: Sequence[SlotValue]) -> Any:
        return super()._stage([one for one in values if "bias" not in one.slot.name])


class Dropping(FakePlugin):
    """A compiler that makes one kind of engine of all parts, and may spoil what is in them."""

    def __init__(self, kind: type[OpenEngine], *, spoil: bool = False) -> None:
        super().__init__()
        plain = self.backend.compile

        def compile_(*args: Any) -> FakeModule:
            module = plain(*args)
            engines = [kind(one.name, one.live) for one in module.engines.values()]
            if spoil:
                for engine in engines:
                    engine.live = {k: v * ("bias" not in k) for k, v in engine.live.items()}
            return FakeModule(engines, answer=module.answer)

        self.backend.compile = compile_  # type: ignore[method-assign]


def program() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(torch.nn.Sequential(torch.nn.Linear(3, 2)), (torch.ones(1, 3),))


def test_a_bias_that_a_refit_does_not_reach_is_found_at_once() -> None:
    """TensorRT may drop a bias that was refittable: the trial refit of ``compile`` shows it."""
    with pytest.raises(NotRefittableError, match="answers wrongly"):
        Pipeline(plugins=[Dropping(Forgetful)]).compile(program(), "fake")
    assert Pipeline(plugins=[Dropping(OpenEngine)]).compile(program(), "fake").version == 0


def test_an_engine_that_is_wrong_from_the_start_is_told_of() -> None:
    """TensorRT 11.3: REFIT may drop the bias of a matrix product before any refit."""
    ear = TrippingPlugin(Tripwire())
    Pipeline(plugins=[Dropping(OpenEngine, spoil=True), ear]).compile(program(), "fake")
    steps = [event.text for event in ear.events if isinstance(event, Step)]
    assert any("not the program with its own weights" in text for text in steps)


def test_a_refit_of_an_engine_that_is_wrong_is_refused_by_its_outputs() -> None:
    compiled = Pipeline(plugins=[Dropping(Forgetful)]).compile(program(), "fake", prove=False)
    other = {name: value + 1 for name, value in program().state_dict.items()}
    with pytest.raises(refitkit.VerificationError):
        refitkit.refit(compiled, other, inputs=(torch.ones(1, 3),))
