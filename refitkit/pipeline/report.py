"""What is known of a refit while it runs, and the report made of it.

Everything is collected before the commit, so that making a report later calls no engine, no plugin
and no source, and cannot fail.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from refitkit.model import RefitReport
from refitkit.pipeline.changes import Changes
from refitkit.pipeline.mapping import Served

if TYPE_CHECKING:
    from collections.abc import Callable

    from refitkit.model import (
        EngineMemory,
        KeptWeights,
        StageTime,
        TransformRow,
        VerificationResult,
    )
    from refitkit.pipeline.clock import Clock
    from refitkit.pipeline.mapping import Mapping

UNVERIFIED = "nothing was verified after the commit: only staging was checked"
UNCHANGED = "the new weights are bit for bit those that the module held: nothing changed"
NOBODY = Served((), {}, {}, frozenset())
UNUSED = "inputs= were given and not used"
BASE_LOST = "the weights that the module was compiled or loaded with are no longer kept"


@dataclass
class Findings:
    """What is known so far; see ``RefitReport`` for the meanings.

    Attributes:
        base_lost: Why the weights of version 0 cannot be gone back to from now on.
        unused: Why inputs were given in vain.
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
    unused: str = ""

    def outcome(self, outcome: Literal["committed", "rolled-back"]) -> Outcome:
        """What is known so far, and how it went."""
        return Outcome(
            outcome=outcome,
            backend=self.backend,
            source=self.source,
            version=self.before + (outcome == "committed"),
            partial=self.partial,
            delta=self.delta,
            changed=self.changed,
            changes=self.changes,
            stages=self.clock.stages,
            memory=self.memory,
            kept=self.kept,
            served=self.mapping.served() if self.mapping else NOBODY,
            transforms=self.transforms(),
            verification=self.verification,
            base_lost=self.base_lost,
            unused=self.unused,
        )

    def report(self, outcome: Literal["committed", "rolled-back"]) -> RefitReport:
        """A report of what is known so far."""
        return self.outcome(outcome).report


@dataclass(frozen=True)
class Outcome:
    """How a refit went: all that a report says, and nothing of the weights.

    A row for each slot takes longer than some refits, so the report is made when it is asked for.
    """

    outcome: Literal["committed", "rolled-back"]
    backend: str
    source: str
    version: int
    partial: bool
    delta: bool
    changed: bool | None
    changes: Changes
    stages: tuple[StageTime, ...]
    memory: tuple[EngineMemory, ...]
    kept: tuple[KeptWeights, ...]
    served: Served
    transforms: tuple[TransformRow, ...]
    verification: VerificationResult | None
    base_lost: str
    unused: str

    @cached_property
    def report(self) -> RefitReport:
        """The report."""
        return RefitReport(
            outcome=self.outcome,
            backend=self.backend,
            source=self.source,
            version=self.version,
            partial=self.partial,
            delta=self.delta,
            changed=self.changed,
            changes=self.changes.rows,
            slots_written=len(self.served.slots),
            slots_unchanged=len(self.served.unchanged),
            bytes_written=self.served.nbytes,
            stages=self.stages,
            memory=self.memory,
            kept=self.kept,
            ledger=self.served.rows(),
            transforms=self.transforms,
            verification=self.verification,
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        notes = [UNCHANGED] if self.changed is False else []
        notes += dict.fromkeys(row.note for row in self.transforms if row.note)
        notes += self.changes.notes
        if self.base_lost:
            notes.append(f"{BASE_LOST}: {self.base_lost}")
        if self.unused:
            notes.append(f"{UNUSED}: {self.unused}")
        if not self.verification:
            notes.append(UNVERIFIED)
        return tuple(notes)
