"""Whatever fails during a refit, the module answers as before, or refuses to answer.

The places to fail are not listed by hand: a refit runs once to count every call of the engine, the
container, the hooks and the source, and then once for each of them, with a fault there. All of it
runs through AOTInductor's C interface, and through torch's binding.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from aoti_helpers import bits, digest, slots_of
from aoti_models import CASES

import refitkit
from refitkit import hookspecs
from refitkit.builtin.aotinductor.engine import AOTInductorEngine, StagedSwap, SwappingEngine
from refitkit.builtin.aotinductor.module import AOTInductorModule
from refitkit.builtin.aotinductor.native import SWITCH, Container, Library, _Code
from refitkit.builtin.aotinductor.publishing import PublishingEngine, StagedSet
from refitkit.model import TensorInfo
from tests.interrupting import PACKAGE, Interrupt, Points, in_a_thread

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Fresh = Callable[[str], refitkit.CompiledModule]

CASE = CASES["mixed"]
SECONDS = 10
C_INTERFACE, BINDING = "c interface", "binding"


@pytest.fixture(params=[C_INTERFACE, BINDING])
def through(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How engines that are opened from now on call their libraries."""
    if request.param == BINDING:
        monkeypatch.setenv(SWITCH, "1")
    return str(request.param)


class Fault(RuntimeError):  # noqa: N818 - it is not an error, it is meant
    """What is raised where a fault is injected."""


@dataclass
class Faults:
    """Counts calls of everything that is wrapped, and raises at one of them.

    Attributes:
        at: Number of the call to fail at; None: none.
        after: Whether to fail after the call has had its effect.
        kind: What to raise.
        calls: What was called so far.
    """

    at: int | None = None
    after: bool = False
    kind: type[BaseException] = Fault
    calls: list[str] = field(default_factory=list)

    def through(self, label: str, function: Callable[[], Any]) -> Any:
        number = len(self.calls)
        self.calls.append(label)
        if number == self.at and not self.after:
            raise self.kind(label)
        result = function()
        if number == self.at:
            raise self.kind(label)
        return result


class FaultyRunner:
    """The container, counted."""

    def __init__(self, runner: Any, faults: Faults) -> None:
        self._runner, self._faults = runner, faults

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._runner, name)

        def counted(*args: Any) -> Any:
            return self._faults.through(f"runner.{name}", lambda: function(*args))

        return counted


class FaultySource:
    """A weight source, counted."""

    def __init__(self, state: dict[str, torch.Tensor], faults: Faults) -> None:
        self.description = "a faulty source"
        self._state, self._faults = state, faults

    def names(self) -> Any:
        return self._faults.through("source.names", self._state.keys)

    def info(self, fqn: str) -> TensorInfo:
        tensor = self._state[fqn]
        dtype = str(tensor.dtype).removeprefix("torch.")
        told = TensorInfo(dtype=dtype, shape=tuple(tensor.shape))
        return self._faults.through("source.info", lambda: told)

    def get(self, fqn: str) -> torch.Tensor:
        return self._faults.through("source.get", lambda: self._state[fqn])


def faulty_plugin(faults: Faults) -> Any:
    """A plugin with every hook that a refit calls; all of them do nothing, and are counted."""
    skipped = {"refitkit_register_backends", "refitkit_register_commands", "refitkit_load_module"}
    names = [name for name in vars(hookspecs) if name.startswith("refitkit_")]

    def make(name: str) -> Any:
        told = "outcome" if name == "refitkit_weights_changed" else "stage"
        argument = {"refitkit_weights_changed": "report", "refitkit_event": "event"}.get(name)
        answer: Any = () if name in _LISTS else None
        scope: dict[str, Any] = {}
        code = f"def {name}(self{', ' + argument if argument else ''}): return go({argument})"

        def go(about: Any) -> Any:
            label = f"{name}.{getattr(about, told)}" if about is not None else name
            return faults.through(label, lambda: answer)

        scope["go"] = go
        exec(code, scope)  # noqa: S102 - pluggy reads the names of a hook's arguments
        return refitkit.hookimpl(scope[name])

    hooks = {name: make(name) for name in names if name not in skipped}
    return type("Faulty", (), {"name": "faulty", **hooks})()


_LISTS = {
    "refitkit_mapping_strategies",
    "refitkit_weight_transforms",
    "refitkit_check",
    "refitkit_verifiers",
}


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> list[Faults]:
    """Methods of the engine, its module and what it stages go through the last of these faults.

    So do functions of the container.
    """
    current = [Faults()]
    for owner in WRAPPED:
        for name, function in list(vars(owner).items()):
            if not name.startswith("__") and callable(function):
                monkeypatch.setattr(owner, name, _counted(owner, function, current))
    for name in ("filled", "run"):
        monkeypatch.setattr(Library, name, _counted(Library, getattr(Library, name), current))
    call = _Code.call

    def counted(self: Any, name: str, *args: Any) -> Any:
        if name not in _FILLING:
            return call(self, name, *args)
        return current[-1].through(f"library.{name}", lambda: call(self, name, *args))

    monkeypatch.setattr(_Code, "call", counted)
    return current


WRAPPED = (
    AOTInductorEngine,
    PublishingEngine,
    StagedSet,
    Container,
    SwappingEngine,
    StagedSwap,
    AOTInductorModule,
)
# The others may run while Python deletes an object, and it ignores what is raised there.
_FILLING = {
    "CreateWithDevice",
    "UpdateUserManagedConstantBufferPairs",
    "SwapConstantBuffer",
    "FreeInactiveConstantBuffer",
}


def _counted(owner: type, function: Callable[..., Any], current: list[Faults]) -> Any:
    label = f"{owner.__name__}.{function.__name__}"

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        return current[-1].through(label, lambda: function(*args, **kwargs))

    return counted


@dataclass
class Scene:
    """A module before a refit, and the refit."""

    compiled: refitkit.CompiledModule
    state: dict[str, torch.Tensor]
    how: dict[str, Any]

    def refit(self, faults: Faults) -> None:
        engine = self.compiled.opened.engines["model"]
        pipeline = refitkit.Pipeline(plugins=[faulty_plugin(faults)])
        with pytest.MonkeyPatch.context() as patch:
            if isinstance(engine, SwappingEngine):
                patch.setattr(engine, "runner", FaultyRunner(engine.runner, faults))
            pipeline.refit(self.compiled, FaultySource(self.state, faults), **self.how)


def _full(seed: int) -> dict[str, torch.Tensor]:
    return CASE.model(seed).state_dict()


SCENES: dict[str, Callable[[refitkit.CompiledModule], Scene]] = {}


def scene(function: Callable[[refitkit.CompiledModule], Scene]) -> Any:
    SCENES[function.__name__.strip("_")] = function
    return function


@scene
def _first_refit(compiled: refitkit.CompiledModule) -> Scene:
    return Scene(compiled, _full(1), {"inputs": CASE.inputs()})


@scene
def _second_refit(compiled: refitkit.CompiledModule) -> Scene:
    refitkit.refit(compiled, _full(2))
    compiled(*CASE.args())
    return Scene(compiled, _full(1), {"verify": "weights"})


@scene
def _partial_refit(compiled: refitkit.CompiledModule) -> Scene:
    refitkit.refit(compiled, _full(2))
    refitkit.refit(compiled, {"kept": torch.ones(4)}, partial=True)
    state = {"a.bias": _full(1)["a.bias"]}
    return Scene(compiled, state, {"partial": True, "inputs": CASE.inputs()})


@scene
def _after_free_spare(compiled: refitkit.CompiledModule) -> Scene:
    refitkit.refit(compiled, _full(2))
    compiled.free_spare()
    state = {"b.weight": _full(1)["b.weight"]}
    return Scene(compiled, state, {"partial": True, "verify": "none"})


def _probed(compiled: refitkit.CompiledModule) -> str:
    """What it answers and holds, as one text; leaves its counter as it was."""
    outputs = digest(compiled.opened.probe(CASE.args(), {}))
    return outputs + digest([(n, held) for n, held in sorted(slots_of(compiled).items())])


@pytest.mark.parametrize("name", SCENES)
def test_a_fault_anywhere_leaves_the_module_as_it_was(
    name: str, through: str, fresh: Fresh, wrapped: list[Faults]
) -> None:
    good = SCENES[name](fresh("mixed"))
    counting = Faults()
    wrapped.append(counting)
    good.refit(counting)
    wrapped.append(Faults())
    after = _probed(good.compiled)
    assert {"source.get", "refitkit_weights_changed.committed"} <= set(counting.calls)
    assert COMMITS[through] <= set(counting.calls)
    passed = Counter()
    for number, label in enumerate(counting.calls):
        for faults in (Faults(number), Faults(number, after=True, kind=Interrupt)):
            outcome = _outcome(SCENES[name](fresh("mixed")), wrapped, after, label, faults)
            passed[label, faults.kind, outcome] += 1
    done = {(label, kind) for label, kind, outcome in passed if outcome == "done"}
    heard = {label for label in counting.calls if label.startswith("refitkit_event")}
    assert {label for label, kind in done if kind is not Interrupt} == heard
    late = {"refitkit_event.commit", "refitkit_event.verify"}
    assert {label for label, kind in done if kind is Interrupt} <= late, "interrupts that were lost"


COMMITS = {
    C_INTERFACE: {"library.SwapConstantBuffer", "StagedSet.commit", "PublishingEngine.publish"},
    BINDING: {"runner.swap_constant_buffer", "StagedSwap.commit"},
}


def _outcome(before: Scene, wrapped: list[Faults], after: str, label: str, faults: Faults) -> str:
    compiled = before.compiled
    old, version = _probed(compiled), compiled.version
    where = f"{faults.kind.__name__} {'after' if faults.after else 'at'} {label} {faults.at}"
    wrapped.append(faults)
    try:
        before.refit(faults)
    except refitkit.ModuleLostError as exc:
        raise AssertionError(f"lost by a fault outside of a rollback: {where}") from exc
    except (refitkit.RefitError, Interrupt):
        outcome = "raised"
    else:
        outcome = "done"
    wrapped.append(Faults())
    assert not compiled.gate.lost, where
    assert _probed(compiled) == (after if outcome == "done" else old), where
    assert compiled.version == version + (outcome == "done"), where
    before.refit(Faults())
    assert _probed(compiled) == after, f"the refit after {where}"
    return outcome


def test_a_fault_in_a_rollback_makes_the_module_refuse(
    through: str, fresh: Fresh, wrapped: list[Faults], tmp_path: Path
) -> None:
    def start() -> Scene:
        compiled = fresh("mixed")
        refitkit.refit(compiled, _full(2))
        return Scene(compiled, _full(1), {"inputs": CASE.inputs(), "reference": torch.zeros(1)})

    first = start()
    counting = Faults()
    wrapped.append(counting)
    with pytest.raises(refitkit.VerificationError):
        first.refit(counting)
    wrapped.append(Faults())
    old = _probed(first.compiled)
    lost = Counter()
    for number, label in enumerate(counting.calls):
        compiled = start().compiled
        failing = Scene(compiled, _full(1), first.how)
        faults = Faults(number, after=number % 2 == 1)
        wrapped.append(faults)
        with pytest.raises(refitkit.RefitError) as raised:
            failing.refit(faults)
        wrapped.append(Faults())
        if isinstance(raised.value, refitkit.ModuleLostError):
            lost[label] += 1
            assert label in str(raised.value)
            _assert_refuses(compiled, tmp_path)
        else:
            assert _probed(compiled) == old
    assert "refitkit_weights_changed.rolled-back" in lost
    del lost["refitkit_weights_changed.rolled-back"]
    needed, possible = ROLLBACKS[through]
    assert {needed} <= lost.keys() <= {needed, *possible}


ROLLBACKS = {
    C_INTERFACE: ("StagedSet.rollback", {"PublishingEngine.go_back"}),
    BINDING: (
        "StagedSwap.rollback",
        {
            "SwappingEngine.restore_live",
            "AOTInductorEngine.drain",
            "runner.swap_constant_buffer",
            "runner.extract_constants_map",
        },
    ),
}


def _assert_refuses(compiled: refitkit.CompiledModule, folder: Path) -> None:
    path = folder / "lost.refit"
    attempts: list[Callable[[], Any]] = [
        lambda: compiled(*CASE.args()),
        lambda: compiled.read("kept"),
        lambda: compiled.save(path),
        lambda: refitkit.refit(compiled, _full(1)),
        lambda: refitkit.refit(compiled, _full(1), copy=True),
        lambda: refitkit.verify(compiled, _full(1)),
        compiled.free_spare,
    ]
    for attempt in attempts:
        with pytest.raises(refitkit.ModuleLostError, match="Load or compile it again"):
            attempt()
    assert not path.exists()


# -- interrupts ---------------------------------------------------------------------------------

_TRACED = {
    str(PACKAGE / "pipeline" / "transaction.py"),
    str(PACKAGE / "pipeline" / "gate.py"),
    str(PACKAGE / "pipeline" / "refit.py"),
    str(PACKAGE / "pipeline" / "stage.py"),
    str(PACKAGE / "builtin" / "aotinductor" / "engine.py"),
    str(PACKAGE / "builtin" / "aotinductor" / "native.py"),
    str(PACKAGE / "builtin" / "aotinductor" / "publishing.py"),
}


def _points(at: int | None) -> Points:
    return Points(at, _TRACED.__contains__)


HOW: dict[str, dict[str, Any]] = {
    "full": {},
    "partial": {"partial": True, "verify": "none"},
    "rolled back": {"inputs": CASES["small"].inputs(), "reference": torch.zeros(1)},
}


@pytest.mark.usefixtures("through")
@pytest.mark.parametrize("name", HOW)
def test_an_interrupt_anywhere_never_mixes_weights(
    name: str, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old weights or new ones; nobody waits for ever; the next refit is as any."""
    # Python ignores an interrupt that comes while an object goes: it has nobody to raise it to.
    ignored: list[type] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda about: ignored.append(about.exc_type))
    pipeline, compiled = refitkit.Pipeline(), fresh("small")
    states = [CASES["small"].model(seed).state_dict() for seed in (1, 2)]
    old, new = ({name: bits(tensor) for name, tensor in state.items()} for state in states)
    pipeline.refit(compiled, states[0])
    with _points(None) as points, contextlib.suppress(refitkit.VerificationError):
        pipeline.refit(compiled, states[1], **HOW[name])
    pipeline.refit(compiled, states[0])
    assert points.count > 100
    problems = []
    for number in range(points.count):
        with _points(number) as points:
            try:
                pipeline.refit(compiled, states[1], **HOW[name])
            except (Interrupt, refitkit.RefitError) as exc:
                ended = type(exc).__name__
            else:
                ended = "nothing raised"
        raised = ended == "Interrupt" or ignored == [Interrupt]
        ignored.clear()
        problem = _after_an_interrupt(compiled, old, new, states[0])
        if problem or (points.where and not raised):
            problems.append(f"{points.where}: {ended}; {problem}")
        if problem:
            compiled = fresh("small")
            pipeline.refit(compiled, states[0])
    assert not problems, "\n".join(problems)


def _after_an_interrupt(
    compiled: refitkit.CompiledModule,
    old: dict[str, bytes],
    new: dict[str, bytes],
    state: dict[str, torch.Tensor],
) -> str:
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        return "gradients stay switched off"
    if compiled.gate.lost:
        return "lost"
    version, found = compiled.version, in_a_thread(lambda: slots_of(compiled))
    if found not in (old, new):
        return "calls wait for ever" if found is None else "a mixture"
    if in_a_thread(lambda: refitkit.refit(compiled, state)) is None:
        return "refits wait for ever"
    try:
        refitkit.refit(compiled, state)
    except refitkit.RefitError as exc:
        return f"no more refits: {exc.message}"
    right = slots_of(compiled) == old and compiled.version == version + 2
    return "" if right else "the next refit went wrong"


# -- threads ------------------------------------------------------------------------------------

both_ways = pytest.mark.usefixtures("through")


def _while_called(compiled: refitkit.CompiledModule, work: Callable[[], Any]) -> set[str]:
    """What threads that call the module all the time are answered while some work is done."""
    case, seen, errors = CASES["wide"], set(), []
    started, stop = threading.Barrier(3), threading.Event()

    def call() -> None:
        try:
            started.wait(SECONDS)
            while not stop.is_set():
                seen.add(digest(compiled(*case.args())))
        except Exception as exc:  # noqa: BLE001 - told to the test
            errors.append(exc)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        started.wait(SECONDS)
        work()
    finally:
        stop.set()
        for thread in threads:
            thread.join(SECONDS)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)
    return seen


def _answers(fresh: Fresh, *seeds: int) -> list[str]:
    """What the module ``wide`` answers with the weights of each seed."""
    case, compiled, answers = CASES["wide"], fresh("wide"), []
    for seed in seeds:
        refitkit.refit(compiled, case.model(seed))
        answers.append(digest(compiled(*case.args())))
    return answers


@both_ways
def test_calls_during_refits_see_whole_weights(fresh: Fresh) -> None:
    case, compiled = CASES["wide"], fresh("wide")
    states = [case.model(seed).state_dict() for seed in (0, 1)]
    a, b = _answers(fresh, 0, 1)
    assert a != b

    def work() -> None:
        for number in range(12):
            refitkit.refit(compiled, states[1 - number % 2])
            assert digest(compiled(*case.args())) == (a, b)[1 - number % 2]

    assert _while_called(compiled, work) == {a, b}


@both_ways
def test_calls_never_see_weights_that_were_rolled_back(fresh: Fresh) -> None:
    case, compiled = CASES["wide"], fresh("wide")
    state, (a,) = case.model(1).state_dict(), _answers(fresh, 0)

    def work() -> None:
        for _ in range(6):
            with pytest.raises(refitkit.VerificationError):
                refitkit.refit(compiled, state, inputs=case.inputs(), reference=torch.zeros(1))

    assert _while_called(compiled, work) == {a}


class _CallsFromElsewhere:
    """After the commit, starts another thread's call; then refuses the commit."""

    name = "calls-from-elsewhere"

    def __init__(self, compiled: refitkit.CompiledModule) -> None:
        self.compiled, self.answers, self.own = compiled, [], ""
        self.thread = threading.Thread(target=self._call)
        self._calling = threading.Event()

    def _call(self) -> None:
        self._calling.set()
        self.answers.append(digest(self.compiled(*CASES["wide"].args())))

    @refitkit.hookimpl
    def refitkit_weights_changed(self, report: Any) -> None:
        if report.outcome != "committed":
            return
        self.thread.start()
        assert self._calling.wait(SECONDS)
        self.thread.join(0.2)  # were it let in, it would be done by then
        self.own = digest(self.compiled(*CASES["wide"].args()))
        raise Fault("no")


@both_ways
def test_calls_wait_for_the_verdict_and_those_of_the_transaction_do_not(fresh: Fresh) -> None:
    compiled = fresh("wide")
    a, b = _answers(fresh, 0, 1)
    plugin = _CallsFromElsewhere(compiled)
    with pytest.raises(refitkit.PluginError):
        refitkit.Pipeline(plugins=[plugin]).refit(compiled, CASES["wide"].model(1))
    plugin.thread.join(SECONDS)
    assert plugin.answers == [a]
    assert plugin.own == b


@both_ways
def test_refits_from_two_threads_take_turns(fresh: Fresh) -> None:
    case, compiled = CASES["wide"], fresh("wide")
    states = [case.model(seed).state_dict() for seed in (1, 2)]
    refitkit.refit(compiled, states[0])
    answers = _answers(fresh, 1, 2)
    errors: list[BaseException] = []

    def refits(state: dict[str, torch.Tensor]) -> None:
        try:
            for number in range(8):
                refitkit.refit(compiled, state, inputs=case.inputs() if number % 4 == 0 else None)
        except BaseException as exc:  # noqa: BLE001 - told to the test
            errors.append(exc)

    def work() -> None:
        threads = [threading.Thread(target=refits, args=(state,)) for state in states]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4 * SECONDS)
        assert not any(thread.is_alive() for thread in threads)

    seen = _while_called(compiled, work)
    assert not errors
    assert seen <= set(answers)
    assert compiled.version == 17
    assert digest(compiled(*case.args())) in answers


@both_ways
def test_saving_and_copying_during_refits_takes_whole_weights(fresh: Fresh, tmp_path: Path) -> None:
    case, compiled = CASES["wide"], fresh("wide")
    states = [case.model(seed).state_dict() for seed in (1, 2)]
    whole = [{name: bits(tensor) for name, tensor in state.items()} for state in states]
    refitkit.refit(compiled, states[0])
    stop = threading.Event()

    def refits() -> None:
        number = 0
        while not stop.is_set():
            refitkit.refit(compiled, states[number % 2], verify="none")
            number += 1

    thread = threading.Thread(target=refits)
    thread.start()
    try:
        for number in range(5):
            compiled.save(tmp_path / f"{number}.refit")
            assert slots_of(refitkit.load(tmp_path / f"{number}.refit")) in whole
            assert slots_of(refitkit.Pipeline().copy(compiled)) in whole
    finally:
        stop.set()
        thread.join(SECONDS)
    assert not thread.is_alive()
