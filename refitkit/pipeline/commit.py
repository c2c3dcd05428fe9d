"""Commit, verdict, rollback: everything that happens while calls wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import EngineError, ModuleLostError, raised_as
from refitkit.pipeline.gate import lost_error

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from refitkit.pipeline.gate import Gate
    from refitkit.pipeline.stage import Staged
    from refitkit.protocols import OpenedModule, StagedRefit


class Transaction:
    """Staged engines on their way to being live, or back.

    Either ``run`` returns and all new weights are live and judged good, or it raises and all old
    ones are, unless it is a ``ModuleLostError``.
    """

    def __init__(
        self,
        module: OpenedModule,
        gate: Gate,
        staged: Staged,
        *,
        on_rollback: Callable[[], None],
    ) -> None:
        """Prepare one.

        Args:
            module: The opened module.
            gate: Its gate.
            staged: What is staged.
            on_rollback: Called when old weights are back after new ones were live, while calls
                still wait; if it raises, the module is lost.
        """
        self._module, self._gate, self._staged = module, gate, staged
        self._on_rollback = on_rollback
        self._touched: list[tuple[str, StagedRefit]] = []
        self._judged = False

    def run(self, judge: Callable[[], None], timed: AbstractContextManager[None]) -> None:
        """Commit all engines and have the result judged, while calls wait.

        From the first commit until it is certain which weights are live, the gate is poisoned: an
        interrupt that comes between two lines here leaves a module that refuses calls.

        Args:
            judge: Raises if the new weights must not stay.
            timed: Times the commit itself, without waiting and judging.

        Raises:
            EngineError: An engine failed to commit; the old weights are back.
            ModuleLostError: Rolling back failed; the module refuses calls.
            BaseException: What ``judge`` raised; the old weights are back.
        """
        with self._gate.alone():
            try:
                with raised_as(EngineError, "Pending work of the module failed"):
                    self._module.drain()
                self._gate.poison("a commit was interrupted")
                with timed:
                    self._commit()
                self._judged = True
                judge()
            except BaseException as exc:
                self._back(exc)
                raise
            self._gate.heal()

    def _commit(self) -> None:
        for name, one in self._staged.take():
            self._touched.append((name, one))
            with raised_as(EngineError, f"The engine {name!r} failed to commit"):
                one.commit()

    def _back(self, cause: BaseException) -> None:
        """Bring all old weights back, or poison the module."""
        failure: BaseException | None = None
        for _, one in reversed(self._touched):
            try:
                one.rollback()
            except BaseException as exc:  # noqa: BLE001 - every engine must be tried
                failure = exc
        if failure is None and (self._touched or self._judged):
            try:
                self._on_rollback()
            except BaseException as exc:  # noqa: BLE001 - it decides whether calls are safe
                failure = exc
        if failure is None:
            self._gate.heal()
            return
        self._gate.poison(failure)
        lost: ModuleLostError = lost_error(failure)
        lost.add_note(f"The rollback was because of: {type(cause).__name__}: {cause}")
        raise lost from failure
