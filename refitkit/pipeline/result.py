"""What refits give back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refitkit.model import RefitReport
    from refitkit.pipeline.compiled import CompiledModule
    from refitkit.pipeline.pipeline import Pipeline
    from refitkit.pipeline.report import Outcome


@dataclass(frozen=True)
class RefitResult:
    """What a refit gives back.

    Attributes:
        module: The refitted module: the one that was given, or with ``copy=True`` a second one.
        outcome: How it went.
        pipeline: What did it, and can undo it.
    """

    module: CompiledModule
    outcome: Outcome = field(repr=False)
    pipeline: Pipeline = field(repr=False, compare=False)

    @property
    def report(self) -> RefitReport:
        """What was done and measured. Made when it is first asked for."""
        return self.outcome.report

    def undo(self, **how: Any) -> RefitResult:
        """Go back to the weights from before this refit, as far as they are still held.

        Later refits are undone with it.

        Args:
            **how: ``inputs``, ``reference``, ``verify``, as for
                :meth:`refitkit.Pipeline.restore`, which says what is raised, too.
        """
        return self.pipeline.restore(self.module, self.outcome.version - 1, **how)


class RefitResults(tuple[RefitResult, ...]):
    """What a refit of several modules gives back: a result for each, in their order."""

    __slots__ = ()

    def undo(self) -> RefitResults:
        """Go back to the weights from before this refit: all modules, or none.

        Raises:
            RefitError: As :meth:`refitkit.Pipeline.restore` says.
        """
        back = [(result.module, result.outcome.version - 1) for result in self]
        return self[0].pipeline.restore_all(back) if self else self
