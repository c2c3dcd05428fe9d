"""What makes refitkit and torch work in forked processes, and beside threads that serve calls.

A forked child has copies of all objects, but only the thread that forked.

- A lock that another thread of the parent held would never be released in the child.
  ``ForkedLock`` is renewed there.
- GCC's OpenMP, which torch's wheels use, would wait in the child for threads that are not there,
  in the first parallel computation (https://gcc.gnu.org/bugzilla/show_bug.cgi?id=60035). So the
  threads of the forking thread are ended before the fork; the next computation starts new ones.

``quick_turns`` is for threads: they get Python's interpreter sooner while a refit computes.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_locks: weakref.WeakSet[ForkedLock] = weakref.WeakSet()


class ForkedLock:
    """A reentrant lock that is free in a forked child, unless the forking thread held it.

    Use it as ``with lock.held:``. The RLock is entered directly, so no Python code runs between
    entering and holding it. An interrupt in such code could leave the lock acquired forever.

    Attributes:
        held: The ``threading.RLock``.
    """

    def __init__(self, abandoned: Callable[[], None] = lambda: None) -> None:
        """Create a free lock.

        Args:
            abandoned: Called in a forked child if another thread of the parent held the lock. The
                data that the lock guards may then be half written. The function must not hold a
                reference to the lock.
        """
        self.held = threading.RLock()
        self._abandoned = abandoned
        _locks.add(self)

    def renew(self) -> None:
        """Release the lock from threads of the parent; called in a forked child."""
        # The forking thread survives in the child, and can still acquire its own lock.
        if self.held.acquire(blocking=False):
            self.held.release()
            return
        self.held = threading.RLock()
        self._abandoned()


def _renew_locks() -> None:
    for lock in tuple(_locks):
        lock.renew()


@cache
def _gcc_openmp() -> ctypes.CDLL | None:
    """GCC's OpenMP if torch uses it. LLVM's and Intel's handle forks themselves."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return None
    if not hasattr(library, "omp_pause_resource_all") or hasattr(library, "__kmpc_fork_call"):
        return None
    return library


def _end_openmp_threads() -> None:
    """End the forking thread's threads. Those of other threads go on, as no child has them.

    ``omp_pause_resource_all``: OpenMP 5.0, section 3.2.44; ``gomp_pause_host`` in libgomp.
    """
    if library := _gcc_openmp():
        library.omp_pause_resource_all(_HARD)


_HARD = 2
"""``omp_pause_hard``: all threads end."""

os.register_at_fork(before=_end_openmp_threads, after_in_child=_renew_locks)


# -- threads that wait for Python -----------------------------------------------------------------

_QUICK = 0.0002
"""Seconds that a thread waits for the interpreter before it asks the running one for it."""


class _Quick:
    """The threads in ``quick_turns``, and the intervals before and since."""

    def __init__(self) -> None:
        self.lock = ForkedLock()
        self.threads: list[int] = []  # one entry for each time
        self.before = self.since = 0.0

    def leave(self, thread: int) -> None:
        """End one turn of a thread."""
        self.threads.remove(thread)
        # unless somebody else has set it meanwhile
        if not self.threads and sys.getswitchinterval() == self.since:
            sys.setswitchinterval(self.before)

    def after_fork(self) -> None:
        """End the turns of threads that a child lacks."""
        for thread in [one for one in self.threads if one != threading.get_ident()]:
            self.leave(thread)


_quick = _Quick()
os.register_at_fork(after_in_child=_quick.after_fork)


@contextmanager
def quick_turns() -> Iterator[None]:
    """Let other threads have the interpreter sooner than Python's 5 ms, until the context ends.

    A refit computes in Python for some milliseconds. Threads that serve calls would wait for it.
    The interval is one of the process (``sys.setswitchinterval``); a shorter one is left alone.
    """
    thread = threading.get_ident()
    with _quick.lock.held:
        if not _quick.threads:
            _quick.before = sys.getswitchinterval()
            sys.setswitchinterval(min(_quick.before, _QUICK))
            _quick.since = sys.getswitchinterval()
        _quick.threads.append(thread)
    try:
        yield
    finally:
        with _quick.lock.held:
            _quick.leave(thread)
