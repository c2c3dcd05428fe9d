"""The verbs on a backend in memory: compile, load, plan, refit, verify, describe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit import api
from refitkit.config import Config
from refitkit.errors import (
    ConfigError,
    NotRefittableError,
    PlanMismatchError,
    PluginError,
    RefitInProgressError,
    UnmappedSlotError,
    UnsupportedTargetError,
    VerificationError,
    WeightMismatchError,
)
from refitkit.model import LeafKind, SlotState, SourceRef, Step, VerificationResult
from refitkit.pipeline import CompiledModule, Pipeline
from refitkit.pipeline.targets import PLAN_MEMBER, PROGRAM_MEMBER
from refitkit.recipe import RefitPlan
from tests.fakes import (
    BACKEND,
    FakeBackend,
    FakeModule,
    FakePlugin,
    KeyedPlugin,
    OpenEngine,
    TrippingPlugin,
    Tripwire,
    call_row,
    guard_of,
    leaf_for,
    make_module,
    make_plan,
    op_call,
    plan_for,
    recipe_row,
    same_state,
    weights_for,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from refitkit.protocols import VerifyRequest


class Net(torch.nn.Module):
    """Two children, so two engines."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 4)
        self.second = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


X = torch.arange(6.0).reshape(2, 3)


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Net().eval(), (X,))


@pytest.fixture(scope="module")
def other() -> Net:
    torch.manual_seed(1)
    return Net().eval()


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline(plugins=[FakePlugin()])


# -- plugins and settings ---------------------------------------------------------------------


def test_a_pipeline_takes_plain_settings() -> None:
    assert Pipeline({"check_finite": False}).config == Config(check_finite=False)
    with pytest.raises(ConfigError, match="chek"):
        Pipeline({"chek": 1})


def test_backends_are_found_by_name(pipeline: Pipeline) -> None:
    assert pipeline.backend(BACKEND) is pipeline.backends[BACKEND]
    assert "aotinductor" in pipeline.backends
    with pytest.raises(ConfigError, match="'typo'") as info:
        pipeline.backend("typo")
    assert "aotinductor, fake" in info.value.hint


def test_backends_are_registered_once() -> None:
    calls = []

    class Counting(FakePlugin):
        @refitkit.hookimpl
        def refitkit_register_backends(self, register: Callable[[Any], None]) -> None:
            calls.append(1)
            register(self.backend)

    pipeline = Pipeline(plugins=[Counting()])
    assert calls == []  # not before one is needed
    _ = pipeline.backends, pipeline.backends
    assert calls == [1]


class Registering:
    """A plugin that registers these backends."""

    def __init__(self, name: str, *backends: Any) -> None:
        self.name, self.given = name, backends

    @refitkit.hookimpl
    def refitkit_register_backends(self, register: Callable[[Any], None]) -> None:
        for backend in self.given:
            register(backend)


def test_two_backends_of_one_name_name_both_plugins() -> None:
    plugins = [Registering("p", FakeBackend()), Registering("q", FakeBackend())]
    with pytest.raises(PluginError, match=r"'p' and 'q' both offer 'fake'.*register_backends"):
        _ = Pipeline(plugins=plugins).backends


def test_one_plugin_with_two_backends_of_one_name() -> None:
    with pytest.raises(PluginError, match="'p' and 'p' both offer 'fake'"):
        _ = Pipeline(plugins=[Registering("p", FakeBackend(), FakeBackend())]).backends


def test_a_backend_without_a_name() -> None:
    with pytest.raises(PluginError, match=r"'p'.*without a name"):
        _ = Pipeline(plugins=[Registering("p", object())]).backends


def test_a_plugin_that_fails_to_register_a_backend() -> None:
    class Failing(Registering):
        @refitkit.hookimpl
        def refitkit_register_backends(self, register: Callable[[Any], None]) -> None:
            raise OSError("no")

    with pytest.raises(PluginError, match=r"'p'.*refitkit_register_backends.*OSError"):
        _ = Pipeline(plugins=[Failing("p")]).backends


# -- compile ----------------------------------------------------------------------------------


def test_compile_plans_and_keeps_the_program(
    pipeline: Pipeline, program: torch.export.ExportedProgram
) -> None:
    compiled = pipeline.compile(program, BACKEND)
    assert torch.equal(compiled(X), program.module()(X))
    assert isinstance(compiled.plan, RefitPlan)
    assert {row.state for row in compiled.plan.ledger} == {SlotState.RECIPE}
    assert compiled.plan.backend == BACKEND
    assert compiled.plan.data.fingerprint.settings == {"mode": "fake"}
    assert compiled.program is not None
    assert compiled.version == 0
    assert repr(compiled) == "<CompiledModule fake, 4 slots, weights version 0>"


def test_compile_hands_options_on(
    pipeline: Pipeline, program: torch.export.ExportedProgram
) -> None:
    with pytest.raises(ConfigError, match="typo"):
        pipeline.compile(program, BACKEND, {"typo": 1})


@pytest.mark.parametrize("thing", [None, Net(), "path", 3], ids=["none", "module", "str", "int"])
def test_only_programs_are_compiled_and_planned(pipeline: Pipeline, thing: Any) -> None:
    for verb in (pipeline.compile, pipeline.plan):
        with pytest.raises(UnsupportedTargetError, match=type(thing).__name__) as info:
            verb(thing)
        assert "torch.export.export" in info.value.hint


def test_a_program_that_cannot_be_kept_is_told(
    program: torch.export.ExportedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    from refitkit.program import KeptProgram

    monkeypatch.setattr(KeptProgram, "of", classmethod(lambda cls, program: None))
    plugin = TrippingPlugin(Tripwire())
    compiled = Pipeline(plugins=[FakePlugin(), plugin]).compile(program, BACKEND)
    assert compiled.program is None
    assert ["reference=" in e.text for e in plugin.events if isinstance(e, Step)] == [True]


def test_the_reference_is_the_kept_program(
    pipeline: Pipeline, program: torch.export.ExportedProgram, other: Net
) -> None:
    compiled = pipeline.compile(program, BACKEND, {"mute": True})
    report = pipeline.refit(compiled, other.state_dict(), inputs=(X,)).report
    assert report.verification is not None
    assert report.verification.ok
    assert report.verification.max_abs_error == 0
    assert torch.equal(compiled(X), other(X))


def test_the_reference_of_a_partial_refit_has_new_and_old_weights(
    pipeline: Pipeline, program: torch.export.ExportedProgram, other: Net
) -> None:
    compiled = pipeline.compile(program, BACKEND)
    part = {"first.bias": other.first.bias}
    report = pipeline.refit(compiled, part, inputs=(X,), partial=True).report
    assert report.verification is not None
    assert (report.verification.ok, report.verification.max_abs_error) == (True, 0.0)
    wanted = Net().eval()
    wanted.load_state_dict({**program.state_dict, **part})
    assert torch.equal(compiled(X), wanted(X))


def test_a_partial_refit_that_would_be_judged_by_nothing_is_refused(
    pipeline: Pipeline, program: torch.export.ExportedProgram, other: Net
) -> None:
    compiled = pipeline.compile(program, BACKEND, {"mute": True})
    with pytest.raises(NotRefittableError):
        pipeline.refit(compiled, {"first.bias": other.first.bias}, inputs=(X,), partial=True)


# -- load and save ----------------------------------------------------------------------------


def test_saving_attaches_plan_and_program(
    pipeline: Pipeline, program: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    compiled = pipeline.compile(program, BACKEND)
    compiled.save(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved").read_text())["attachments"] == sorted(
        [PLAN_MEMBER, PROGRAM_MEMBER]
    )
    again = pipeline.load(compiled.opened)
    assert again.plan is not None
    assert compiled.plan is not None
    assert again.plan.data == compiled.plan.data
    assert again.program is not None
    assert compiled.program is not None
    assert again.program.to_bytes() == compiled.program.to_bytes()


def test_a_module_without_attachments_has_no_plan(pipeline: Pipeline, tmp_path: Path) -> None:
    module = make_module()
    module.attachments = {}
    compiled = pipeline.load(module)
    assert (compiled.plan, compiled.program) == (None, None)
    compiled.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved").read_text())["attachments"] == []


def test_a_damaged_plan_inside_a_module(pipeline: Pipeline) -> None:
    module = make_module()
    module.attachments = {PLAN_MEMBER: b"damaged"}
    with pytest.raises(PlanMismatchError, match="the plan of this module"):
        pipeline.load(module)


# -- plan -------------------------------------------------------------------------------------


def test_a_plan_for_a_target(
    pipeline: Pipeline, program: torch.export.ExportedProgram, other: Net
) -> None:
    compiled = pipeline.compile(program, BACKEND)
    plan = pipeline.plan(program, compiled)
    assert compiled.plan is not None
    assert plan.data == compiled.plan.data
    assert pipeline.refit(compiled, other, plan=plan).report.outcome == "committed"


def test_a_plan_offline(pipeline: Pipeline, program: torch.export.ExportedProgram) -> None:
    plan = pipeline.plan(program, backend=BACKEND)
    assert [row.slot.engine for row in plan.ledger] == ["first"] * 2 + ["second"] * 2
    plan.check_engines(BACKEND, pipeline.compile(program, BACKEND).slots)


def test_a_plan_for_nothing(pipeline: Pipeline, program: torch.export.ExportedProgram) -> None:
    with pytest.raises(ConfigError, match="target"):
        pipeline.plan(program)


def test_a_plan_for_a_module_of_another_program(
    pipeline: Pipeline, program: torch.export.ExportedProgram
) -> None:
    with pytest.raises(PlanMismatchError):
        pipeline.plan(program, make_module(2))


def test_a_module_without_a_plan_keeps_the_one_that_is_made(
    pipeline: Pipeline, program: torch.export.ExportedProgram
) -> None:
    opened = pipeline.compile(program, BACKEND).opened
    assert isinstance(opened, FakeModule)
    opened.attachments = {}
    compiled = pipeline.load(opened)
    plan = pipeline.plan(program, compiled)
    assert compiled.plan is plan
    assert compiled.program is not None
    assert pipeline.plan(program, compiled) is not plan
    assert compiled.plan is plan


def test_a_plan_opens_what_the_pipeline_opens(
    pipeline: Pipeline, program: torch.export.ExportedProgram, other: Net
) -> None:
    plan = pipeline.plan(program, backend=BACKEND)
    found = plan.materialize(other)["first"]
    assert torch.equal(found["first.weight"], other.first.weight)


def test_planning_and_compiling_change_nothing(pipeline: Pipeline) -> None:
    model = Net().eval()
    program = torch.export.export(model, (X,))
    before = {k: v.detach().clone() for k, v in model.state_dict().items()}
    text = program.graph.python_code("self").src
    flags = {k: v.requires_grad for k, v in model.named_parameters()}
    with torch.enable_grad():
        compiled = pipeline.compile(program, BACKEND)
        pipeline.plan(program, compiled)
        pipeline.refit(compiled, {k: v + 1 for k, v in before.items()}, inputs=(X,))
        assert torch.is_grad_enabled()
    assert same_state({k: v.detach() for k, v in model.state_dict().items()}, before)
    assert same_state({k: v.detach() for k, v in program.state_dict.items()}, before)
    assert program.graph.python_code("self").src == text
    assert {k: v.requires_grad for k, v in model.named_parameters()} == flags
    assert all(p.requires_grad for p in program.parameters())


# -- verify -----------------------------------------------------------------------------------


def test_verify_tells_whether_weights_are_held(pipeline: Pipeline) -> None:
    module = make_module(2)
    compiled = pipeline.load(module)
    new = weights_for(module, 1.0)
    pipeline.refit(compiled, new)
    before = module.holds()
    result = pipeline.verify(compiled, new)
    assert (result.verifier, result.ok, len(result.measures)) == ("weights", True, 4)
    new["e1.bias"] = new["e1.bias"] + 1
    with pytest.raises(VerificationError) as info:
        pipeline.verify(compiled, new)
    assert [p.subject for p in info.value.problems] == ["e1.bias"]
    assert info.value.report.measures[3].max_abs_error == 1.0
    assert same_state(module.holds(), before)
    assert compiled.version == 1


def test_verify_by_outputs(
    pipeline: Pipeline, program: torch.export.ExportedProgram, other: Net
) -> None:
    compiled = pipeline.compile(program, BACKEND)
    assert pipeline.verify(compiled, program.state_dict, inputs=(X,)).verifier == "outputs"
    with pytest.raises(VerificationError):
        pipeline.verify(compiled, other, inputs=(X,))
    assert pipeline.verify(compiled, other, inputs=(X,), reference=compiled(X)).ok


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"e0.weight": torch.ones(2, 3)},
        {"e0.weight": torch.ones(3, 2), "e0.bias": torch.ones(2)},
    ],
    ids=["none", "some", "wrong shape"],
)
def test_verify_refuses_weights_of_another_model(
    pipeline: Pipeline, weights: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(WeightMismatchError):
        pipeline.verify(make_module(1), weights)


def test_no_refit_and_no_call_comes_between_preparation_and_verdict() -> None:
    """A verifier copies state while it prepares, and the module answers from that state."""
    module = make_module(1)
    weights = weights_for(module, 1.0)
    alone: list[int] = []

    class Verifier:
        name = "trying"

        def prepare(self, _: VerifyRequest) -> Callable[[object], VerificationResult]:
            alone.append(len(compiled.gate._commit_turns))
            with pytest.raises(RefitInProgressError):
                pipeline.refit(compiled, weights, verify="none")
            return lambda _: VerificationResult(verifier=self.name, ok=True)

    class Verifying:
        name = "verifying"

        @refitkit.hookimpl
        def refitkit_verifiers(self) -> list[Verifier]:
            return [Verifier()]

    pipeline = Pipeline(plugins=[FakePlugin(), Verifying()])
    compiled = pipeline.load(module)
    pipeline.verify(compiled, weights, with_="trying")
    assert (alone, compiled.version) == ([1], 0)


def test_verify_needs_a_plan_and_something_to_look_at(pipeline: Pipeline) -> None:
    module = make_module(1)
    weights = dict(module.engines["e0"].live.items())
    with pytest.raises(ConfigError, match="verified"):
        pipeline.verify(module, weights, with_="none")
    with pytest.raises(PlanMismatchError):
        pipeline.verify(module, weights, plan=plan_for(make_module(2)))
    module.attachments = {}
    with pytest.raises(ConfigError, match="plan"):
        pipeline.verify(module, weights)
    assert pipeline.verify(module, weights, plan=plan_for(module)).ok


# -- describe ---------------------------------------------------------------------------------


def test_describe_asks_the_backends(tmp_path: Path) -> None:
    plugin, file = FakePlugin(), tmp_path / "saved"
    pipeline = Pipeline(plugins=[plugin])
    with pytest.raises(UnsupportedTargetError, match="no file"):
        pipeline.describe(file)
    with pytest.raises(UnsupportedTargetError, match="not a saved module"):
        pipeline.describe(tmp_path)
    file.write_bytes(b"something")
    with pytest.raises(UnsupportedTargetError, match="not a saved module"):
        pipeline.describe(str(file))
    plugin.backend.described = {"kind": "fake"}
    assert pipeline.describe(str(file)) == {"kind": "fake"}


def test_a_plan_is_read_from_a_plan_file_or_a_saved_module(tmp_path: Path) -> None:
    plugin, file, module = FakePlugin(), tmp_path / "saved", make_module()
    pipeline = Pipeline(plugins=[plugin])
    plan = plan_for(module)
    plan.save(file)
    assert pipeline.read_plan(file).data == plan.data
    file.write_bytes(b"a saved module")
    with pytest.raises(PlanMismatchError):
        pipeline.read_plan(file)
    plugin.backend.attached = {PLAN_MEMBER: plan.to_bytes()}
    assert pipeline.read_plan(str(file)).data == plan.data
    with pytest.raises(PlanMismatchError):
        pipeline.read_plan(tmp_path / "missing")


# -- the handle -------------------------------------------------------------------------------


def test_reading_gives_a_copy(pipeline: Pipeline) -> None:
    module = make_module(2)
    compiled = pipeline.load(module)
    compiled.read("e1.bias").fill_(7.0)
    assert compiled.read("e1.bias").tolist() == [0.0, 1.0]
    assert compiled.read("e1.bias", engine="e1").tolist() == [0.0, 1.0]


def test_reading_what_is_not_there(pipeline: Pipeline) -> None:
    compiled = pipeline.load(make_module(2))
    for slot, engine in (("typo", None), ("e1.bias", "e0"), ("e1.bias", "typo")):
        with pytest.raises(KeyError, match=slot):
            compiled.read(slot, engine)


def test_a_module_can_be_used_as_a_target_of_every_verb(pipeline: Pipeline) -> None:
    module = make_module(1)
    assert isinstance(pipeline.refit(module, weights_for(module, 3.0)).module, CompiledModule)


def test_a_call_is_handed_on() -> None:
    module = make_module(1)
    module.answer = lambda module, *args, **kwargs: (args, kwargs)
    compiled = Pipeline(plugins=[FakePlugin()]).load(module)
    assert compiled(1, 2, a=3) == ((1, 2), {"a": 3})


def test_freeing_the_spare(pipeline: Pipeline) -> None:
    compiled = pipeline.load(make_module(3))
    assert compiled.free_spare() == 0
    pipeline.refit(compiled, weights_for(compiled.opened, 5.0))
    assert compiled.free_spare() == sum(slot.nbytes for slot in compiled.slots)
    assert compiled.free_spare() == 0


def test_copying_and_freeing_are_refused_inside_a_refit(pipeline: Pipeline) -> None:
    seen: list[type[BaseException]] = []

    class Meddler:
        name = "meddler"

        @refitkit.hookimpl
        def refitkit_weights_changed(self) -> None:
            for action in (compiled.free_spare, lambda: pipeline.copy(compiled)):
                with pytest.raises(RefitInProgressError) as info:
                    action()
                seen.append(info.type)

    pipeline = Pipeline(plugins=[FakePlugin(), Meddler()])
    module = make_module(1)
    compiled = pipeline.load(module)
    pipeline.refit(compiled, weights_for(module, 3.0))
    assert len(seen) == 2


# -- plain functions --------------------------------------------------------------------------


def test_the_plain_functions_run_on_one_pipeline(
    monkeypatch: pytest.MonkeyPatch,
    program: torch.export.ExportedProgram,
    other: Net,
    tmp_path: Path,
) -> None:
    plugin = FakePlugin()
    pipeline = Pipeline(plugins=[plugin])
    monkeypatch.setattr(api, "_pipeline", lambda: pipeline)
    compiled = refitkit.compile(program, BACKEND, options={"mute": False})
    plan = refitkit.plan(program, target=compiled)
    offline = refitkit.plan(program, backend=BACKEND)
    assert offline.data == plan.noting(needs=()).data  # nothing was proved of this one
    result = refitkit.refit(compiled, other, plan=plan, inputs=(X,), verify="outputs")
    assert result.module is compiled
    assert refitkit.verify(compiled, other).ok
    assert refitkit.load(compiled.opened).backend == BACKEND
    (tmp_path / "saved").touch()
    plugin.backend.described = {"kind": "fake"}
    assert refitkit.inspect(tmp_path / "saved") == {"kind": "fake"}


def test_a_saved_module_may_be_a_folder(tmp_path: Path) -> None:
    plugin = FakePlugin()
    plan = plan_for(make_module(1))
    plugin.backend.described, plugin.backend.attached = {"a": 1}, {PLAN_MEMBER: plan.to_bytes()}
    pipeline = Pipeline(plugins=[plugin])
    assert pipeline.describe(tmp_path) == {"a": 1}
    assert pipeline.read_plan(tmp_path).data == plan.data


# -- plans with guards ------------------------------------------------------------------------


def test_a_guard_that_the_trial_breaks_is_no_fault_of_the_module() -> None:
    """Other weights change what decided on the engines: nothing is proved, nothing refuted."""
    plugin, listener = KeyedPlugin(), TrippingPlugin(Tripwire())
    pipeline = Pipeline(plugins=[plugin, listener])
    torch.manual_seed(0)
    program = torch.export.export(Net().eval(), (X,))
    bias = program.state_dict["first.bias"]
    plugin.keyed.guards = (guard_of(SourceRef(fqn="first.bias"), bias),)
    compiled = pipeline.compile(program, BACKEND)
    texts = [event.text for event in listener.events if isinstance(event, Step)]
    assert any("no proof by trial: other weights change values" in text for text in texts)
    assert torch.equal(compiled.read("first.bias"), bias)


def test_a_saved_plan_with_calls_refits_after_loading() -> None:
    """The plan inside a module: recipes, guards and kept values."""
    module = FakeModule([OpenEngine("e0", {"scale": torch.zeros(2), "w": torch.zeros(2)})])
    scale, w = module.engines["e0"].slots.values()
    leaves = [leaf_for(w), leaf_for(scale, LeafKind.NON_PERSISTENT_BUFFER, "eps")]
    plan = make_plan(
        [call_row(scale, 0, "w", "eps"), recipe_row(w)],
        leaves=leaves,
        calls=[op_call("add.Tensor", "@w", "@eps")],
        guards=[guard_of(SourceRef(fqn="eps"), torch.full((2,), 5.0))],
        pinned={"eps": torch.full((2,), 5.0)},
    )
    module.attachments = {PLAN_MEMBER: plan.to_bytes()}
    pipeline = Pipeline(plugins=[FakePlugin()])
    compiled = pipeline.load(module)
    assert compiled.plan is not None
    assert compiled.plan.data == plan.data
    for delta in (False, True, True):
        pipeline.refit(compiled, {"w": torch.ones(2)}, delta=delta)
        assert compiled.read("scale").tolist() == [6.0, 6.0]
    with pytest.raises(UnmappedSlotError):
        pipeline.refit(compiled, {"w": torch.ones(2), "eps": torch.zeros(2)})


@pytest.mark.parametrize("rollback", [True, False])
def test_a_proof_that_fails_says_why_however_refits_are_set(
    rollback: bool, program: torch.export.ExportedProgram
) -> None:
    plugin = FakePlugin()
    answer = program.module()(X)
    compiling = plugin.backend.compile

    def folded(*args: Any) -> FakeModule:
        module = compiling(*args)
        module.answer = lambda *_, **__: answer
        return module

    plugin.backend.compile = folded  # type: ignore[method-assign]
    pipeline = Pipeline({"rollback": rollback}, plugins=[plugin])
    with pytest.raises(NotRefittableError, match="other weights"):
        pipeline.compile(program, BACKEND)
