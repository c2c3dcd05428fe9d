"""Gates: calls of a module share it, a commit has it alone, and one refit follows another.

Read ``Gate`` first. The rest is what it is built from:

- *Turns* are locks that threads hold while they are inside a gate.
- ``wait_for`` waits for a turn and raises ``DeadlockError`` if threads would wait in a cycle.
- ``restoring`` marks a thread that restores old weights, which must not fail with a deadlock.
- After a fork, the child forgets the threads that it does not have.
- ``in_lock_order`` and ``inside_all`` enter several gates.
"""

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
"""Turns with the identifiers of their threads, the oldest first. A turn is over once unlocked."""

_FORKED = "the process was forked in the middle of a commit"


class Gate:
    """Lets calls of a module through side by side. From commit to verdict, new calls wait.

    The thread that has the gate exclusively passes freely, so that verifiers and hooks can call the
    module. A call from inside a call passes too. A poisoned gate lets no thread through.

    An interrupt at any point leaves nothing locked and nothing listed. CPython raises it after a
    call, at the start of a function, and where a loop jumps back. So every step that matters is
    done by one C function:

    - Each passage is a *turn*, a lock of its own. ``with turn`` enters and leaves in C. A context
      manager in Python could be interrupted in ``__exit__`` before it does anything.
    - A turn is first locked, then listed. So a turn that is listed and not locked is over, even if
      its thread could not remove it from the list. The next thread that finds it removes it.
    - Other threads wait by acquiring the lock. So no notification can get lost.

    A call lists itself and then looks for a commit. A commit lists itself and then looks for calls.
    So at least one of the two sees the other.
    """

    def __init__(self) -> None:
        """Start open and not poisoned."""
        self._call_turns: Turns = {}
        self._commit_turns: Turns = {}  # the first has the gate exclusively, the others wait
        self._refit_turns: Turns = {}  # the first refits, the others wait
        self._last_commit: Lock | None = None  # the last turn that had the gate exclusively
        self._lost: BaseException | str | None = None
        _gates[id(self)] = self

    # -- poisoning --------------------------------------------------------------------------

    @property
    def lost(self) -> bool:
        """Whether the gate is poisoned."""
        return self._lost is not None

    def poison(self, why: BaseException | str) -> None:
        """Let no thread through any more.

        Args:
            why: The reason, for the error of later calls.
        """
        self._lost = why

    def heal(self) -> None:
        """Undo ``poison``, once it is certain again which weights are live."""
        self._lost = None

    def check(self) -> None:
        """Raise if the gate is poisoned.

        Raises:
            ModuleLostError: It is.
        """
        if self._lost is not None:
            raise lost_error(self._lost)

    # -- passing ----------------------------------------------------------------------------

    def call(self, do: Callable[[], T]) -> T:
        """The result of a function, run as one of many calls.

        It waits while another thread has the gate exclusively.

        Raises:
            ModuleLostError: The module is lost.
            DeadlockError: The thread that has the gate waits for this thread.
        """
        me, waited = get_ident(), True
        while True:
            turn = Lock()
            with turn:
                try:
                    self._call_turns[turn] = me
                    closed = next(iter(_unfinished(self._commit_turns)), None)
                    if closed is not None and (self._commit_turns.get(closed) == me or not waited):
                        return do()
                    if closed is None or _has_turn(self._call_turns, me, but=turn):
                        self.check()
                        return do()
                finally:
                    self._call_turns.pop(turn, None)
            # Wait without a turn: the commit waits for all turns of calls.
            waited = _wait_unless_restoring(closed)

    def exclusive(self, do: Callable[[], T]) -> T:
        """The result of a function, run when no call runs. New calls wait until it returns.

        Raises:
            DeadlockError: A thread that has to leave first waits for this thread.
        """
        return _in_turn(self._commit_turns, lambda: self._after_calls(do))

    def _after_calls(self, do: Callable[[], T]) -> T:
        for turn in _unfinished(self._call_turns):
            wait_for(turn)
        return self._alone(do)

    def _alone(self, do: Callable[[], T]) -> T:
        self._last_commit = next(iter(_unfinished(self._commit_turns)))
        return do()

    def closed(self, do: Callable[[], T]) -> T:
        """The result of a function, run at once. New calls wait until it returns; others go on.

        It is for commits by which running calls are not affected.

        Raises:
            DeadlockError: A thread that has the gate exclusively waits for this thread.
        """
        return _in_turn(self._commit_turns, lambda: self._alone(do))

    def hold(self, do: Callable[[], T]) -> T:
        """The result of a function, run while no refit of another thread goes on. Calls go on.

        Raises:
            ModuleLostError: The module is lost.
            DeadlockError: The thread that refits the module waits for this thread.
        """
        me = get_ident()
        inside = _has_turn(self._refit_turns, me) or _has_turn(self._call_turns, me)
        return self.call(do) if inside else self.refit(lambda: self.call(do))

    def refit(self, do: Callable[[], T]) -> T:
        """The result of a function, run as the only refit. Refits of other threads wait.

        Raises:
            RefitInProgressError: This thread is inside a refit or a call of this module.
            ModuleLostError: The module is lost.
            DeadlockError: The thread that refits the module waits for this thread.
        """
        for turns, inside in ((self._refit_turns, "a refit"), (self._call_turns, "a call")):
            if _has_turn(turns, get_ident()):
                raise RefitInProgressError(
                    f"A refit of this module was started from inside {inside} of it.",
                    hint="Refit the module after the call or the refit has returned.",
                )
        return _in_turn(self._refit_turns, lambda: self._unless_lost(do))

    def _unless_lost(self, do: Callable[[], T]) -> T:
        self.check()
        return do()

    # -- threads that hold turns ------------------------------------------------------------

    def holder(self, turn: Lock) -> Holder | None:
        """The thread that holds a turn; None if the turn is over or of another gate."""
        kinds = {"refit": self._refit_turns, "commit": self._commit_turns, "call": self._call_turns}
        for kind, turns in kinds.items():
            thread = turns.get(turn)
            if thread is not None and turn.locked():
                return Holder(thread, kind)
        return None

    def keep_only(self, thread: int) -> None:
        """End the turns of all other threads. Called in a forked child, which lacks them.

        If one of those threads was committing, the child's weights are partly old and partly new,
        and the gate is poisoned. A commit that still waited for calls has changed nothing.

        Args:
            thread: Identifier of the thread that forked.
        """
        first = next(iter(_unfinished(self._commit_turns)), None)
        if first is not None and first is self._last_commit and self._commit_turns[first] != thread:
            self.poison(_FORKED)
        for turns in (self._call_turns, self._commit_turns, self._refit_turns):
            for turn in [turn for turn, other in turns.items() if other != thread]:
                del turns[turn]


_gates: WeakValueDictionary[int, Gate] = WeakValueDictionary()


# -- turns ----------------------------------------------------------------------------------------


def _in_turn(turns: Turns, do: Callable[[], T]) -> T:
    """The result of a function, run when all earlier turns are over. Later turns wait for it."""
    turn = Lock()
    with turn:
        try:
            turns[turn] = get_ident()
            for other in _unfinished(turns):
                if other is turn:
                    break
                wait_for(other)
            return do()
        finally:
            turns.pop(turn, None)


def _unfinished(turns: Turns) -> list[Lock]:
    """Turns that are not over, the oldest first. Turns that are over leave the list."""
    unfinished = []
    for turn in list(turns):  # a copy, because other threads change the list meanwhile
        if turn.locked():
            unfinished.append(turn)
        else:
            turns.pop(turn, None)
    return unfinished


def _has_turn(turns: Turns, thread: int, but: Lock | None = None) -> bool:
    """Whether a thread holds a turn other than ``but``."""
    return any(turns.get(turn) == thread and turn is not but for turn in _unfinished(turns))


# -- waiting, and deadlocks -----------------------------------------------------------------------


class Holder(NamedTuple):
    """A thread that other threads wait for.

    Attributes:
        thread: Identifier of the thread.
        kind: Kind of its turn: ``refit``, ``commit`` or ``call``.
    """

    thread: int
    kind: str


_waits: dict[int, Lock] = {}
"""Identifiers of waiting threads, each with the turn that it waits for."""

_cycle_check = ForkedLock()
"""Held from the entry in ``_waits`` to the check. So only the last thread of a cycle finds it."""


def wait_for(turn: Lock) -> None:
    """Wait until a turn is over.

    Raises:
        DeadlockError: The turn's thread waits for this thread, directly or through others.
    """
    me = get_ident()
    before = _waits.get(me)  # a signal handler may wait inside another wait of its thread
    try:
        with _cycle_check.held:
            _waits[me] = turn
            cycle = _cycle(me)
        if cycle:
            raise _deadlock(me, cycle)
        with turn:
            pass
    finally:
        if before is None:
            _waits.pop(me, None)
        else:
            _waits[me] = before


def _cycle(me: int) -> list[Holder]:
    """The threads in the cycle of waits that starts and ends with a thread; empty if none does."""
    cycle: list[Holder] = []
    thread = me
    while (turn := _waits.get(thread)) is not None:
        holder = _holder(turn)
        # A cycle without this thread is reported by the last thread that joined it.
        if holder is None or any(holder.thread == one.thread for one in cycle):
            return []
        cycle.append(holder)
        if holder.thread == me:
            return cycle
        thread = holder.thread
    return []


def _holder(turn: Lock) -> Holder | None:
    for one in _gates.valuerefs():
        gate = one()
        holder = None if gate is None else gate.holder(turn)
        if holder is not None:
            return holder
    return None


def _deadlock(me: int, cycle: Sequence[Holder]) -> DeadlockError:
    """The error of a thread that would close a cycle of waits."""
    names = {thread.ident: repr(thread.name) for thread in threading.enumerate()}
    waiting = [me, *(holder.thread for holder in cycle)]
    return DeadlockError(
        "Threads wait for one another's modules, and would wait forever.",
        problems=[
            Problem(
                f"thread {names.get(thread, thread)}",
                "waits",
                f"for a {holder.kind} of thread {names.get(holder.thread, holder.thread)}",
            )
            for thread, holder in zip(waiting, cycle, strict=False)
        ],
        hint="Hooks and verifiers run while calls of their module wait. Do not use a module there "
        "whose own hooks use this module. refit_all refits several modules at once.",
    )


# -- waiting while old weights are restored -------------------------------------------------------

_restoring: set[int] = set()
"""Identifiers of threads that restore old weights."""


def restoring(do: Callable[[], None]) -> None:
    """Run a function that restores old weights. If it failed, a module would be lost.

    A call that would raise ``DeadlockError`` meanwhile passes at once instead. That is safe: the
    thread that has the gate waits for this thread, so it commits nothing during the call.
    """
    me = get_ident()
    try:
        _restoring.add(me)
        do()
    finally:
        _restoring.discard(me)


def _wait_unless_restoring(turn: Lock) -> bool:
    """Wait until a turn is over. False if that is a deadlock and this thread restores weights."""
    try:
        wait_for(turn)
    except DeadlockError:
        if get_ident() not in _restoring:
            raise
        return False
    return True


# -- forks ----------------------------------------------------------------------------------------


def _after_fork_in_child() -> None:
    """Forget all threads of the parent except the one that forked: the child lacks the others."""
    me = get_ident()
    for gate in list(_gates.values()):
        gate.keep_only(me)
    for thread in _waits.keys() - {me}:
        del _waits[thread]
    _restoring.intersection_update({me})


os.register_at_fork(after_in_child=_after_fork_in_child)


# -- several gates --------------------------------------------------------------------------------


def in_lock_order(gates: Iterable[Gate]) -> list[Gate]:
    """Gates in the one order in which several are entered, so that no two threads deadlock."""
    return sorted(gates, key=id)


def inside_all(passages: Sequence[Callable[[Callable[[], T]], T]], do: Callable[[], T]) -> T:
    """The result of a function, run inside all passages.

    Args:
        passages: Methods of gates such as ``gate.refit``, entered one after another.
        do: The function.
    """
    if not passages:
        return do()
    return passages[0](lambda: inside_all(passages[1:], do))


def lost_error(why: BaseException | str) -> ModuleLostError:
    """The error that calls of a poisoned module raise.

    Args:
        why: The argument of ``Gate.poison``. An exception becomes the cause of the error.
    """
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
