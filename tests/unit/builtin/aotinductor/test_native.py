"""Turns of calls, and libraries that have to be called through torch's binding."""

from __future__ import annotations

import ctypes.util
import json
import signal
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.builtin.aotinductor import native
from refitkit.builtin.aotinductor.native import SWITCH, Turns, opened
from tests.forking import forked
from tests.interrupting import Interrupt

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 30
"""Longer than anything takes: only what waits for ever fails."""


class Holder(threading.Thread):
    """Has a turn until it is told to leave."""

    def __init__(self, turns: Turns) -> None:
        super().__init__(daemon=True)
        self.inside, self._leave = threading.Event(), threading.Event()
        self._turns = turns
        self.start()

    def run(self) -> None:
        self._turns.take(self._hold)

    def _hold(self) -> None:
        self.inside.set()
        assert self._leave.wait(SECONDS)

    def leave(self) -> None:
        self._leave.set()
        self.join(SECONDS)
        assert not self.is_alive()


def holders(turns: Turns, count: int) -> list[Holder]:
    """Threads that have turns, all of them inside."""
    found = []
    for _ in range(count):
        found.append(Holder(turns))
        assert found[-1].inside.wait(SECONDS)
    return found


def all_free(turns: Turns, models: int) -> bool:
    """Whether other threads can have all turns at once now."""
    for one in holders(turns, models):
        one.leave()
    return not any(turns._queues)


@pytest.mark.parametrize("models", [1, 2, 3])
def test_as_many_turns_as_models(models: int) -> None:
    turns = Turns(models)
    inside = holders(turns, models)
    waiting = Holder(turns)
    assert not waiting.inside.wait(0.05)
    inside[0].leave()
    if models == 1:
        assert waiting.inside.wait(SECONDS)
    for one in [*inside[1:], waiting]:
        one.leave()
    assert all_free(turns, models)


@pytest.mark.parametrize("models", [1, 2])
def test_a_turn_returns_what_its_function_returns(models: int) -> None:
    assert Turns(models).take(lambda: 5) == 5


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupt, SystemExit])
@pytest.mark.parametrize("models", [1, 2])
def test_an_exception_ends_a_turn(models: int, error: type[BaseException]) -> None:
    turns = Turns(models)

    def fail() -> None:
        raise error

    for _ in range(3):
        with pytest.raises(error):
            turns.take(fail)
    assert all_free(turns, models)


def test_a_call_queues_where_the_fewest_do() -> None:
    turns = Turns(3)
    inside = holders(turns, 3)
    waiting = [Holder(turns) for _ in range(3)]
    while sum(map(len, turns._queues)) < 6:
        pass
    assert [len(queue) for queue in turns._queues] == [2, 2, 2]
    for one in (*inside, *waiting):
        one.leave()
    assert not any(turns._queues)


@pytest.mark.parametrize("models", [1, 2])
def test_an_interrupt_of_a_waiting_call(models: int) -> None:
    """In a child, whose only thread has the signals."""

    def interrupt(*_: object) -> None:
        raise Interrupt

    def child() -> bool:
        turns = Turns(models)
        inside = holders(turns, models)
        signal.signal(signal.SIGALRM, interrupt)
        for _ in range(20):
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            try:
                turns.take(lambda: None)
            except Interrupt:
                continue
            raise AssertionError("there was a turn")
        for one in inside:
            one.leave()
        return all_free(turns, models)

    assert forked(child) is True


@pytest.mark.parametrize("models", [1, 2])
def test_turns_of_other_threads_are_free_in_a_forked_child(models: int) -> None:
    turns = Turns(models)
    inside = holders(turns, models)

    def child() -> bool:
        return all(turns.take(lambda: True) for _ in range(5)) and all_free(turns, models)

    assert forked(child) is True
    for one in inside:
        one.leave()


# -- libraries that need the binding --------------------------------------------------------------


def reason(path: Path) -> str:
    found = opened(path, "cpu")
    assert isinstance(found, str)
    return found


def test_what_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "a.so"
    assert "cannot be loaded" in reason(path)
    path.write_text("no library")
    assert "cannot be loaded" in reason(path)


def test_a_library_without_the_functions() -> None:
    library = ctypes.util.find_library("m")
    assert library
    assert reason(Path(library)) == (
        "it was compiled by a version of torch without AOTInductorModelContainerCreateWithDevice"
    )


def test_the_switch_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")
    assert reason(tmp_path / "a.so") == f"the environment variable {SWITCH} is set"
    monkeypatch.setenv(SWITCH, "")
    assert "cannot be loaded" in reason(tmp_path / "a.so")


@pytest.mark.parametrize("nodes", [None, [], [{"name": "an operator"}]])
def test_operators_that_the_binding_calls(nodes: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.wrapper.so"
    path.write_text("no library")
    if nodes is not None:
        (tmp_path / "a.wrapper.json").write_text(json.dumps({"nodes": nodes}))
    assert ("the model has operators" in reason(path)) is bool(nodes)


def test_nothing_is_freed_at_exit() -> None:
    class Library:
        reaped = 0

        def reap(self) -> None:
            self.reaped += 1

    library: Any = Library()
    reap: Callable[..., Any] = native._reaper
    reap(weakref.ref(library), is_exiting=lambda: True)(None)
    assert library.reaped == 0
    reap(weakref.ref(library))(None)
    assert library.reaped == 1


def test_an_output_that_is_none_has_a_null_handle() -> None:
    x = torch.arange(3.0)
    (handle,) = native._handles_of([x])
    assert native._tensors_of([]) == []
    found = native._tensors_of([None, handle, None])
    assert [one is None for one in found] == [True, False, True]
    assert torch.equal(found[1], x)
