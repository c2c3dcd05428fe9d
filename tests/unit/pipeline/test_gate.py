"""Who waits for whom. Threads meet at locks that tell when somebody waits: no sleeps.

``PATIENCE`` only turns a deadlock into a failure.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

import refitkit
from refitkit.errors import ModuleLostError, RefitInProgressError
from refitkit.model import VerificationResult
from refitkit.pipeline import Pipeline
from refitkit.pipeline import gate as gates
from refitkit.pipeline.gate import Gate
from tests.fakes import FakeModule, FakePlugin, make_module, same_state, weights_for
from tests.interrupting import Interrupt, Points, in_a_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from threading import Lock

PATIENCE = 20.0


class Watched:
    """Counts who waits."""

    def __init__(self) -> None:
        self.waiting = threading.Semaphore(0)
        self.interrupt: BaseException | None = None

    def somebody_waits(self) -> None:
        assert self.waiting.acquire(timeout=PATIENCE), "nobody waits"

    def nobody_waits(self) -> None:
        assert not self.waiting.acquire(blocking=False), "somebody waits"

    def begin(self) -> None:
        """Called by who is about to wait; raises what the test wants to interrupt it with."""
        self.waiting.release()
        if self.interrupt is not None:
            error, self.interrupt = self.interrupt, None
            raise error


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def gate(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """A gate at which waiting is counted."""
    wait = gates.wait_for

    def wait_for(turn: Lock) -> None:
        if turn.locked():
            watched.begin()
        wait(turn)

    monkeypatch.setattr(gates, "wait_for", wait_for)
    return Gate()


class Threads:
    """Threads whose results and errors are asked for."""

    def __init__(self) -> None:
        self.started: list[threading.Thread] = []

    def run(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Start it; what is returned waits for its result, or raises its error."""
        outcome: list[Any] = []

        def work() -> None:
            try:
                outcome.append((function(), None))
            except BaseException as exc:  # noqa: BLE001 - handed over
                outcome.append((None, exc))

        thread = threading.Thread(target=work, daemon=True)
        self.started.append(thread)
        thread.start()

        def result() -> Any:
            thread.join(PATIENCE)
            assert outcome, "the thread hangs"
            value, error = outcome[0]
            if error is not None:
                raise error
            return value

        return result


@pytest.fixture
def threads() -> Iterator[Threads]:
    made = Threads()
    yield made
    for thread in made.started:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in made.started), "a thread hangs"


def reached(event: threading.Event) -> None:
    assert event.wait(PATIENCE), "it never came so far"


def go_through(gate: Gate) -> str:
    return gate.call(lambda: "through")


def failing(why: str) -> None:
    raise ValueError(why)


def must_not_run() -> None:
    raise AssertionError("it went through")


def test_calls_go_through_side_by_side(gate: Gate, threads: Threads, watched: Watched) -> None:
    together = threading.Barrier(3, timeout=PATIENCE)

    for result in [threads.run(lambda: gate.call(together.wait)) for _ in range(3)]:
        result()
    watched.nobody_waits()


def test_calls_wait_while_one_has_the_gate_alone(
    gate: Gate, threads: Threads, watched: Watched
) -> None:
    order: list[str] = []

    def alone() -> Callable[[], Any]:
        result = threads.run(lambda: gate.call(lambda: order.append("call")))
        watched.somebody_waits()
        order.append("verdict")
        return result

    gate.exclusive(alone)()
    assert order == ["verdict", "call"]


def test_the_one_inside_passes_as_often_as_it_likes(gate: Gate, watched: Watched) -> None:
    gate.exclusive(lambda: gate.call(lambda: gate.call(watched.nobody_waits)))


def test_going_alone_waits_for_running_calls(
    gate: Gate, threads: Threads, watched: Watched
) -> None:
    order: list[str] = []

    def call() -> Callable[[], Any]:
        result = threads.run(lambda: gate.exclusive(lambda: order.append("commit")))
        watched.somebody_waits()
        order.append("call")
        return result

    gate.call(call)()
    assert order == ["call", "commit"]


def test_a_new_call_waits_behind_a_commit_that_waits(
    gate: Gate, threads: Threads, watched: Watched
) -> None:
    """Otherwise a stream of calls would keep a refit out for ever."""
    order: list[str] = []

    def running() -> list[Callable[[], Any]]:
        results = [threads.run(lambda: gate.exclusive(lambda: order.append("commit")))]
        watched.somebody_waits()
        results.append(threads.run(lambda: gate.call(lambda: order.append("call"))))
        watched.somebody_waits()
        return results

    for result in gate.call(running):
        result()
    assert order == ["commit", "call"]


def test_two_cannot_be_alone(gate: Gate, threads: Threads, watched: Watched) -> None:
    order: list[str] = []

    def first() -> Callable[[], Any]:
        result = threads.run(lambda: gate.exclusive(lambda: order.append("second")))
        watched.somebody_waits()
        order.append("first")
        return result

    gate.exclusive(first)()
    assert order == ["first", "second"]


def test_a_call_that_fails_is_over(gate: Gate, watched: Watched) -> None:
    with pytest.raises(ValueError, match="in the call"):
        gate.call(lambda: failing("in the call"))
    gate.exclusive(watched.nobody_waits)


def test_the_gate_opens_again_after_a_failure(gate: Gate, threads: Threads) -> None:
    with pytest.raises(ValueError, match="alone"):
        gate.exclusive(lambda: failing("alone"))
    assert threads.run(lambda: go_through(gate))() == "through"


def test_poison_wakes_those_who_wait(gate: Gate, threads: Threads, watched: Watched) -> None:
    def alone() -> list[Callable[[], Any]]:
        results = [threads.run(lambda: go_through(gate)) for _ in range(3)]
        for _ in results:
            watched.somebody_waits()
        gate.poison("no way back")
        return results

    for result in gate.exclusive(alone):
        with pytest.raises(ModuleLostError, match="no way back"):
            result()


def test_a_poisoned_gate_lets_nobody_through(gate: Gate) -> None:
    assert not gate.lost
    gate.poison("no way back")
    assert gate.lost
    for closed in (gate.call, gate.refit):
        with pytest.raises(ModuleLostError, match="no way back"):
            closed(lambda: None)
    with pytest.raises(ModuleLostError):
        gate.check()


def test_poison_wakes_a_refit_that_waits(gate: Gate, threads: Threads, watched: Watched) -> None:
    def first() -> Callable[[], Any]:
        result = threads.run(lambda: gate.refit(must_not_run))
        watched.somebody_waits()
        gate.poison("no way back")
        return result

    with pytest.raises(ModuleLostError):
        gate.refit(first)()


def test_refits_of_two_threads_come_one_after_the_other(
    gate: Gate, threads: Threads, watched: Watched
) -> None:
    order: list[str] = []

    def first() -> Callable[[], Any]:
        result = threads.run(lambda: gate.refit(lambda: order.append("second")))
        watched.somebody_waits()
        order.append("first")
        return result

    gate.refit(first)()
    assert order == ["first", "second"]


def test_calls_go_on_while_a_refit_prepares(gate: Gate, threads: Threads) -> None:
    def prepare() -> None:
        assert threads.run(lambda: go_through(gate))() == "through"
        assert go_through(gate) == "through"

    gate.refit(prepare)


def test_a_refit_inside_a_refit_is_an_error(gate: Gate) -> None:
    def refit() -> None:
        with pytest.raises(RefitInProgressError):
            gate.refit(must_not_run)

    gate.refit(refit)
    gate.refit(lambda: gate.exclusive(refit))
    assert gate.refit(lambda: "again") == "again"


def test_a_refit_that_failed_is_over(gate: Gate, threads: Threads) -> None:
    with pytest.raises(ValueError, match="no"):
        gate.refit(lambda: failing("no"))

    def again() -> str:
        return gate.refit(lambda: "again")

    assert again() == "again"
    assert threads.run(again)() == "again"


def test_an_interrupt_while_waiting_for_a_call_opens_the_gate(
    gate: Gate, threads: Threads, watched: Watched
) -> None:
    inside, leave = threading.Event(), threading.Event()

    def call() -> None:
        inside.set()
        reached(leave)

    running = threads.run(lambda: gate.call(call))
    reached(inside)
    watched.interrupt = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        gate.exclusive(must_not_run)
    assert threads.run(lambda: go_through(gate))() == "through"
    leave.set()
    running()
    assert gate.exclusive(lambda: "alone") == "alone"


def test_an_interrupt_while_another_is_alone_leaves_that_one_alone(
    gate: Gate, threads: Threads, watched: Watched
) -> None:
    inside, leave = threading.Event(), threading.Event()
    order: list[str] = []

    def hold() -> None:
        inside.set()
        reached(leave)
        order.append("held")

    holder = threads.run(lambda: gate.exclusive(hold))
    reached(inside)
    watched.interrupt = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        gate.exclusive(must_not_run)
    watched.somebody_waits()

    caller = threads.run(lambda: gate.call(lambda: order.append("call")))
    watched.somebody_waits()
    leave.set()
    holder()
    caller()
    assert order == ["held", "call"]


def test_a_call_inside_a_call_passes_although_a_commit_waits(
    gate: Gate, threads: Threads, watched: Watched
) -> None:
    """A listener that calls the module while it is saved, say."""
    inside, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def nested() -> None:
        inside.set()
        reached(go_on)
        gate.call(lambda: order.append("nested"))

    caller = threads.run(lambda: gate.call(nested))
    reached(inside)
    committer = threads.run(lambda: gate.exclusive(lambda: order.append("commit")))
    watched.somebody_waits()
    go_on.set()
    caller()
    committer()
    assert order == ["nested", "commit"]


def test_a_refit_inside_a_call_is_an_error(gate: Gate, threads: Threads) -> None:
    """It would wait for its own call."""

    def refit_inside() -> None:
        gate.call(lambda: gate.refit(lambda: gate.exclusive(must_not_run)))

    with pytest.raises(RefitInProgressError):
        threads.run(refit_inside)()


PASSAGES: dict[str, Callable[[Gate], Any]] = {
    "call": lambda gate: gate.call(lambda: None),
    "nested call": lambda gate: gate.call(lambda: gate.call(lambda: None)),
    "alone": lambda gate: gate.exclusive(lambda: gate.call(lambda: None)),
    "refit": lambda gate: gate.refit(lambda: gate.exclusive(lambda: None)),
}


@pytest.mark.parametrize("lines", [False, True], ids=["signals", "lines"])
@pytest.mark.parametrize("passage", PASSAGES)
def test_an_interrupt_anywhere_leaves_the_gate_open(passage: str, lines: bool) -> None:
    """Also where no signal can come: at the start of each line."""
    within = str(gates.__file__).__eq__
    gate = Gate()
    with Points(None, within, lines=lines) as points:
        PASSAGES[passage](gate)
    assert points.count > 5
    for at in range(points.count):
        gate = Gate()
        with (
            pytest.raises(Interrupt) as caught,  # it holds the frames that were interrupted
            Points(at, within, lines=lines) as interrupted,
        ):
            PASSAGES[passage](gate)
        assert not gates._unfinished(gate._call_turns), interrupted.where
        for other in PASSAGES.values():
            assert in_a_thread(lambda: [other(gate)]) == [None], interrupted.where  # noqa: B023
            assert other(gate) is None, interrupted.where
        assert caught.value is not None


def test_an_interrupt_in_a_call_is_over_for_a_commit_that_waits(
    gate: Gate, threads: Threads, watched: Watched
) -> None:
    order: list[str] = []

    def call() -> None:
        committer.append(threads.run(lambda: gate.exclusive(lambda: order.append("commit"))))
        watched.somebody_waits()
        raise Interrupt

    committer: list[Callable[[], Any]] = []
    with pytest.raises(Interrupt):
        gate.call(call)
    committer[0]()
    assert order == ["commit"]


# -- the same through a module ----------------------------------------------------------------


class Guest:
    """A verifier that runs a function in place of a verdict."""

    name = "guest"

    def __init__(self, function: Callable[[FakeModule], Any]) -> None:
        self.function = function

    def prepare(self, request: Any) -> Any:
        def judge(module: Any) -> VerificationResult:
            self.function(module)
            return VerificationResult(verifier=self.name, ok=True)

        return judge


class GuestPlugin:
    """Offers the verifier ``guest``."""

    name = "guests"

    def __init__(self, function: Callable[[FakeModule], Any]) -> None:
        self.guest = Guest(function)

    @refitkit.hookimpl
    def refitkit_verifiers(self) -> list[Guest]:
        return [self.guest]


class Stage:
    """A module whose gate is watched, and a pipeline whose verifier runs a function."""

    def __init__(self, gate: Gate, function: Callable[[FakeModule], Any] = lambda module: None):
        self.module = make_module(2)
        self.pipeline = Pipeline(plugins=[FakePlugin(), GuestPlugin(function)])
        self.compiled = self.pipeline.load(self.module)
        self.compiled.gate = gate

    def refit(self, fill: float = 100.0) -> Any:
        weights = weights_for(self.module, fill)
        return self.pipeline.refit(self.compiled, weights, verify="guest")

    def answer(self, fill: float) -> dict[str, Any]:
        new = weights_for(self.module, fill)
        return {f"{name[:2]}/{name}": value for name, value in new.items()}


def test_a_call_during_a_refit_answers_with_the_new_weights(
    gate: Gate, threads: Threads, watched: Watched
) -> None:
    calls: list[Callable[[], Any]] = []

    def meanwhile(module: FakeModule) -> None:
        calls.append(threads.run(stage.compiled))
        watched.somebody_waits()

    stage = Stage(gate, meanwhile)
    stage.refit()
    assert same_state(calls[0](), stage.answer(100.0))


def test_a_call_during_a_refit_that_fails_answers_with_the_old_weights(
    gate: Gate, threads: Threads, watched: Watched
) -> None:
    calls: list[Callable[[], Any]] = []

    def meanwhile(module: FakeModule) -> None:
        calls.append(threads.run(stage.compiled))
        watched.somebody_waits()
        raise KeyboardInterrupt

    stage = Stage(gate, meanwhile)
    before = stage.module.holds()
    with pytest.raises(KeyboardInterrupt):
        stage.refit()
    assert same_state(calls[0](), before)


def test_reading_and_saving_wait_for_the_verdict_too(
    gate: Gate, threads: Threads, watched: Watched, tmp_path: Any
) -> None:
    results: list[Callable[[], Any]] = []

    def meanwhile(module: FakeModule) -> None:
        results.append(threads.run(lambda: stage.compiled.read("e0.bias").tolist()))
        watched.somebody_waits()
        results.append(threads.run(lambda: stage.compiled.save(tmp_path / "saved")))
        watched.somebody_waits()
        assert not (tmp_path / "saved").exists()

    stage = Stage(gate, meanwhile)
    stage.refit()
    assert results[0]() == [101.0, 101.0]
    results[1]()
    assert (tmp_path / "saved").exists()


def test_the_refitting_thread_calls_the_module_with_the_new_weights(gate: Gate) -> None:
    answers: list[Any] = []
    stage = Stage(gate, lambda module: answers.append(stage.compiled()))
    stage.refit()
    assert same_state(answers[0], stage.answer(100.0))


def test_a_running_call_is_waited_for(gate: Gate, threads: Threads, watched: Watched) -> None:
    inside, leave = threading.Event(), threading.Event()
    stage = Stage(gate)
    before = stage.module.holds()

    def linger() -> None:
        inside.set()
        reached(leave)

    stage.module.on_run = linger
    caller = threads.run(stage.compiled)
    reached(inside)
    stage.module.on_run = lambda: None
    refit = threads.run(stage.refit)
    watched.somebody_waits()
    assert same_state(stage.module.holds(), before)
    leave.set()
    assert same_state(caller(), before)
    assert refit().report.outcome == "committed"


def test_a_refit_that_is_interrupted_while_it_waits_for_a_call(
    gate: Gate, threads: Threads, watched: Watched
) -> None:
    inside, leave = threading.Event(), threading.Event()
    stage = Stage(gate)
    before = stage.module.holds()

    def linger() -> None:
        inside.set()
        reached(leave)

    stage.module.on_run = linger
    caller = threads.run(stage.compiled)
    reached(inside)
    stage.module.on_run = lambda: None
    watched.interrupt = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        stage.refit()
    assert [one.did for one in stage.module.staged()] == [["discard"]] * 2
    leave.set()
    assert same_state(caller(), before)
    assert same_state(stage.compiled(), before)
    assert stage.refit().report.version == 1


def test_a_refit_from_inside_a_call_is_refused(gate: Gate) -> None:
    stage = Stage(gate)
    before = stage.module.holds()
    stage.module.on_run = stage.refit
    with pytest.raises(RefitInProgressError):
        stage.compiled()
    stage.module.on_run = lambda: None
    assert stage.module.staged() == []
    assert same_state(stage.compiled(), before)


def test_a_refit_from_inside_a_refit_leaves_both_sound(gate: Gate) -> None:
    stage = Stage(gate, lambda module: stage.refit(7.0))
    before = stage.module.holds()
    with pytest.raises(RefitInProgressError):
        stage.refit()
    assert same_state(stage.compiled(), before)


def test_two_refits_at_once_end_as_the_later_one(
    gate: Gate, threads: Threads, watched: Watched
) -> None:
    others: list[Callable[[], Any]] = []

    def meanwhile(module: FakeModule) -> None:
        if not others:
            others.append(threads.run(lambda: stage.refit(7.0)))
            watched.somebody_waits()

    stage = Stage(gate, meanwhile)
    assert stage.refit(100.0).report.version == 1
    assert others[0]().report.version == 2
    assert same_state(stage.compiled(), stage.answer(7.0))
    assert stage.compiled.version == 2


def test_two_modules_are_refitted_side_by_side(threads: Threads) -> None:
    together = threading.Barrier(2, timeout=PATIENCE)
    stages = [Stage(Gate(), lambda module: together.wait()) for _ in range(2)]
    for result in [threads.run(stage.refit) for stage in stages]:
        assert result().report.outcome == "committed"


def test_many_calls_and_refits_never_see_a_mixture(threads: Threads) -> None:
    stage = Stage(Gate())
    stage.refit(0.0)
    right = [stage.answer(float(fill)) for fill in range(4)]
    stop = threading.Event()

    def call() -> int:
        wrong = 0
        while not stop.is_set():
            answer = stage.compiled()
            wrong += not any(same_state(answer, one) for one in right)
        return wrong

    callers = [threads.run(call) for _ in range(3)]
    with ExitStack() as stack:
        stack.callback(stop.set)
        for fill in [1.0, 2.0, 3.0, 0.0] * 5:
            stage.refit(fill)
    assert [caller() for caller in callers] == [0, 0, 0]
