"""Who may use a module's weights when: calls share it, a commit has it alone."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from refitkit.errors import ModuleLostError, RefitInProgressError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

T = TypeVar("T")


class Gate:
    """Calls go through side by side; from commit to verdict they wait outside.

    A thread that holds the gate alone passes through it freely, so that verifiers and hooks can
    call the module; so does a call from inside a call. A poisoned gate lets nobody through.
    """

    def __init__(self) -> None:
        """Open, and well."""
        # the lock is entered directly: an interrupt inside the condition's own __enter__, which is
        # Python, would leave it locked (bpo-29988)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._calls: Counter[int] = Counter()  # by thread
        self._owner: int | None = None
        self._refitting = threading.Lock()
        self._refitting_thread: int | None = None
        self._lost: BaseException | str | None = None

    @property
    def lost(self) -> bool:
        """Whether it was poisoned."""
        return self._lost is not None

    def poison(self, why: BaseException | str) -> None:
        """Let nobody through any more."""
        self._lost = why

    def heal(self) -> None:
        """Take a poisoning back: it is certain again which weights are live."""
        self._lost = None

    def check(self) -> None:
        """Raise if it was poisoned.

        Raises:
            ModuleLostError: It was.
        """
        if self._lost is not None:
            raise lost_error(self._lost)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Go through as one of many calls; waits while another thread has the gate alone.

        Raises:
            ModuleLostError: The module is lost.
        """
        me = threading.get_ident()
        if self._owner == me:
            yield
            return
        with self._lock:
            self._changed.wait_for(lambda: self._owner is None or self._calls[me])
            self.check()
            self._calls[me] += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls[me] -= 1
                if not self._calls[me]:
                    del self._calls[me]
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have the gate alone: new calls wait, running ones are waited for."""
        me = threading.get_ident()
        try:
            with self._lock:
                self._changed.wait_for(lambda: self._owner is None)
                self._owner = me
                self._changed.wait_for(lambda: not self._calls)
            yield
        finally:
            with self._lock:
                if self._owner == me:
                    self._owner = None
                self._changed.notify_all()

    @contextmanager
    def refit(self) -> Iterator[None]:
        """Be the one refit of the module; another thread's waits, one's own is an error.

        Raises:
            RefitInProgressError: This thread is inside a refit or a call of this module.
            ModuleLostError: The module is lost.
        """
        me = threading.get_ident()
        refitting = self._refitting_thread == me and self._refitting.locked()
        if refitting or me in self._calls:
            inside = "a refit" if refitting else "a call"
            raise RefitInProgressError(
                f"A refit of this module was started from inside {inside} of it.",
                hint="Refit it from outside: what takes part in a call or a refit must not.",
            )
        with self._refitting:
            self.check()
            self._refitting_thread = me
            try:
                yield
            finally:
                self._refitting_thread = None


def in_order(gates: Iterable[Gate]) -> list[Gate]:
    """Gates in the one order in which several are entered: then no two wait for one another."""
    return sorted(gates, key=id)


def inside_all(
    contexts: Sequence[Callable[[], AbstractContextManager[None]]], do: Callable[[], T]
) -> T:
    """Do something inside of all contexts, which are entered one after another."""
    if not contexts:
        return do()
    with contexts[0]():
        return inside_all(contexts[1:], do)


def lost_error(why: BaseException | str) -> ModuleLostError:
    """The error that a poisoned module answers with."""
    error = ModuleLostError(
        f"A rollback failed, and the module may hold a mixture of weights: {why}",
        hint="Load or compile it again.",
    )
    if isinstance(why, BaseException):
        error.__cause__ = why
    return error
