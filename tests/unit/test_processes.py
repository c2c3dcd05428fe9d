"""Locks of a process that forks."""

from __future__ import annotations

import threading

from refitkit.processes import ForkedLock
from tests.forking import forked


class Holder:
    """A thread that holds a lock."""

    def __init__(self, lock: ForkedLock) -> None:
        self._has, self._leave = threading.Event(), threading.Event()

        def hold() -> None:
            with lock.held:
                self._has.set()
                self._leave.wait()

        self._thread = threading.Thread(target=hold, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()
        self._has.wait()

    def __exit__(self, *error: object) -> None:
        self._leave.set()
        self._thread.join()


def free_elsewhere(lock: ForkedLock) -> bool:
    """Whether another thread could have it."""
    found: list[bool] = []

    def look() -> None:
        found.append(lock.held.acquire(blocking=False))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0]


def test_a_child_finds_a_lock_free_that_another_thread_had() -> None:
    abandoned: list[int] = []
    lock = ForkedLock(lambda: abandoned.append(1))

    def work() -> list[int]:
        with lock.held:
            return abandoned

    with Holder(lock):
        assert forked(work) == [1]
        assert not lock.held.acquire(blocking=False)
    assert abandoned == []


def test_a_lock_that_nobody_had_is_not_abandoned() -> None:
    abandoned: list[int] = []
    lock = ForkedLock(lambda: abandoned.append(1))
    assert forked(lambda: (abandoned, free_elsewhere(lock))) == ([], True)


def test_the_thread_that_forks_keeps_its_lock() -> None:
    lock = ForkedLock()

    def work() -> list[bool]:
        before = free_elsewhere(lock)
        lock.held.release()
        return [before, free_elsewhere(lock)]

    with lock.held:
        assert forked(work) == [False, True]
