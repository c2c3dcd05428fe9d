"""Who may use a module's weights when: calls share it, a commit has it alone."""

from __future__ import annotations

from threading import Lock, get_ident
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from refitkit.errors import ModuleLostError, RefitInProgressError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

T = TypeVar("T")

Turns: TypeAlias = "dict[Lock, int]"
"""Turns and their threads, the oldest first. A turn lasts while its lock is held."""


class Gate:
    """Calls go through side by side; from commit to verdict they wait outside.

    A thread that holds the gate alone passes through it freely, so that verifiers and hooks can
    call the module; so does a call from inside a call. A poisoned gate lets nobody through.

    An interrupt at any point leaves nothing behind. CPython raises it after a call, at the start
    of a function, and where a loop jumps back. So everything here is built from steps that one C
    function does whole:

    - Each passage is a *turn*, a lock of its own. ``with turn`` enters and leaves in C. A context
      manager in Python may be interrupted in ``__exit__`` before it does anything.
    - A turn is first locked, then listed. So a turn that is listed and not locked is over,
      although nobody took it off the list; whoever finds it does.
    - Others wait by acquiring the lock. So there is no notification that can get lost.

    A call lists itself and then looks for a commit; a commit lists itself and then looks for
    calls. One of the two sees the other.
    """

    def __init__(self) -> None:
        """Open, and well."""
        self._passing: Turns = {}  # calls
        self._closing: Turns = {}  # the first one has the gate alone, the others wait for it
        self._refitting: Turns = {}  # likewise: one refits, the others wait
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

    @property
    def _calls(self) -> Turns:
        """Calls that run, and their threads."""
        return {turn: self._passing[turn] for turn in _lasting(self._passing)}

    def call(self, do: Callable[[], T]) -> T:
        """Do something as one of many calls; waits while another thread has the gate alone.

        Raises:
            ModuleLostError: The module is lost.
        """
        me = get_ident()
        while True:
            turn = Lock()
            with turn:
                try:
                    self._passing[turn] = me
                    closed = next(iter(_lasting(self._closing)), None)
                    if closed is not None and self._closing.get(closed) == me:
                        return do()
                    if closed is None or _has_turn(self._passing, me, but=turn):
                        self.check()
                        return do()
                finally:
                    self._passing.pop(turn, None)
            wait_for(closed)

    def alone(self, do: Callable[[], T]) -> T:
        """Do something with the gate alone: new calls wait, running ones are waited for."""
        return _in_turn(self._closing, lambda: self._after_calls(do))

    def refit(self, do: Callable[[], T]) -> T:
        """Be the one refit of the module; another thread's waits, one's own is an error.

        Raises:
            RefitInProgressError: This thread is inside a refit or a call of this module.
            ModuleLostError: The module is lost.
        """
        for turns, inside in ((self._refitting, "a refit"), (self._passing, "a call")):
            if _has_turn(turns, get_ident()):
                raise RefitInProgressError(
                    f"A refit of this module was started from inside {inside} of it.",
                    hint="Refit it from outside: what takes part in a call or a refit must not.",
                )
        return _in_turn(self._refitting, lambda: self._unless_lost(do))

    def _unless_lost(self, do: Callable[[], T]) -> T:
        self.check()
        return do()

    def _after_calls(self, do: Callable[[], T]) -> T:
        for turn in _lasting(self._passing):
            wait_for(turn)
        return do()


def wait_for(turn: Lock) -> None:
    """Wait until a turn is over."""
    with turn:
        pass


def _in_turn(turns: Turns, do: Callable[[], T]) -> T:
    """Do something when all turns before are over; those that come later wait."""
    turn = Lock()
    with turn:
        try:
            turns[turn] = get_ident()
            for other in _lasting(turns):
                if other is turn:
                    break
                wait_for(other)
            return do()
        finally:
            turns.pop(turn, None)


def _lasting(turns: Turns) -> list[Lock]:
    """Turns that are not over, the oldest first; the others are taken off the list."""
    lasting = []
    for turn in list(turns):  # other threads change it meanwhile
        if turn.locked():
            lasting.append(turn)
        else:
            turns.pop(turn, None)
    return lasting


def _has_turn(turns: Turns, thread: int, but: Lock | None = None) -> bool:
    """Whether a thread is inside a turn, other than this one."""
    return any(turns.get(turn) == thread and turn is not but for turn in _lasting(turns))


def in_order(gates: Iterable[Gate]) -> list[Gate]:
    """Gates in the one order in which several are entered: then no two wait for one another."""
    return sorted(gates, key=id)


def inside_all(passages: Sequence[Callable[[Callable[[], T]], T]], do: Callable[[], T]) -> T:
    """Do something inside of all passages (``gate.refit``, say), entered one after another."""
    if not passages:
        return do()
    return passages[0](lambda: inside_all(passages[1:], do))


def lost_error(why: BaseException | str) -> ModuleLostError:
    """The error that a poisoned module answers with."""
    error = ModuleLostError(
        f"A rollback failed, and the module may hold a mixture of weights: {why}",
        hint="Load or compile it again.",
    )
    if isinstance(why, BaseException):
        error.__cause__ = why
    return error
