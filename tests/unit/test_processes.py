"""Locks and threads of a process that forks."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from refitkit import processes
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


COMPUTING = """
import os, signal, threading
import torch
import refitkit.processes

torch.set_num_threads(2)
ones = torch.ones(1 << 18)  # enough for two threads

def compute():
    assert (ones + ones).sum() == 2 << 18

stop = threading.Event()

def beside():
    while not stop.is_set():
        compute()

thread = threading.Thread(target=beside, daemon=True)
thread.start()
for _ in range(20):
    compute()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # only turns a hang into a failure
        compute()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
"""


def test_parent_and_child_compute_with_several_threads() -> None:
    """torch alone waits for ever in such a child."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPUTING], check=True, timeout=600)


# -- threads that wait for Python -----------------------------------------------------------------


def test_turns_are_quick_until_the_last_thread_leaves() -> None:
    before = sys.getswitchinterval()
    with processes.quick_turns():
        with processes.quick_turns():
            assert sys.getswitchinterval() < before
        assert sys.getswitchinterval() < before
    assert sys.getswitchinterval() == before


@pytest.mark.parametrize("chosen", [0.00001, 0.01])
def test_an_interval_that_the_user_chose_meanwhile_stays(chosen: float) -> None:
    before = sys.getswitchinterval()
    try:
        with processes.quick_turns():
            sys.setswitchinterval(chosen)
        assert sys.getswitchinterval() == pytest.approx(chosen)
        sys.setswitchinterval(chosen)
        with processes.quick_turns():
            assert sys.getswitchinterval() <= chosen
        assert sys.getswitchinterval() == pytest.approx(chosen)
    finally:
        sys.setswitchinterval(before)


def test_a_child_takes_its_turns_as_the_user_chose() -> None:
    before = sys.getswitchinterval()
    leave, inside = threading.Event(), threading.Event()

    def refit() -> None:
        with processes.quick_turns():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=refit)
    thread.start()
    inside.wait()
    try:
        assert forked(sys.getswitchinterval) == before
    finally:
        leave.set()
        thread.join()
    with processes.quick_turns():
        assert forked(sys.getswitchinterval) < before
    assert sys.getswitchinterval() == before
