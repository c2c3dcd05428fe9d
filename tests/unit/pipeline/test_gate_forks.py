"""What a forked child finds of the gate of a module, and what it can do with the module."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from refitkit.pipeline.gate import Gate, _unfinished
from tests.fakes import END, same_state
from tests.forking import forked, raised_by
from tests.unit.pipeline.test_transaction import Scene

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Inside:
    """A thread that is inside something."""

    def __init__(self, passage: Callable[[Callable[[], Any]], Any]) -> None:
        self._is_in, self._leave = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: passage(self._stay), daemon=True)

    def _stay(self) -> None:
        self._is_in.set()
        self._leave.wait()

    def __enter__(self) -> None:
        self._thread.start()
        self._is_in.wait()

    def __exit__(self, *error: object) -> None:
        self._leave.set()
        self._thread.join()


def passes(gate: Gate) -> list[str]:
    """For each passage the error that it raises, or nothing."""
    return [raised_by(lambda one=one: one(int)) for one in (gate.call, gate.refit, gate.exclusive)]


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    assert passes(made) == ["", "", ""], "the parent's own gate"


@pytest.mark.parametrize("passage", ["call", "refit"])
def test_a_child_does_not_wait_for_a_thread_of_its_parent(gate: Gate, passage: str) -> None:
    with Inside(getattr(gate, passage)):
        assert forked(lambda: passes(gate)) == ["", "", ""]


def test_a_child_refuses_weights_from_the_middle_of_a_commit(gate: Gate) -> None:
    with Inside(gate.exclusive):
        assert forked(lambda: passes(gate)) == ["ModuleLostError", "ModuleLostError", ""]


def test_a_commit_that_waits_for_a_call_has_not_begun(gate: Gate) -> None:
    gate.exclusive(int)  # one that is over must not be taken for it
    with ThreadPoolExecutor(1) as pool, Inside(gate.call):
        waiting = pool.submit(gate.exclusive, int)
        while not gate._commit_turns:
            time.sleep(0)
        assert forked(lambda: passes(gate)) == ["", "", ""]
        assert not waiting.done()


@pytest.mark.parametrize("passage", ["call", "refit", "exclusive"])
def test_the_thread_that_forks_keeps_its_turn(gate: Gate, passage: str) -> None:
    def turns() -> list[int]:
        return [
            len(_unfinished(one))
            for one in (gate._call_turns, gate._refit_turns, gate._commit_turns)
        ]

    def fork() -> list[list[int]]:
        return [turns(), forked(turns)]

    before, after = getattr(gate, passage)(fork)
    assert before == after
    assert sum(before) == 1
    assert not gate.lost


def test_a_child_of_a_child_refuses_it_too(gate: Gate) -> None:
    with Inside(gate.exclusive):
        assert forked(lambda: forked(lambda: raised_by(lambda: gate.call(int)))) == (
            "ModuleLostError"
        )


# -- the same through a module --------------------------------------------------------------------


def verbs(scene: Scene, path: str) -> dict[str, Callable[[], Any]]:
    compiled = scene.compiled
    return {
        "call": compiled,
        "read": lambda: compiled.read("e0.bias"),
        "save": lambda: compiled.save(path),
        "warm": compiled.warm,
        "free": compiled.free_spare,
        "copy": lambda: scene.pipeline.copy(compiled),
        "refit": scene.refit,
        "restore": lambda: compiled.restore(0),
        "forget": compiled.forget,
    }


def outcomes(scene: Scene, path: str) -> dict[str, str]:
    return {name: raised_by(verb) for name, verb in verbs(scene, path).items()}


def labels_of_a_refit() -> list[str]:
    scene = Scene.of(1)
    scene.refit()
    return list(scene.wire.calls)


def test_a_fork_at_every_step_of_a_refit(tmp_path: Any, subtests: pytest.Subtests) -> None:
    """The child answers as before, with all new weights, or refuses; the parent's refit goes on."""
    labels = labels_of_a_refit()
    assert any("commit" in label for label in labels)
    refused = 0
    for number, label in enumerate(labels):
        with subtests.test(number=number, label=label):
            scene = Scene.of(1)
            refused += at_step(scene, number, label, str(tmp_path / f"{number}"))
    assert 0 < refused < len(labels)


def at_step(scene: Scene, number: int, label: str, path: str) -> bool:
    """Fork while another thread is at one step of a refit; whether the child was refused."""
    old = scene.module.holds()
    reached, leave = threading.Event(), threading.Event()
    main = threading.get_ident()
    plain = scene.wire.__class__.__call__
    pid = os.getpid()

    class Pausing(type(scene.wire)):  # type: ignore[misc]
        def __call__(self, label: str) -> None:
            here = len(self.calls)
            plain(self, label)
            if here == number and threading.get_ident() != main and os.getpid() == pid:
                reached.set()
                leave.wait()

    scene.wire.__class__ = Pausing
    thread = threading.Thread(target=scene.refit, daemon=True)
    thread.start()
    reached.wait()

    def child() -> tuple[bool, dict[str, str]]:
        lost = scene.compiled.gate.lost
        # at the last event all new weights are there
        wanted = scene.module.holds() if label == END else old
        sound = lost or same_state(scene.compiled(), wanted)
        assert label != END or not same_state(wanted, old)
        return sound, outcomes(scene, path)

    try:
        sound, found = forked(child)
    finally:
        leave.set()
        thread.join()
    assert sound
    assert set(found.values()) in ({""}, {"ModuleLostError"})
    assert scene.compiled.version == 1
    assert outcomes(scene, path) == dict.fromkeys(found, "")
    return set(found.values()) == {"ModuleLostError"}
