"""The receiver of live updates: all or nothing, in every order of calls, with every bad input."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit import WeightReceiver
from refitkit.errors import (
    ConfigError,
    ModuleLostError,
    PluginError,
    Problem,
    RefitError,
    SourceError,
    UpdateStateError,
    VerificationError,
    WeightMismatchError,
)
from refitkit.live import digest_of_bytes
from refitkit.model import (
    Aborted,
    Failed,
    Finished,
    SourceRef,
    Started,
    TensorInfo,
    UpdateManifest,
    VerificationResult,
)
from refitkit.protocols import Made, WeightGroup
from tests.fakes import (
    FakeEngine,
    FakeModule,
    GradualEngine,
    GradualFilling,
    Loaded,
    OpenEngine,
    call_row,
    guard_of,
    leaf_for,
    make_module,
    make_plan,
    make_slot,
    op_call,
    plan_for,
    recipe_row,
    same_state,
    weights_for,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Scene(Loaded):
    """A module with two engines, and its receiver."""

    def __init__(
        self, *plugins: object, kind: Any = GradualEngine, how: Any = None, **settings: Any
    ) -> None:
        super().__init__(make_module(2, kind=kind), *plugins, **settings)
        self.receiver = WeightReceiver(self.compiled, **(how or {}))
        self.first = {name: value.clone() for name, value in self.holds().items()}

    def weights(self, fill: float = 3.0) -> dict[str, torch.Tensor]:
        return weights_for(self.module, fill)

    def send(self, weights: Any) -> None:
        self.receiver.update_weights({"update_info": {"weights": weights}})

    def is_as_before(self) -> bool:
        """Whether nothing happened, and the next update works."""
        before = same_state(self.holds(), self.first) and self.compiled.version == 0
        assert self.receiver.status().state == "idle"
        new = self.weights(9.0)
        self.receiver.start_weight_update("next")
        self.send(new)
        self.receiver.finish_weight_update()
        return before and same_state(self.holds(), new)


@pytest.fixture(params=[GradualEngine, OpenEngine, FakeEngine])
def scene(request: Any) -> Scene:
    return Scene(kind=request.param)


# -- one update ---------------------------------------------------------------------------------


def test_nothing_is_live_before_the_end(scene: Scene) -> None:
    new = scene.weights()
    update = scene.receiver.start_weight_update("step-1")
    for name, value in new.items():
        scene.send({name: value})
        assert same_state(scene.holds(), scene.first)
    status = scene.receiver.status()
    assert (status.state, status.update, status.version) == ("staging", update, "step-1")
    assert (status.entries, status.bytes) == (4, sum(value.nbytes for value in new.values()))
    assert status.live == {"": ""}
    (result,) = scene.receiver.finish_weight_update()
    assert same_state(scene.holds(), new)
    assert (scene.compiled.label, scene.compiled.version) == ("step-1", 1)
    assert result.report.source == "the update step-1"
    assert result.report.outcome == "committed"
    status = scene.receiver.status()
    assert (status.state, status.live, status.revisions) == ("idle", {"": "step-1"}, {"": 1})
    if isinstance(scene.module.engines["e0"], OpenEngine):  # it can be read, so values were kept
        result.undo()
        assert same_state(scene.holds(), scene.first)
        assert scene.compiled.label == ""


def test_values_are_staged_as_they_arrive_and_their_memory_is_free() -> None:
    scene = Scene()
    scene.receiver.start_weight_update()
    for name, value in scene.weights().items():
        sent = value.clone()
        scene.send({name: sent})
        assert scene.receiver.status().held_bytes == 0
        sent.fill_(-1.0)  # the caller may use the memory again
    (result,) = scene.receiver.finish_weight_update()
    assert same_state(scene.holds(), scene.weights())
    assert result.report.verification is not None
    assert result.report.verification.ok
    largest = max(value.nbytes for value in scene.weights().values())
    assert scene.receiver.status().peak_held_bytes == largest


def test_engines_that_take_all_at_once_are_told_of() -> None:
    scene = Scene(kind=OpenEngine)
    scene.receiver.start_weight_update()
    scene.send(scene.weights())
    whole = sum(value.nbytes for value in scene.weights().values())
    assert scene.receiver.status().held_bytes == whole
    scene.receiver.finish_weight_update()
    assert scene.receiver.status().held_bytes == 0
    assert scene.receiver.status().peak_held_bytes == whole


@pytest.mark.parametrize("kind", [GradualEngine, OpenEngine, FakeEngine])
@pytest.mark.parametrize("verify", ["none", None])
def test_the_sender_may_use_its_memory_again(kind: Any, verify: str | None) -> None:
    scene = Scene(kind=kind, how={"verify": verify})
    new = {n: torch.randn_like(value) for n, value in scene.weights().items()}
    buffers = {value.shape: torch.empty_like(value) for value in new.values()}
    scene.receiver.start_weight_update()
    for name, value in new.items():
        scene.send({name: buffers[value.shape].copy_(value)})
    scene.receiver.finish_weight_update()
    assert same_state(scene.holds(), new)


def guarded(*names: str) -> list[Loaded]:
    """Modules whose plans have a guard on a weight, which is read before anything is staged."""
    pipeline = Loaded(make_module(1)).pipeline
    found = []
    for _ in names:
        scene = Loaded(make_module(1, kind=GradualEngine))
        scene.pipeline = pipeline
        scene.compiled = pipeline.load(scene.module)
        assert scene.compiled.plan is not None
        now = scene.module.engines["e0"].live["e0.bias"].clone()
        guard = guard_of(SourceRef(fqn="e0.bias"), now)
        scene.compiled.plan = scene.compiled.plan.noting(guards=(guard,))
        found.append(scene)
    return found


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("reverse", [False, True])
def test_what_a_plan_reads_early_is_waited_for(order: str, reverse: bool) -> None:
    scenes = dict(zip("ab", guarded("a", "b"), strict=True))
    receiver = WeightReceiver({label: one.compiled for label, one in scenes.items()})
    receiver.start_weight_update()
    new = {"e0.weight": torch.ones(2, 3), "e0.bias": torch.tensor([-0.0, 0.0])}
    for label in order:
        for name in sorted(new, reverse=reverse):
            receiver.update_weights(weights={f"{label}.{name}": new[name]})
    receiver.finish_weight_update()
    assert all(same_state(one.holds(), new) for one in scenes.values())


def computed() -> tuple[FakeModule, Any]:
    """A module with a slot that follows from two entries, and one that is an entry."""
    module = FakeModule([GradualEngine("e0", {n: torch.zeros(2) for n in ("sum", "a")})])
    total, a = module.engines["e0"].slots.values()
    leaves = [leaf_for(total, fqn=name) for name in "ab"]
    call = op_call("add.Tensor", "@a", "@b")
    rows = [call_row(total, 0, "a", "b"), recipe_row(a, "a")]
    return module, make_plan(rows, leaves=leaves, calls=[call])


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("verify", ["none", None])
def test_a_computed_value_waits_for_all_its_sources(order: str, verify: str | None) -> None:
    module, plan = computed()
    scene = Loaded(module)
    scene.compiled.plan = plan
    receiver = WeightReceiver(scene.compiled, verify=verify)
    receiver.start_weight_update()
    given = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([10.0, 20.0])}
    for name in order:
        receiver.update_weights(weights={name: given[name]})
    # with a verifier ``b`` is kept: no slot has its elements
    assert receiver.status().held_bytes == (0 if verify else 8)
    receiver.finish_weight_update()
    assert scene.holds()["sum"].tolist() == [11.0, 22.0]


def test_several_modules_are_one_update() -> None:
    one, two = Scene(), Scene()
    receiver = WeightReceiver({"policy": one.compiled, "policy.value": two.compiled})
    receiver.start_weight_update("step-2")
    new = {"policy": one.weights(2.0), "policy.value": two.weights(5.0)}
    sent = {f"{label}.{name}": v for label, some in new.items() for name, v in some.items()}
    receiver.update_weights(weights=dict(reversed(sent.items())))
    first, second = receiver.finish_weight_update()
    assert same_state(one.holds(), new["policy"])
    assert same_state(two.holds(), new["policy.value"])
    assert (one.compiled.label, two.compiled.label) == ("step-2", "step-2")
    assert (first.module, second.module) == (one.compiled, two.compiled)
    # one of them cannot: neither is changed
    receiver.start_weight_update("step-3")
    sent["policy.value.e0.bias"] = torch.full((2,), float("nan"))
    receiver.update_weights(weights=sent)
    with pytest.raises(WeightMismatchError, match="policy"):
        receiver.finish_weight_update()
    assert same_state(one.holds(), new["policy"])
    assert one.compiled.label == "step-2"


def test_calls_go_on_and_other_refits_wait() -> None:
    scene = Scene()
    scene.receiver.start_weight_update()
    done = threading.Event()

    def refit() -> None:
        scene.pipeline.refit(scene.compiled, scene.weights(7.0))
        done.set()

    thread = threading.Thread(target=refit)
    thread.start()
    scene.compiled(torch.ones(()))
    scene.send(scene.weights())
    assert not done.is_set()
    scene.receiver.finish_weight_update()
    thread.join()
    assert same_state(scene.holds(), scene.weights(7.0))
    assert scene.compiled.label == ""  # other refits have no label


def test_the_memory_of_a_whole_set_is_never_held(tmp_path: Path) -> None:
    """From disk, tensor by tensor."""
    scene = Scene()
    torch.save(scene.weights(), tmp_path / "step.pt")
    scene.receiver.init_weight_transfer_engine({"init_info": {"backend": "disk"}})
    scene.receiver.start_weight_update("step")
    scene.receiver.update_weights({"update_info": {"path": str(tmp_path / "step.pt")}})
    scene.receiver.finish_weight_update()
    assert same_state(scene.holds(), scene.weights())


# -- every call in every wrong state ------------------------------------------------------------

CALLS: dict[str, Callable[[WeightReceiver], object]] = {
    "init": lambda one: one.init_weight_transfer_engine({"init_info": {"backend": "disk"}}),
    "start": lambda one: one.start_weight_update("again"),
    "update": lambda one: one.update_weights({"update_info": {"weights": {}}}),
    "finish": lambda one: one.finish_weight_update(),
}


@pytest.mark.parametrize("call", ["update", "finish"])
@pytest.mark.parametrize("before", ["nothing", "finish", "abort", "failure"])
def test_calls_without_an_update_are_refused(call: str, before: str) -> None:
    scene = Scene()
    if before != "nothing":
        scene.receiver.start_weight_update()
    if before == "finish":
        scene.send(scene.weights())
        scene.receiver.finish_weight_update()
    elif before == "abort":
        assert scene.receiver.abort_weight_update()
    elif before == "failure":
        with pytest.raises(WeightMismatchError):
            scene.send({"strange": torch.ones(1)})
    held, version = scene.holds(), scene.compiled.version
    with pytest.raises(UpdateStateError, match="no update has begun") as info:
        CALLS[call](scene.receiver)
    assert "start_weight_update()" in info.value.hint
    assert ("strange" in info.value.hint) is (before == "failure")
    assert same_state(scene.holds(), held)
    assert scene.compiled.version == version


@pytest.mark.parametrize("call", ["init", "start"])
def test_calls_during_an_update_are_refused(call: str) -> None:
    scene = Scene()
    scene.receiver.start_weight_update("first")
    scene.send({"e0.bias": scene.weights()["e0.bias"]})
    with pytest.raises(UpdateStateError, match="while an update is staging") as info:
        CALLS[call](scene.receiver)
    assert "abort_weight_update()" in info.value.hint
    rest = scene.weights()
    del rest["e0.bias"]
    scene.send(rest)  # the update goes on
    scene.receiver.finish_weight_update()
    assert scene.compiled.label == "first"


def test_a_newer_update_may_supersede() -> None:
    scene = Scene()
    scene.receiver.start_weight_update("old")
    scene.send({"e0.bias": torch.ones(2)})
    scene.receiver.start_weight_update("new", supersede=True)
    scene.send(scene.weights())
    scene.receiver.finish_weight_update()
    assert (scene.compiled.label, scene.compiled.version) == ("new", 1)
    assert same_state(scene.holds(), scene.weights())


@pytest.mark.parametrize("call", [*CALLS, "abort", "close"], ids=lambda name: name)
def test_calls_from_inside_an_update_are_refused(call: str) -> None:
    """A hook that called its receiver would wait for itself."""
    errors: list[BaseException] = []

    class Hook:
        name = "hook"
        receiver: Any = None

        @refitkit.hookimpl
        def refitkit_weights_changed(self) -> None:
            calls = {
                **CALLS,
                "abort": lambda one: one.abort_weight_update(),
                "close": lambda one: one.close(),
            }
            if self.receiver is not None:
                try:
                    calls[call](self.receiver)
                except UpdateStateError as exc:
                    errors.append(exc)

    hook = Hook()
    scene = Scene(hook)
    hook.receiver = scene.receiver
    scene.receiver.start_weight_update("fine")
    scene.send(scene.weights())
    scene.receiver.finish_weight_update()
    assert "from inside of the update" in str(errors[0])
    assert scene.compiled.label == "fine"


def test_a_trainer_that_hangs_does_not_stop_the_next_one() -> None:
    scene = Scene()
    sent, goes_on = threading.Event(), threading.Event()

    def hanging() -> Iterator[tuple[str, torch.Tensor]]:
        yield "e0.bias", torch.ones(2)
        sent.set()
        goes_on.wait()

    def send() -> None:
        with suppress(UpdateStateError):
            scene.send(hanging())

    scene.receiver.start_weight_update("old")
    thread = threading.Thread(target=send)
    thread.start()
    sent.wait()
    scene.receiver.start_weight_update("new", supersede=True)
    scene.send(scene.weights())
    scene.receiver.finish_weight_update()
    goes_on.set()
    thread.join()
    assert scene.compiled.label == "new"


def test_an_iterable_may_send_by_itself() -> None:
    scene = Scene()
    scene.receiver.start_weight_update()

    def nested() -> Iterator[tuple[str, torch.Tensor]]:
        names = iter(scene.weights().items())
        yield next(names)
        scene.send(dict(names))

    scene.send(nested())
    scene.receiver.finish_weight_update()
    assert same_state(scene.holds(), scene.weights())


def test_abort_without_an_update_does_nothing() -> None:
    scene = Scene()
    assert not scene.receiver.abort_weight_update()
    assert scene.is_as_before()


@pytest.mark.parametrize("arrived", [0, 1, 4])
def test_an_aborted_update_never_happened(scene: Scene, arrived: int) -> None:
    scene.receiver.start_weight_update()
    for name, value in list(scene.weights().items())[:arrived]:
        scene.send({name: value})
    assert scene.receiver.abort_weight_update()
    assert scene.is_as_before()


def test_an_abort_while_another_thread_sends() -> None:
    scene = Scene()
    scene.receiver.start_weight_update()
    sent, aborted = threading.Event(), threading.Event()

    def slowly() -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in scene.weights().items():
            yield name, value
            sent.set()
            aborted.wait()

    errors: list[BaseException] = []

    def send() -> None:
        try:
            scene.send(slowly())
        except UpdateStateError as exc:
            errors.append(exc)

    thread = threading.Thread(target=send)
    thread.start()
    sent.wait()
    assert scene.receiver.abort_weight_update()
    aborted.set()
    thread.join()
    assert "was aborted" in str(errors[0])
    assert scene.is_as_before()


class Slow:
    """A verifier that waits until it may answer."""

    name = "slow"

    def __init__(self, *, ok: bool = True) -> None:
        self.asked, self.may_answer, self.ok = threading.Event(), threading.Event(), ok

    def prepare(self, _: object) -> Callable[[object], VerificationResult]:
        def check(_: object) -> VerificationResult:
            self.asked.set()
            self.may_answer.wait()
            return VerificationResult(verifier=self.name, ok=self.ok, note="slow")

        return check


def with_verifier(verifier: Any) -> Scene:
    plugin = type(
        "Plugin",
        (),
        {
            "name": "verifiers",
            "refitkit_verifiers": refitkit.hookimpl(lambda self: [verifier]),
        },
    )()
    return Scene(plugin, how={"verify": verifier.name})


def test_an_abort_after_the_commit_has_begun_is_too_late() -> None:
    """The fake module does not publish, so its verdict comes after the commit."""
    verifier = Slow()
    scene = with_verifier(verifier)
    scene.receiver.start_weight_update("kept")
    scene.send(scene.weights())
    results: list[Any] = []
    finish = threading.Thread(target=lambda: results.append(scene.receiver.finish_weight_update()))
    finish.start()
    verifier.asked.wait()
    assert scene.receiver.status().state == "committing"
    answers: list[bool] = []
    abort = threading.Thread(target=lambda: answers.append(scene.receiver.abort_weight_update()))
    abort.start()
    verifier.may_answer.set()
    finish.join()
    abort.join()
    assert answers == [False]
    assert len(results) == 1
    assert scene.compiled.label == "kept"


def test_a_bad_verdict_brings_the_old_weights_back() -> None:
    verifier = Slow(ok=False)
    verifier.may_answer.set()
    scene = with_verifier(verifier)
    scene.receiver.start_weight_update("bad")
    scene.send(scene.weights())
    with pytest.raises(VerificationError):
        scene.receiver.finish_weight_update()
    assert same_state(scene.holds(), scene.first)
    assert (scene.compiled.label, scene.compiled.version) == ("", 0)
    assert scene.receiver.status().last_failure


# -- weights that do not fit --------------------------------------------------------------------

NAN = float("nan")
BAD: dict[str, tuple[Any, str]] = {
    "unknown": ({"e9.bias": torch.ones(2)}, "e9.bias"),
    "dtype": ({"e0.bias": torch.ones(2).double()}, "float64"),
    "shape": ({"e0.bias": torch.ones(3)}, r"\(3,\)"),
    "sparse": ({"e0.bias": torch.ones(2).to_sparse()}, "e0.bias"),
    "meta": ({"e0.bias": torch.ones(2, device="meta")}, "e0.bias"),
    "twice": ([("e0.bias", torch.ones(2)), ("e0.bias", torch.zeros(2))], "given twice"),
    "no tensor": ({"e0.bias": [1.0, 2.0]}, "str and list"),
    "no name": ([(1, torch.ones(2))], "int and Tensor"),
    "no pair": (["e0.bias"], "gave a str"),
    "raises": (None, "ZeroDivisionError"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bucket_that_does_not_fit_ends_the_update(case: str) -> None:
    scene = Scene()
    weights, says = BAD[case]
    if case == "raises":
        weights = (name for name in [None] if 1 / 0)
    scene.receiver.start_weight_update()
    with pytest.raises(RefitError, match=says):
        scene.send(weights)
    assert scene.is_as_before()


def test_what_is_missing_is_listed() -> None:
    scene = Scene()
    new = scene.weights()
    del new["e0.bias"], new["e1.weight"]
    scene.receiver.start_weight_update()
    scene.send(new)
    with pytest.raises(WeightMismatchError, match="not complete") as info:
        scene.receiver.finish_weight_update()
    assert [p.subject for p in info.value.problems] == ["e0.bias", "e1.weight"]
    assert scene.is_as_before()


@pytest.mark.parametrize("name", ["e0.bias", "e1.weight"])
def test_new_values_have_to_be_finite(scene: Scene, name: str) -> None:
    new = scene.weights()
    new[name] = torch.full_like(new[name], NAN)
    scene.receiver.start_weight_update()
    scene.send(new)
    with pytest.raises(WeightMismatchError, match="finite"):
        scene.receiver.finish_weight_update()
    assert scene.is_as_before()


@pytest.mark.parametrize("same", [True, False])
def test_tied_names_have_to_agree(same: bool) -> None:
    module = FakeModule([GradualEngine("e0", {"w": torch.zeros(2)})])
    scene = Loaded(module)
    leaves = [leaf_for(make_slot(name)) for name in ("w", "twin")]
    scene.compiled.plan = plan_for(module, leaves=leaves, ties=[("w", "twin")])
    receiver = WeightReceiver(scene.compiled)
    receiver.start_weight_update()
    pairs = [("twin", torch.ones(2)), ("w", torch.ones(2) * (1 if same else 2))]
    if not same:
        with pytest.raises(WeightMismatchError, match="one tensor with 'w'"):
            receiver.update_weights(weights=pairs)
        assert scene.holds()["w"].tolist() == [0.0, 0.0]
        return
    receiver.update_weights(weights=pairs)
    receiver.finish_weight_update()
    assert scene.holds()["w"].tolist() == [1.0, 1.0]


# -- engines and plugins that fail --------------------------------------------------------------


@pytest.mark.parametrize("step", range(40))
def test_a_fault_at_each_step_leaves_the_old_weights(step: int) -> None:
    scene = Scene()
    wire = scene.module.engines["e0"].wire
    wire.arm({step: RuntimeError("broken")})
    try:
        scene.receiver.start_weight_update("faulty")
        for name, value in scene.weights().items():
            scene.send({name: value})
        scene.receiver.finish_weight_update()
    except ModuleLostError:
        raise
    except RefitError:
        assert same_state(scene.holds(), scene.first)
        assert scene.compiled.label == ""
    else:
        assert same_state(scene.holds(), scene.weights())
    wire.arm()
    scene.receiver.start_weight_update("next")
    scene.send(scene.weights(4.0))
    scene.receiver.finish_weight_update()
    assert same_state(scene.holds(), scene.weights(4.0))


def test_the_faults_reach_every_step_of_staging() -> None:
    scene = Scene()
    wire = scene.module.engines["e0"].wire
    wire.arm()
    scene.receiver.start_weight_update()
    scene.send(scene.weights())
    scene.receiver.finish_weight_update()
    assert {"e0.begin", "e0.add", "e0.finish", "e1.commit"} <= set(wire.calls)
    assert len(wire.calls) < 40


def test_an_engine_that_refuses_values_at_the_end_is_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Engines that cannot be read judge their values themselves, and name slots."""

    def refuse(_: object) -> None:
        raise WeightMismatchError("Not finite.", problems=[Problem("e0.bias", "non-finite")])

    scene = Scene()
    with monkeypatch.context() as patch:
        patch.setattr(GradualFilling, "finish", refuse)
        scene.receiver.start_weight_update()
        scene.send(scene.weights())
        with pytest.raises(WeightMismatchError, match=r"e0\.bias: non-finite"):
            scene.receiver.finish_weight_update()
    assert scene.is_as_before()


class Transport:
    """A transport whose answer is a function's."""

    name = "mine"

    def __init__(self, answer: Callable[[], Any], connection: Any = None) -> None:
        self.answer, self.connection, self.closed = answer, connection or self, 0

    def open(self, init_info: Any, open_weights: Any) -> Any:
        assert callable(open_weights)
        if "bad" in init_info:
            raise KeyError("bad")
        return self.connection

    def receive(self, update_info: Any) -> Any:
        return self.answer()

    def close(self) -> None:
        self.closed += 1
        raise OSError("already gone")


def with_transport(transport: Any) -> Scene:
    plugin = type(
        "Plugin",
        (),
        {
            "name": "transports-plugin",
            "refitkit_weight_transports": refitkit.hookimpl(lambda self: [transport]),
        },
    )()
    return Scene(plugin, how={"transport": "mine"})


@pytest.mark.parametrize(
    "answer",
    [
        lambda: None,
        lambda: [None],
        lambda: [{"e0.bias": 3}],
        lambda: [{3: torch.ones(2)}],
        lambda: [["e0.bias"]],
        lambda: 1 / 0,
        lambda: (1 / 0 for _ in "a"),
    ],
)
def test_a_broken_transport_is_named(answer: Callable[[], Any]) -> None:
    scene = with_transport(Transport(answer))
    scene.receiver.start_weight_update()
    with pytest.raises(PluginError, match=r"'mine' of the plugin 'transports-plugin'") as info:
        scene.receiver.update_weights()
    assert "refitkit_weight_transports" in str(info.value)
    assert same_state(scene.holds(), scene.first)
    assert scene.receiver.status().state == "idle"


def test_a_transport_that_cannot_be_opened() -> None:
    scene = with_transport(Transport(list, connection=3))
    with pytest.raises(PluginError, match="gave 3"):
        scene.receiver.start_weight_update()
    with pytest.raises(PluginError, match="KeyError"):
        scene.receiver.init_weight_transfer_engine({"init_info": {"backend": "mine", "bad": 1}})
    with pytest.raises(ConfigError, match="no weight transport 'nccl'") as info:
        scene.receiver.init_weight_transfer_engine({"init_info": {"backend": "nccl"}})
    assert "disk, mine, stream" in info.value.hint


def test_a_transport_is_closed_once_another_is_opened() -> None:
    transport = Transport(list)
    scene = with_transport(transport)
    scene.receiver.init_weight_transfer_engine()
    scene.receiver.init_weight_transfer_engine({"init_info": {"backend": "stream"}})
    assert transport.closed == 1
    scene.receiver.close()
    assert scene.receiver.status().transport == ""
    scene.receiver.init_weight_transfer_engine({"init_info": {"backend": "stream"}})
    assert scene.is_as_before()


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"init_info": 3}, "init_info is a int"),
        ({"init_info": {"backend": "disk", "path": "/x"}}, "no such field"),
        ({"init_info": {"backend": ["disk"]}}, "no weight transport"),
        ({"init_info": {"backend": "stream", "master_address": "x"}}, "master_address"),
    ],
)
def test_a_malformed_init_info(request_: Any, says: str) -> None:
    scene = Scene()
    with pytest.raises(ConfigError, match=says):
        scene.receiver.init_weight_transfer_engine(request_)
    assert scene.is_as_before()


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ({}, "path: missing"),
        ({"path": 3}, "path: type"),
        ({"path": "relative.pt"}, "not absolute"),
        ({"path": "/no/such/file"}, "no file or folder"),
        ({"path": "/etc/passwd", "names": []}, "names: no such field"),
        ({"path": "/etc/passwd"}, None),
        ({"path": "/\0"}, "no file or folder"),
    ],
)
def test_a_malformed_update_of_disk(info: Any, says: str | None) -> None:
    scene = Scene()
    scene.receiver.init_weight_transfer_engine({"init_info": {"backend": "disk"}})
    scene.receiver.start_weight_update()
    with pytest.raises((ConfigError, SourceError), match=says):
        scene.receiver.update_weights({"update_info": info})
    scene.receiver.init_weight_transfer_engine({"init_info": {"backend": "stream"}})
    assert scene.is_as_before()


def test_disk_reads_only_below_its_roots(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    scene = Scene(plugin_settings={"transports": {"roots": [str(inside)]}})
    for folder in (inside, outside):
        torch.save(scene.weights(), folder / "w.pt")
    (inside / "link.pt").symlink_to(outside / "w.pt")
    scene.receiver.init_weight_transfer_engine({"init_info": {"backend": "disk"}})
    (inside / "folder").mkdir()
    (inside / "folder" / "model.safetensors").symlink_to(outside / "w.pt")
    os.mkfifo(inside / "fifo.pt")
    paths = [outside / "w.pt", inside / "link.pt", inside / ".." / "out" / "w.pt"]
    for path in (*paths, inside / "folder"):
        scene.receiver.start_weight_update()
        with pytest.raises(ConfigError, match="outside of the allowed folders"):
            scene.receiver.update_weights({"update_info": {"path": str(path)}})
    scene.receiver.start_weight_update()
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        scene.receiver.update_weights({"update_info": {"path": str(inside / "fifo.pt")}})
    scene.receiver.start_weight_update()
    scene.receiver.update_weights({"update_info": {"path": str(inside / "w.pt")}})
    scene.receiver.finish_weight_update()
    assert same_state(scene.holds(), scene.weights())


def test_a_trainer_that_dies_ends_its_update() -> None:
    scene = Scene(how={"timeout": 0.2})
    scene.receiver.start_weight_update()
    scene.send({"e0.bias": torch.ones(2)})
    time.sleep(0.5)
    with pytest.raises(RefitError, match=r"Nothing has arrived for .* given up"):
        scene.send({"e1.bias": torch.ones(2)})
    assert scene.is_as_before()


def test_an_update_that_ended_by_itself_is_over() -> None:
    scene = Scene(how={"timeout": 0.1})
    scene.receiver.start_weight_update()
    time.sleep(0.3)
    status = scene.receiver.status()
    assert status.state == "idle"
    assert "given up" in status.last_failure
    assert scene.is_as_before()


def test_a_forked_child_is_told_that_its_update_is_over() -> None:
    scene = Scene()
    scene.receiver.start_weight_update()
    scene.send({"e0.bias": torch.ones(2)})
    child = os.fork()
    if child == 0:
        try:
            scene.send({"e1.bias": torch.ones(2)})
        except UpdateStateError:
            os._exit(0 if scene.receiver.status().state == "idle" else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    rest = scene.weights()
    del rest["e0.bias"]
    scene.send(rest)
    scene.receiver.finish_weight_update()


# -- manifests ----------------------------------------------------------------------------------


def manifest(weights: dict[str, torch.Tensor], **facts: Any) -> dict[str, Any]:
    entries = [
        {
            "name": name,
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": tuple(value.shape),
            "digest": digest_of_bytes(value),
        }
        for name, value in weights.items()
    ]
    return {"entries": entries, **facts}


def test_a_manifest_tells_what_comes() -> None:
    scene = Scene()
    assert scene.compiled.plan is not None
    graph = scene.compiled.plan.data.fingerprint.graph
    told = manifest(scene.weights(), version="step-7", models={"": graph}, base_version="")
    scene.receiver.start_weight_update(manifest=UpdateManifest.model_validate(told))
    scene.send(scene.weights())
    scene.receiver.finish_weight_update()
    assert scene.compiled.label == "step-7"
    scene.receiver.start_weight_update("8", manifest=manifest({}, base_version="step-7"))
    scene.receiver.abort_weight_update()


def begin_and_finish(receiver: WeightReceiver, told: Any) -> None:
    receiver.start_weight_update(manifest=told)
    receiver.finish_weight_update()


def test_wrong_manifests_are_refused_before_anything_begins() -> None:
    scene = Scene()
    cases: list[tuple[Any, type[RefitError], str]] = [
        (manifest({}, models={"": "f" * 64}), WeightMismatchError, "another model"),
        (manifest({}, models={"x": "0" * 64}), WeightMismatchError, "no such module"),
        (manifest({}, base_version="step-1"), WeightMismatchError, "another base"),
        ({"entries": 3}, ConfigError, "entries"),
        ({"format": "refitkit-update/9"}, ConfigError, "format"),
        ({"entries": [{"name": "a", "dtype": "float32", "shape": [-1]}]}, ConfigError, "shape"),
        ({"version": "x" * 300}, ConfigError, "version"),
        ({"surprise": 1}, ConfigError, "surprise"),
        (manifest({**scene.weights(), "e0.bias": torch.ones(3)}), WeightMismatchError, "shape"),
        (manifest({"strange": torch.ones(1)}), WeightMismatchError, "strange"),
    ]
    for told, kind, says in cases:
        with pytest.raises(kind, match=says):
            begin_and_finish(scene.receiver, told)
        assert scene.receiver.status().state == "idle", says
    for version in (3, "two\nlines", "x" * 300):
        with pytest.raises(ConfigError, match="version"):
            scene.receiver.start_weight_update(version)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="version"):
            scene.receiver.start_weight_update(manifest={"version": version})
    assert scene.is_as_before()


def test_the_base_is_that_of_the_commit() -> None:
    """Another receiver may change the weights while this one waits for its turn."""
    scene = Scene()
    first, second = scene.receiver, WeightReceiver(scene.compiled)
    first.start_weight_update("step-1")
    errors: list[BaseException] = []

    def start() -> None:
        try:
            second.start_weight_update(manifest={"base_version": "", "version": "step-2"})
        except WeightMismatchError as exc:
            errors.append(exc)

    thread = threading.Thread(target=start)
    thread.start()
    scene.send(scene.weights())
    time.sleep(0.1)
    first.finish_weight_update()
    thread.join()
    assert "another base" in str(errors[0])
    assert scene.compiled.label == "step-1"


def test_damaged_bytes_are_refused() -> None:
    scene = Scene()
    scene.receiver.start_weight_update(manifest=manifest(scene.weights()))
    damaged = scene.weights()
    damaged["e1.bias"] = damaged["e1.bias"] + 1
    with pytest.raises(WeightMismatchError, match="digest"):
        scene.send(damaged)
    assert scene.is_as_before()


class Doubled:
    """Checkpoints have halves of the weights, under other names."""

    name, priority = "doubled", 50

    def groups(self, request: Any) -> Iterator[WeightGroup]:
        for leaf in request.plan.data.leaves:
            given = f"half of {leaf.fqn}"
            if given in request.source.names():
                gives = {leaf.fqn: TensorInfo(dtype=leaf.dtype, shape=leaf.shape)}

                def make(given: str = given, fqn: str = leaf.fqn) -> Made:
                    return Made({fqn: 2 * request.source.get(given)})

                yield WeightGroup((given,), gives, make)


@pytest.mark.parametrize("verify", ["weights", "none"])
def test_transforms_apply_to_announced_names(verify: str) -> None:
    plugin = type(
        "Plugin",
        (),
        {
            "name": "doubling",
            "refitkit_weight_transforms": refitkit.hookimpl(lambda self: [Doubled()]),
        },
    )()
    scene = Scene(plugin, how={"verify": verify})
    halves = {f"half of {name}": value / 2 for name, value in scene.weights().items()}
    scene.receiver.start_weight_update(manifest=manifest(halves))
    for name, value in halves.items():
        scene.send({name: value})
    held = scene.receiver.status().held_bytes
    assert (held == 0) is (verify == "none")
    (result,) = scene.receiver.finish_weight_update()
    assert same_state(scene.holds(), scene.weights())
    assert len(result.report.transforms) == 4


# -- events, arguments, forms -------------------------------------------------------------------


def test_each_update_has_one_beginning_and_one_end() -> None:
    events: list[Any] = []

    class Listener:
        name = "listener"

        @refitkit.hookimpl
        def refitkit_event(self, event: Any) -> None:
            if event.verb == "receive" and isinstance(event, Started | Finished | Failed | Aborted):
                events.append(type(event).__name__)

    scene = Scene(Listener())
    scene.receiver.start_weight_update()
    scene.send(scene.weights())
    scene.receiver.finish_weight_update()
    scene.receiver.start_weight_update()
    scene.receiver.abort_weight_update()
    scene.receiver.start_weight_update()
    with pytest.raises(WeightMismatchError):
        scene.receiver.finish_weight_update()
    assert events == ["Started", "Finished", "Started", "Aborted", "Started", "Failed"]


def test_requests_may_be_objects() -> None:
    scene = Scene()
    scene.receiver.init_weight_transfer_engine(SimpleNamespace(init_info={"backend": "stream"}))
    scene.receiver.start_weight_update()
    scene.receiver.update_weights(SimpleNamespace(update_info={"weights": scene.weights()}))
    scene.receiver.finish_weight_update()
    assert same_state(scene.holds(), scene.weights())


@pytest.mark.parametrize("modules", [None, {}, [], {"a": 3}, {"": "x"}, {3: None}])
def test_what_is_no_module_is_refused(modules: Any) -> None:
    with pytest.raises(ConfigError, match="receiver needs compiled modules"):
        WeightReceiver(modules)


def test_wrong_arguments_are_refused() -> None:
    scene = Scene()
    with pytest.raises(ConfigError, match="twice"):
        WeightReceiver({"a": scene.compiled, "b": scene.compiled})
    for timeout in (0, -1, NAN):
        with pytest.raises(ConfigError, match="timeout"):
            WeightReceiver(scene.compiled, timeout=timeout)
    for timeout in (float("inf"), 1e12, "x", None, True):
        with pytest.raises(ConfigError, match="timeout"):
            WeightReceiver(scene.compiled, timeout=timeout)  # type: ignore[arg-type]
    for how, says in (({"verify": "nobody's"}, "nobody's"), ({"inputs": 3}, "inputs")):
        receiver = WeightReceiver(scene.compiled, **how)
        with pytest.raises(ConfigError, match=says):
            receiver.start_weight_update()
        assert receiver.status().state == "idle"
    with pytest.raises(ConfigError, match="is_checkpoint_format"):
        scene.receiver.start_weight_update(is_checkpoint_format=False)
    scene.receiver.start_weight_update(is_checkpoint_format=True)
    scene.receiver.abort_weight_update()


def test_a_lost_module_takes_no_update() -> None:
    scene = Scene()
    scene.compiled.gate.poison("gone")
    assert scene.receiver.status().state == "lost"
    with pytest.raises(ModuleLostError):
        scene.receiver.start_weight_update()
