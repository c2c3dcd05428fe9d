"""Commit, verdict, rollback: everything that happens while calls wait, of one module or several."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from refitkit.errors import EngineError, ModuleLostError, RefitError, raised_as
from refitkit.pipeline.gate import in_order, inside_all, lost_error, returning

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from refitkit.pipeline.gate import Gate
    from refitkit.pipeline.stage import Staged
    from refitkit.protocols import OpenedModule, StagedRefit


Failure = TypeVar("Failure", bound=RefitError)

_LAST_ATTEMPT = (False, False, True)
"""So often the way back is tried while it is interrupted: Ctrl-C is often pressed twice."""


class Part(Protocol):
    """One module's part in a transaction."""

    @property
    def module(self) -> OpenedModule:
        """The opened module."""

    @property
    def gate(self) -> Gate:
        """Its gate."""

    @property
    def staged(self) -> Staged:
        """What is staged."""

    def put_aside(self) -> None:
        """Copy what calls have written, and the way back needs. Nothing new is live yet."""

    def timed(self) -> AbstractContextManager[None]:
        """Times the commit itself, without waiting and judging."""

    def judge(self) -> None:
        """Raise if the new weights must not stay. All modules have theirs by then."""

    def taken_back(self) -> None:
        """Called when old weights are back after new ones were live, while calls still wait.

        If it raises, the module is lost.
        """


class Transaction:
    """Staged engines of one module or several on their way to being live, or back.

    Either ``run`` returns and all new weights are live and judged good, or it raises and all old
    ones are, unless it is a ``ModuleLostError``.
    """

    def __init__(self, parts: Sequence[Part], names: Sequence[str]) -> None:
        """Prepare one.

        Args:
            parts: Modules, in the order in which they are committed.
            names: What they are called in errors, if there are several.
        """
        named = zip(parts, names, strict=True)
        self._halves = [_Half(part, name if len(names) > 1 else "") for part, name in named]

    def run(self) -> None:
        """Commit all engines and have the results judged, while calls of all modules wait.

        From the first commit until it is certain which weights are live, the gates are poisoned.
        An interrupt before that brings the old weights back. One that comes on the way back starts
        the way back again; only if all attempts are interrupted, modules refuse calls.

        Raises:
            EngineError: An engine failed to commit; the old weights are back.
            ModuleLostError: Rolling back failed; the modules concerned refuse calls.
            BaseException: What ``judge`` raised; the old weights are back.
        """
        gates = [half.part.gate for half in self._halves]
        inside_all([gate.alone for gate in in_order(gates)], self._run)

    def _run(self) -> None:
        try:
            self._forward()
        except BaseException as exc:
            # Nothing is called here but _back: CPython could raise an interrupt behind a call.
            interrupt: BaseException | None = None
            for last in _LAST_ATTEMPT:
                try:
                    self._back(exc, last=last)
                    break
                except Exception:
                    raise
                except BaseException as again:  # noqa: BLE001 - raised once the weights are back
                    interrupt = again
            if interrupt is not None:
                raise interrupt from exc
            raise

    def _forward(self) -> None:
        for half in self._halves:
            half.named(half.prepare)
        for half in self._halves:
            half.part.gate.poison("a commit was interrupted")
        for half in self._halves:
            half.named(half.commit)
        for half in self._halves:
            half.named(half.judge)
        for half in self._halves:
            half.part.gate.heal()

    def _back(self, cause: BaseException, *, last: bool) -> None:
        """Bring all old weights back; a module where that fails is poisoned.

        Args:
            cause: Why.
            last: Whether an interrupt is a failure. Otherwise it is raised, to begin again.
        """
        lost: list[ModuleLostError] = []
        for half in reversed(self._halves):
            failure = half.back(last=last)
            if failure is None:
                half.part.gate.heal()
                continue
            half.part.gate.poison(failure)
            lost.append(half.naming(lost_error(failure)))
        if lost:
            for one in lost:
                one.add_note(f"The rollback was because of: {type(cause).__name__}: {cause}")
            if len(lost) > 1:
                names = ", ".join(half.name for half in self._halves if half.part.gate.lost)
                lost[0].add_note(f"{len(lost)} modules were lost: {names}.")
            raise lost[0] from lost[0].__cause__


class _Half:
    """A part, and how far it has come."""

    def __init__(self, part: Part, name: str) -> None:
        self.part, self.name = part, name
        self._touched: list[tuple[str, StagedRefit]] = []
        self._begun = False
        self._failure: BaseException | None = None

    def named(self, action: Callable[[], None]) -> None:
        """Do something; what is wrong then is said of this module."""
        try:
            action()
        except RefitError as exc:
            self.naming(exc)
            raise

    def naming(self, error: Failure) -> Failure:
        """The error, naming the module."""
        if self.name:
            error.message = f"{self.name[0].upper()}{self.name[1:]}: {error.message}"
            error.problems = tuple(
                replace(problem, subject=f"{self.name}: {problem.subject}")
                for problem in error.problems
            )
        return error

    def prepare(self) -> None:
        with raised_as(EngineError, "Pending work of the module failed"):
            self.part.module.synchronize()
        with raised_as(EngineError, "What calls have written cannot be copied"):
            self.part.put_aside()

    def commit(self) -> None:
        with self.part.timed():
            for name, one in self.part.staged.take():
                self._begun = True
                self._touched.append((name, one))
                with raised_as(EngineError, f"The engine {name!r} failed to commit"):
                    one.commit()

    def judge(self) -> None:
        self._begun = True
        self.part.judge()

    def back(self, *, last: bool) -> BaseException | None:
        """Bring the old weights back; what failed, if anything did.

        After an interrupt it goes on where it was: an engine is tried again unless its rollback
        returned or failed.
        """
        while self._touched:
            try:
                self._touched[-1][1].rollback()
            except BaseException as exc:
                if not last and not isinstance(exc, Exception):
                    raise
                self._failure = exc
            self._touched.pop()
        if self._failure is None and self._begun:
            try:
                returning(self.part.taken_back)
            except BaseException as exc:
                if not last and not isinstance(exc, Exception):
                    raise
                self._failure = exc
            else:
                self._begun = False
        return self._failure
