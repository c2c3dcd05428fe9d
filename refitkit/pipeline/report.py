"""What is known of a refit while it runs, and the report made of it.

Everything is collected before the commit, so that making a report later calls no engine, no plugin
and no source, and cannot fail.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from refitkit.model import RefitReport
from refitkit.pipeline.changes import Changes

if TYPE_CHECKING:
    from collections.abc import Callable

    from refitkit.model import (
        EngineMemory,
        KeptWeights,
        ReportRow,
        TransformRow,
        VerificationResult,
    )
    from refitkit.pipeline.clock import Clock
    from refitkit.pipeline.mapping import Mapping

UNVERIFIED = "nothing was verified after the commit: only staging was checked"
UNCHANGED = "the new weights are bit for bit those that the module held: nothing changed"
BASE_LOST = "the weights that the module was compiled or loaded with are no longer kept"


@dataclass
class Findings:
    """What is known so far; see ``RefitReport`` for the meanings.

    Attributes:
        base_lost: Why the weights of version 0 cannot be gone back to from now on.
    """

    backend: str
    before: int
    partial: bool
    delta: bool
    clock: Clock
    source: str = ""
    mapping: Mapping | None = None
    changed: bool | None = None
    changes: Changes = field(default_factory=Changes)
    memory: tuple[EngineMemory, ...] = ()
    kept: tuple[KeptWeights, ...] = ()
    base_lost: str = ""
    transforms: Callable[[], tuple[TransformRow, ...]] = tuple
    verification: VerificationResult | None = None
    _rows: tuple[ReportRow, ...] | None = None
    _written: tuple[int, int] = (0, 0)  # slots and bytes

    def report(self, outcome: Literal["committed", "rolled-back"]) -> RefitReport:
        """A report of what is known so far."""
        ledger = self._ledger()
        return RefitReport(
            outcome=outcome,
            backend=self.backend,
            source=self.source,
            version=self.before + (outcome == "committed"),
            partial=self.partial,
            delta=self.delta,
            changed=self.changed,
            changes=self.changes.rows,
            slots_written=self._written[0],
            slots_unchanged=len(self.mapping.unchanged) if self.mapping else 0,
            bytes_written=self._written[1],
            stages=self.clock.stages,
            memory=self.memory,
            kept=self.kept,
            ledger=ledger,
            transforms=self.transforms(),
            verification=self.verification,
            notes=self._notes(),
        )

    def _ledger(self) -> tuple[ReportRow, ...]:
        """Rows of all slots, made once: every commit is reported before and after the verdict."""
        if self.mapping is None:
            return ()
        if self._rows is None:  # the first report is made when the mapping is final
            self._rows = self.mapping.rows()
            values = self.mapping.values.values()
            self._written = len(values), sum(value.slot.nbytes for value in values)
        return self._rows

    def _notes(self) -> tuple[str, ...]:
        notes = [UNCHANGED] if self.changed is False else []
        notes += self.changes.notes
        if self.base_lost:
            notes.append(f"{BASE_LOST}: {self.base_lost}")
        if not self.verification:
            notes.append(UNVERIFIED)
        return tuple(notes)
