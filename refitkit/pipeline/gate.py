"""Who may use a module's weights when: calls share it, a commit has it alone."""

from __future__ import annotations

import os
import threading
from threading import Lock, get_ident
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar
from weakref import WeakValueDictionary

from refitkit.errors import DeadlockError, ModuleLostError, Problem, RefitInProgressError
from refitkit.processes import ForkedLock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

T = TypeVar("T")

Turns: TypeAlias = "dict[Lock, int]"
"""Turns and their threads, the oldest first. A turn lasts while its lock is held."""

_FORKED = "the process was forked in the middle of a commit"


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

    A forked child has only the thread that forked: turns of all others are over there. If one
    of those was a commit that had begun, the child's weights are half old and half new, and its
    gate is poisoned.
    """

    def __init__(self) -> None:
        """Open, and well."""
        self._passing: Turns = {}  # calls
        self._closing: Turns = {}  # the first one has the gate alone, the others wait for it
        self._refitting: Turns = {}  # likewise: one refits, the others wait
        self._begun: Lock | None = None  # the last turn of ``_closing`` that had the gate alone
        self._lost: BaseException | str | None = None
        _gates[id(self)] = self

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
            DeadlockError: Who has it waits for this thread.
        """
        me, waited = get_ident(), True
        while True:
            turn = Lock()
            with turn:
                try:
                    self._passing[turn] = me
                    closed = next(iter(_lasting(self._closing)), None)
                    if closed is not None and (self._closing.get(closed) == me or not waited):
                        return do()
                    if closed is None or _has_turn(self._passing, me, but=turn):
                        self.check()
                        return do()
                finally:
                    self._passing.pop(turn, None)
            waited = _waited_for(closed)

    def alone(self, do: Callable[[], T]) -> T:
        """Do something with the gate alone: new calls wait, running ones are waited for."""
        return _in_turn(self._closing, lambda: self._after_calls(do))

    def refit(self, do: Callable[[], T]) -> T:
        """Be the one refit of the module; another thread's waits, one's own is an error.

        Raises:
            RefitInProgressError: This thread is inside a refit or a call of this module.
            ModuleLostError: The module is lost.
            DeadlockError: Who refits it waits for this thread.
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
        self._begun = next(iter(_lasting(self._closing)))
        return do()

    def holder(self, turn: Lock) -> Holder | None:
        """The thread whose turn it is, if it is one of this gate and not over."""
        kinds = {"refit": self._refitting, "commit": self._closing, "call": self._passing}
        for kind, turns in kinds.items():
            thread = turns.get(turn)
            if thread is not None and turn.locked():
                return Holder(thread, kind)
        return None

    def keep_only(self, thread: int) -> None:
        """End the turns of all other threads; called in a forked child, where there are none."""
        alone = next(iter(_lasting(self._closing)), None)
        if alone is not None and alone is self._begun and self._closing[alone] != thread:
            self.poison(_FORKED)
        for turns in (self._passing, self._closing, self._refitting):
            for turn in [turn for turn, other in turns.items() if other != thread]:
                del turns[turn]


_gates: WeakValueDictionary[int, Gate] = WeakValueDictionary()


class Holder(NamedTuple):
    """A thread that others wait for.

    Attributes:
        thread: Its identifier.
        kind: The turn that it has of a module: ``refit``, ``commit`` or ``call``.
    """

    thread: int
    kind: str


_waits: dict[int, Lock] = {}
"""Threads that wait, and for which turn."""

_looking = ForkedLock()
"""Held from noting a wait to looking for a ring: so the last thread of a ring alone finds it."""


def wait_for(turn: Lock) -> None:
    """Wait until a turn is over.

    Raises:
        DeadlockError: Its thread waits for this one, directly or through others.
    """
    me = get_ident()
    before = _waits.get(me)  # a signal handler waits inside of another wait
    try:
        with _looking.held:
            _waits[me] = turn
            ring = _ring(me)
        if ring:
            raise _deadlock(me, ring)
        with turn:
            pass
    finally:
        if before is None:
            _waits.pop(me, None)
        else:
            _waits[me] = before


_returning: set[int] = set()
"""Threads that bring old weights back."""


def returning(do: Callable[[], None]) -> None:
    """Do something that brings old weights back: if it failed, a module would be lost.

    Where a call would raise ``DeadlockError`` meanwhile, it goes through at once. Who has the gate
    stands still until this thread is done, so nothing is committed during the call.
    """
    me = get_ident()
    try:
        _returning.add(me)
        do()
    finally:
        _returning.discard(me)


def _waited_for(turn: Lock) -> bool:
    """Wait until a turn is over; False if that would be for ever, and this thread must not fail."""
    try:
        wait_for(turn)
    except DeadlockError:
        if get_ident() not in _returning:
            raise
        return False
    return True


def _ring(me: int) -> list[Holder]:
    """Who is waited for, from a thread on, if that leads back to it; else nothing."""
    ring: list[Holder] = []
    thread = me
    while (turn := _waits.get(thread)) is not None:
        holder = _holder(turn)
        if holder is None or any(holder.thread == one.thread for one in ring):
            return []
        ring.append(holder)
        if holder.thread == me:
            return ring
        thread = holder.thread
    return []


def _holder(turn: Lock) -> Holder | None:
    for one in _gates.valuerefs():
        gate = one()
        holder = None if gate is None else gate.holder(turn)
        if holder is not None:
            return holder
    return None


def _deadlock(me: int, ring: Sequence[Holder]) -> DeadlockError:
    names = {thread.ident: repr(thread.name) for thread in threading.enumerate()}
    waiting = [me, *(holder.thread for holder in ring)]
    return DeadlockError(
        "Threads wait for one another's modules, and would wait for ever.",
        problems=[
            Problem(
                f"thread {names.get(thread, thread)}",
                "waits",
                f"for a {holder.kind} of thread {names.get(holder.thread, holder.thread)}",
            )
            for thread, holder in zip(waiting, ring, strict=False)
        ],
        hint="Hooks and verifiers run while their module lets nobody in: there, use no other "
        "module whose hooks use this one. refit_all refits several modules at once.",
    )


def _in_child() -> None:
    """Forget all threads of the parent but the one that forked."""
    me = get_ident()
    for gate in list(_gates.values()):
        gate.keep_only(me)
    for thread in _waits.keys() - {me}:
        del _waits[thread]
    _returning.intersection_update({me})


os.register_at_fork(after_in_child=_in_child)


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
    if why is _FORKED:
        return ModuleLostError(
            "The process was forked while another thread committed weights to the module, so it "
            "may hold a mixture of weights here.",
            hint="Load or compile it in this process, or fork when no refit runs. The module of "
            "the parent process is not affected.",
        )
    error = ModuleLostError(
        f"A rollback failed, and the module may hold a mixture of weights: {why}",
        hint="Load or compile it again.",
    )
    if isinstance(why, BaseException):
        error.__cause__ = why
    return error
