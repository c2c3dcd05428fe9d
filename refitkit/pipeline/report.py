"""The facts of one refit, collected while it runs, and the report made of them.

Stages write into a ``ReportDraft``. ``close`` is called after the verification: it drops the
weights and reads all facts from engines, plugins and sources. So making the report
later calls none of them and cannot fail.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from refitkit.model import RefitReport
from refitkit.pipeline.changes import Changes
from refitkit.pipeline.mapping import MappingSummary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from refitkit.model import (
        EngineMemory,
        EngineRoute,
        KeptWeights,
        TransformRow,
        VerificationResult,
    )
    from refitkit.pipeline.context import StageClock
    from refitkit.pipeline.mapping import SlotMapping

Outcome: TypeAlias = Literal["committed", "rolled-back"]

UNVERIFIED = "nothing was verified after the commit: only staging was checked"
UNCHANGED = "the new weights are bit for bit those that the module held: nothing changed"
ON_LEFT_OUT = "to set them, name them in a state_dict or pass a program"
UNUSED = "inputs= were given and not used"
LEFT_OUT = "the module's buffers that no state_dict holds differ from the plan's, which stay"
STATE_KEPT = "state that calls write was kept, as the weights do not contain it"
STATE_RESET = "state that calls write was reset to its value at export"
WAITED = "calls waited for the commit and its verification, as calls write to these buffers"
BASE_LOST = "the weights that the module was compiled or loaded with are no longer kept"

_NO_SLOTS = MappingSummary((), {}, {}, frozenset())


@dataclass
class ReportDraft:
    """The facts of one refit; see :class:`~refitkit.model.RefitReport` for most meanings.

    Attributes:
        before: Version of the weights before the refit.
        clock: Times the stages.
        mapping: Values of the slots; None before they are mapped, and once the draft is closed.
        summary: How slots were served; there once the draft is closed.
        base_lost: Why the weights of version 0 cannot be restored from now on; empty if they can.
        left_out: Buffers of a live module that differ from the values that the plan keeps.
        transforms: Gives the rows of the transforms.
        unused: Why the given inputs were not used; empty if they were.
        pause_seconds: Time from closing to opening the gate; None before it has opened.
        routes: The way in which each engine got its weights; there once the draft is closed.
        waited_for: Slots that calls write, so that they had to wait for this refit.
    """

    backend: str
    before: int
    clock: StageClock
    partial: bool = False
    delta: bool = False
    source: str = ""
    mapping: SlotMapping | None = None
    summary: MappingSummary | None = None
    changed: bool | None = None
    changes: Changes = field(default_factory=Changes)
    memory: tuple[EngineMemory, ...] = ()
    kept: tuple[KeptWeights, ...] = ()
    base_lost: str = ""
    left_out: tuple[str, ...] = ()
    transforms: Callable[[], tuple[TransformRow, ...]] = tuple
    verification: VerificationResult | None = None
    unused: str = ""
    pause_seconds: float | None = None
    routes: tuple[EngineRoute, ...] = ()
    waited_for: tuple[str, ...] = ()
    _report: RefitReport | None = field(default=None, repr=False)

    @property
    def version(self) -> int:
        """Version of the new weights, once they are committed."""
        return self.before + 1

    def close(self) -> None:
        """Drop the weights. From now on ``committed`` calls no engine, plugin or source."""
        # transforms refer to the source, and the source to the weights
        rows = self.transforms()
        self.transforms = lambda: rows
        self.summary = self._summary()
        # the values in a mapping keep the new weights alive, and often their source, too
        self.mapping = None

    @property
    def committed(self) -> RefitReport:
        """The report of a committed refit, made when it is first asked for.

        A row for each slot takes longer than some refits.
        """
        if self._report is None:
            self._report = self.report("committed")
        return self._report

    def report(self, outcome: Outcome) -> RefitReport:
        """A report of the facts so far."""
        summary, transforms = self._summary(), self.transforms()
        return RefitReport(
            outcome=outcome,
            backend=self.backend,
            source=self.source,
            version=self.version if outcome == "committed" else self.before,
            partial=self.partial,
            delta=self.delta,
            changed=self.changed,
            changes=self.changes.rows,
            slots_written=len(summary.slots),
            slots_unchanged=len(summary.unchanged),
            bytes_written=summary.nbytes,
            stages=self.clock.stages,
            memory=self.memory,
            kept=self.kept,
            ledger=summary.rows,
            state=summary.state_rows(),
            transforms=transforms,
            verification=self.verification,
            pause_seconds=self.pause_seconds,
            routes=self.routes,
            notes=tuple(self._notes(summary, transforms)),
            trial=self.clock.trial,
        )

    def _summary(self) -> MappingSummary:
        if self.summary is not None:
            return self.summary
        return _NO_SLOTS if self.mapping is None else self.mapping.summary

    def _notes(
        self, summary: MappingSummary, transforms: tuple[TransformRow, ...]
    ) -> Iterator[str]:
        if self.changed is False:
            yield UNCHANGED
        # all groups of a transform may have the same note
        yield from dict.fromkeys(row.note for row in transforms if row.note)
        yield from self.changes.notes
        yield from _state_notes(summary)
        if self.left_out:
            yield f"{LEFT_OUT}: {', '.join(self.left_out)} ({ON_LEFT_OUT})"
        if self.base_lost:
            yield f"{BASE_LOST}: {self.base_lost}"
        if self.unused:
            yield f"{UNUSED}: {self.unused}"
        if self.waited_for:
            yield f"{WAITED}: {', '.join(self.waited_for)}"
        if not self.verification:
            yield UNVERIFIED


def _state_notes(summary: MappingSummary) -> Iterator[str]:
    """A note on the state that was kept, and one on the state that was reset."""
    several = len({row.slot.engine for row in summary.ledger}) > 1
    for outcome, text, hint in (
        ("kept", STATE_KEPT, " (reset_state=True resets it)"),
        ("reset", STATE_RESET, ""),
    ):
        keys = [key for key, found in summary.state if found == outcome]
        if keys:
            shown = ", ".join("/".join(key) if several else key[1] for key in keys)
            yield f"{text}: {shown}{hint}"
