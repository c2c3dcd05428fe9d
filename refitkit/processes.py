"""Locks that work in forked processes.

A forked child has copies of all objects, but only the thread that forked. A lock that another
thread of the parent held would never be released in the child. ``ForkedLock`` is renewed there.
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


os.register_at_fork(after_in_child=_renew_locks)
