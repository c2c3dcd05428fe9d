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
from refitkit.pipeline.mapping import MappingSummary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from refitkit.model import (
        EngineMemory,
        KeptWeights,
        StageTime,
        TransformRow,
        VerificationResult,
    )
    from refitkit.pipeline.clock import StageClock
    from refitkit.pipeline.mapping import SlotMapping

UNVERIFIED = "nothing was verified after the commit: only staging was checked"
UNCHANGED = "the new weights are bit for bit those that the module held: nothing changed"
NOBODY = MappingSummary((), {}, {}, frozenset())
ON_LEFT_OUT = "to set them, name them in a state_dict or pass a program"
UNUSED = "inputs= were given and not used"
LEFT_OUT = "the module's buffers that no state_dict holds differ from the plan's, which stay"
STATE_KEPT = "state that calls write was kept, as the weights do not contain it"
STATE_RESET = "state that calls write was reset to its value at export"
BASE_LOST = "the weights that the module was compiled or loaded with are no longer kept"


@dataclass
class Findings:
    """What is known so far; see ``RefitReport`` for the meanings.

    Attributes:
        base_lost: Why the weights of version 0 cannot be gone back to from now on.
        left_out: Buffers of a live module that are not what the plan keeps.
        unused: Why inputs were given in vain.
    """

    backend: str
    before: int
    partial: bool
    delta: bool
    clock: StageClock
    source: str = ""
    mapping: SlotMapping | None = None
    changed: bool | None = None
    changes: Changes = field(default_factory=Changes)
    memory: tuple[EngineMemory, ...] = ()
    kept: tuple[KeptWeights, ...] = ()
    base_lost: str = ""
    left_out: tuple[str, ...] = ()
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
            left_out=self.left_out,
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
    served: MappingSummary
    transforms: tuple[TransformRow, ...]
    verification: VerificationResult | None
    base_lost: str
    left_out: tuple[str, ...]
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
            state=self.served.state_rows(),
            transforms=self.transforms,
            verification=self.verification,
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        notes = [UNCHANGED] if self.changed is False else []
        notes += dict.fromkeys(row.note for row in self.transforms if row.note)
        notes += self.changes.notes
        notes += self._state_notes()
        if self.left_out:
            notes.append(f"{LEFT_OUT}: {', '.join(self.left_out)} ({ON_LEFT_OUT})")
        if self.base_lost:
            notes.append(f"{BASE_LOST}: {self.base_lost}")
        if self.unused:
            notes.append(f"{UNUSED}: {self.unused}")
        if not self.verification:
            notes.append(UNVERIFIED)
        return tuple(notes)

    def _state_notes(self) -> Iterator[str]:
        """Which slots that calls write were kept, and which were reset."""
        several = len({row.slot.engine for row in self.served.ledger}) > 1
        for outcome, text, hint in (
            ("kept", STATE_KEPT, " (reset_state=True resets it)"),
            ("reset", STATE_RESET, ""),
        ):
            keys = [key for key, found in self.served.state if found == outcome]
            if keys:
                shown = ", ".join("/".join(key) if several else key[1] for key in keys)
                yield f"{text}: {shown}{hint}"
