"""Locks of a process that may be forked.

A forked child has a copy of all objects, and only the thread that forked. Locks that other threads
of the parent held would never be released there.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_locks: weakref.WeakSet[ForkedLock] = weakref.WeakSet()


class ForkedLock:
    """A reentrant lock that a forked child finds free, unless the thread that forked has it.

    It is used as ``with lock.held:``, so that no Python runs between entering and holding it, where
    an interrupt could leave it locked.

    Attributes:
        held: The lock itself.
    """

    def __init__(self, abandoned: Callable[[], None] = lambda: None) -> None:
        """Free.

        Args:
            abandoned: Called in a child where another thread of the parent had it: that left
                whatever the lock guards as it was then. It must not keep the lock alive.
        """
        self.held = threading.RLock()
        self._abandoned = abandoned
        _locks.add(self)

    def renew(self) -> None:
        """Free it of threads that are not there; called in a forked child."""
        if self.held.acquire(blocking=False):
            self.held.release()
            return
        self.held = threading.RLock()
        self._abandoned()


def _in_child() -> None:
    for lock in tuple(_locks):
        lock.renew()


os.register_at_fork(after_in_child=_in_child)
