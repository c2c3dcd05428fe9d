"""Modules whose hooks use one another while they commit: one thread gives way, none waits for ever.

``PATIENCE`` only turns a deadlock into a failure.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

import refitkit
from refitkit.errors import DeadlockError
from refitkit.pipeline import Pipeline
from refitkit.pipeline.gate import Gate, _cycle, _deadlock, _waits
from tests.fakes import FakeModule, FakePlugin, make_module, same_state, weights_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from refitkit.pipeline import CompiledModule

PATIENCE = 30.0


def in_threads(*actions: Callable[[], Any]) -> list[BaseException | None]:
    """Run all at once; what each raised."""
    raised: dict[int, BaseException | None] = {}

    def work(number: int) -> None:
        try:
            actions[number]()
        except BaseException as exc:  # noqa: BLE001 - handed over
            raised[number] = exc
        else:
            raised[number] = None

    threads = [
        threading.Thread(target=work, args=(n,), name=f"worker-{n}", daemon=True)
        for n in range(len(actions))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(raised) == len(actions), "threads wait for ever"
    assert not _waits
    return [raised[number] for number in range(len(actions))]


class Meeting:
    """A barrier that is met once by each thread; who comes again passes."""

    def __init__(self, parties: int) -> None:
        self._barrier = threading.Barrier(parties, timeout=PATIENCE)
        self._met: set[int] = set()

    def __call__(self) -> None:
        me = threading.get_ident()
        if me not in self._met:
            self._met.add(me)
            self._barrier.wait()


class Using:
    """A plugin that uses another module whenever the weights of its own change."""

    name = "using"

    def __init__(self, meeting: Callable[[], None], use: Callable[[], Any]) -> None:
        self.meeting, self.use = meeting, use
        self.outcomes: list[str] = []

    @refitkit.hookimpl
    def refitkit_weights_changed(self, report: Any) -> None:
        self.outcomes.append(report.outcome)
        self.meeting()
        self.use()


@dataclass
class Member:
    """One of several modules; its hook uses the next one."""

    module: FakeModule
    compiled: CompiledModule
    plugin: Using | None = None

    def refit(self) -> Any:
        assert self.plugin is not None
        pipeline = Pipeline(plugins=[FakePlugin(), self.plugin])
        return pipeline.refit(self.compiled, weights_for(self.module, 100.0), verify="none")

    def answer(self, fill: float | None) -> dict[str, Any]:
        if fill is None:
            return self.module.holds()
        new = weights_for(self.module, fill)
        return {f"{name[:2]}/{name}": value for name, value in new.items()}


PLAIN = Pipeline(plugins=[FakePlugin()])

USES: dict[str, Callable[[Member, Any], Callable[[], Any]]] = {
    "call": lambda other, path: other.compiled,
    "read": lambda other, path: lambda: other.compiled.read("e0.bias"),
    "save": lambda other, path: lambda: other.compiled.save(path),
}


def ring_of(size: int, use: str = "call", path: Any = None) -> list[Member]:
    members = []
    for _ in range(size):
        module = make_module(1)
        members.append(Member(module, PLAIN.load(module)))
    meeting = Meeting(size)
    for number, member in enumerate(members):
        other = members[(number + 1) % size]
        member.plugin = Using(meeting, USES[use](other, path and path / f"{number}"))
    return members


def check(members: list[Member], raised: list[BaseException | None]) -> None:
    """One was given up and holds its old weights; all others hold their new ones."""
    assert [type(one) for one in raised if one is not None] == [DeadlockError]
    for member, error in zip(members, raised, strict=True):
        old = make_module(1).holds()
        assert member.compiled.version == (error is None)
        wanted = member.answer(100.0) if error is None else old
        assert same_state(member.compiled(), wanted)
        assert member.plugin is not None
        assert member.plugin.outcomes == ["committed", *["rolled-back"] * (error is not None)]


@pytest.mark.parametrize("use", sorted(USES))
@pytest.mark.parametrize("size", [2, 3])
def test_hooks_that_use_one_another(size: int, use: str, tmp_path: Any) -> None:
    members = ring_of(size, use, tmp_path)
    raised = in_threads(*[member.refit for member in members])
    check(members, raised)
    for member in members:
        assert member.plugin is not None
        member.plugin.use = member.plugin.meeting = lambda: None
        member.refit()
        assert same_state(member.compiled(), member.answer(100.0))


def test_the_error_lists_who_waits_for_whom() -> None:
    members = ring_of(2)
    (error,) = [one for one in in_threads(*[member.refit for member in members]) if one]
    assert isinstance(error, DeadlockError)
    found = {(problem.subject, problem.kind, problem.found) for problem in error.problems}
    assert found == {
        ("thread 'worker-0'", "waits", "for a commit of thread 'worker-1'"),
        ("thread 'worker-1'", "waits", "for a commit of thread 'worker-0'"),
    }
    assert error.hint


def test_hooks_that_refit_one_another_do_not_wait_for_ever() -> None:
    """A hook that fails while old weights come back loses its module: it says so."""
    members = ring_of(2)
    for number, member in enumerate(members):
        other = members[1 - number]
        assert member.plugin is not None
        new = weights_for(other.module, 7.0)

        def use(other: Member = other, new: Any = new, plugin: Using = member.plugin) -> None:
            if plugin.outcomes[-1] == "committed":
                PLAIN.refit(other.compiled, new, verify="none")

        member.plugin.use = use
    raised = in_threads(*[member.refit for member in members])
    assert [type(one) for one in raised if one is not None] == [DeadlockError]
    assert not any(member.compiled.gate.lost for member in members)
    (winner,) = [n for n, one in enumerate(raised) if one is None]
    assert members[winner].compiled.version == 1
    # its hook refitted the other one, once that had its old weights back
    assert same_state(members[1 - winner].compiled(), members[1 - winner].answer(7.0))


def test_a_hook_that_uses_a_module_that_nobody_refits_just_does() -> None:
    first, second = ring_of(2)
    assert first.plugin is not None
    first.plugin.meeting = lambda: None
    assert in_threads(first.refit) == [None]
    assert same_state(second.compiled(), make_module(1).holds())


def test_a_hook_waits_for_a_commit_that_does_not_wait_for_it() -> None:
    first, second = ring_of(2)
    assert second.plugin is not None
    second.plugin.use = lambda: None
    assert in_threads(first.refit, second.refit) == [None, None]


def test_calls_that_use_the_other_module_while_both_are_refitted() -> None:
    """Refits wait for the calls, which wait for the refits."""
    a, b = Gate(), Gate()
    inside, waiting = threading.Barrier(2, timeout=PATIENCE), threading.Barrier(4, timeout=PATIENCE)

    def call(one: Gate, other: Gate) -> None:
        def nested() -> None:
            inside.wait()
            waiting.wait()
            while not other._commit_turns:
                pass
            other.call(int)

        one.call(nested)

    def refit(gate: Gate) -> None:
        waiting.wait()
        gate.refit(lambda: gate.exclusive(int))

    actions = [lambda: call(a, b), lambda: call(b, a), lambda: refit(a), lambda: refit(b)]
    raised = in_threads(*actions)
    assert [type(one) for one in raised if one is not None] == [DeadlockError]
    for gate in (a, b):
        gate.refit(lambda gate=gate: gate.exclusive(int))  # type: ignore[misc]


def test_a_wait_that_is_over_is_no_ring() -> None:
    gate, turn, me = Gate(), threading.Lock(), threading.get_ident()
    try:
        _waits[me] = turn
        assert _cycle(me) == []
        gate._commit_turns[turn] = me
        assert _cycle(me) == [], "nobody holds it"
        with turn:
            ring = _cycle(me)
            assert [one.thread for one in ring] == [me]
            assert "waits" in str(_deadlock(me, ring))
    finally:
        _waits.clear()
