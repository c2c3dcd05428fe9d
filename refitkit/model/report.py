"""What a refit tells of itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pydantic import Field

from refitkit.model.base import Frozen
from refitkit.model.plan import SlotState


class StageTime(Frozen):
    """How long one stage took.

    Attributes:
        stage: ``load``, ``map``, ``check``, ``prepare``, ``stage``, ``commit``, ``verify``, ...
        seconds: Wall-clock time.
    """

    stage: str
    seconds: float


class EngineMemory(Frozen):
    """What keeping the way back costs one engine.

    Attributes:
        engine: Name of the engine.
        kind: Where the previous weights are: ``inactive-buffer``, ``device``, ``pinned-host``,
            ``mapped-file``, ``engine-bytes`` or ``none``.
        bytes: Size of what is held.
    """

    engine: str
    kind: str
    bytes: int


class KeptWeights(Frozen):
    """Earlier weights that a module can go back to.

    Attributes:
        version: Their number.
        source: What they were, in words.
        bytes: Size of what is kept for them alone; 0 where the engines have them anyway.
        where: ``host``: in memory of the host; ``engine``: in the engines, until the next refit;
            ``file``: where the module was loaded from; ``base``: in the weights that
            ``compiled.base`` names.
    """

    version: int
    source: str
    bytes: int
    where: str


class ReportRow(Frozen):
    """One slot in the report.

    Attributes:
        engine: Name of the engine.
        slot: The engine's own name of the weight.
        state: Its state in the plan's ledger.
        strategy: Which strategy gave the new value; empty where the slot was left as it is.
        sources: FQNs that the value came from.
        reason: Why the slot was left as it is, or why other strategies did not serve it.
    """

    engine: str
    slot: str
    state: SlotState
    strategy: str = ""
    sources: tuple[str, ...] = ()
    reason: str = ""


class StateRow(Frozen):
    """What a refit did to one slot that calls of the module write.

    Attributes:
        engine: Name of the engine.
        slot: The engine's own name of the slot.
        outcome: ``kept``: it holds what calls wrote, because the weights do not contain it.
            ``set``: it got the value of the weights. ``reset``: it got the value that it had when
            the program was exported.
    """

    engine: str
    slot: str
    outcome: Literal["kept", "set", "reset"]


class ChangeRow(Frozen):
    """How far a refit moves one slot.

    Attributes:
        engine: Name of the engine.
        slot: The engine's own name of the weight.
        relative: ||new - old|| / ||old||, in 2-norms: 0 where both have the same values, infinite
            where the old one is all zeros or where an element that is not finite changed. Of
            integers and flags, which have no length: the share of elements that differ.
        largest: Largest absolute difference of two elements; infinite where an element that is not
            finite changed.
        sampled: Whether this is of some elements alone, evenly spread; then 0 does not say that
            nothing changed.
    """

    engine: str
    slot: str
    relative: float
    largest: float
    sampled: bool = False


class OutputMeasure(Frozen):
    """How one thing that was compared differs from what it should be.

    Attributes:
        name: Path of the output in the result (``['logits']``), or a slot's name.
        ok: Whether it passes.
        max_abs_error: Largest absolute difference of two elements, in units of the output.
        limit: Largest absolute difference that passes; 0 where bits are compared.
        scale: Largest absolute value of what it should be.
        note: What is wrong, in words; empty if nothing is.
    """

    name: str
    ok: bool
    max_abs_error: float = 0.0
    limit: float = 0.0
    scale: float = 0.0
    note: str = ""


class VerificationResult(Frozen):
    """What a verifier found.

    Attributes:
        verifier: Its name.
        ok: Whether the module is what it should be.
        measures: One entry for each thing compared.
        note: What was checked and what was not.
        notes: How the names of the weights were read, where that was not as they are. Only
            ``refitkit.verify`` says so here; the report of a refit has it itself.
    """

    verifier: str
    ok: bool
    measures: tuple[OutputMeasure, ...] = ()
    note: str = ""
    notes: tuple[str, ...] = ()

    @property
    def max_abs_error(self) -> float:
        """Largest absolute difference over all measures; 0 where nothing was measured."""
        return max((m.max_abs_error for m in self.measures), default=0.0)


class TransformRow(Frozen):
    """Entries that a transform made of others.

    Attributes:
        transform: Its name.
        plugin: Name of the plugin that offers it.
        takes: Names of the source that were used up.
        gives: FQNs that were made of them.
        measures: How far what was made is from what was taken; empty where it was not read, or
            the transform tells nothing.
        note: What the transform says of it; also among the notes of the report.
    """

    transform: str
    plugin: str
    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    measures: tuple[OutputMeasure, ...] = ()
    note: str = ""


class RefitReport(Frozen):
    """What a refit did.

    Attributes:
        outcome: ``committed`` or ``rolled-back``.
        backend: Name of the backend.
        source: What the weights were, in words.
        version: Number of the weights that the module holds after this: 0 as compiled or loaded,
            then counting up with every commit.
        partial: Whether slots without a new value were left as they are.
        delta: Whether slots whose weights did not change were left as they are.
        changed: Whether any bit of any slot changed; None where no engine can tell.
        changes: How far each slot moves that was written, in engines that show both values.
        slots_written: Number of slots that got a value.
        slots_unchanged: Number of slots that were left as they are because of ``delta``.
        bytes_written: Bytes of those slots.
        stages: Time of each stage, in order.
        memory: What keeping the way back costs during a refit.
        kept: Earlier weights that the module can go back to after this, and what they cost.
        ledger: One row for every slot.
        state: One row for every slot that calls of the module write.
        transforms: What plugins made of entries of the source, such as quantized weights.
        verification: What the verifier found; None where none ran.
        notes: Things a user should know (only staging was checked, nothing changed, ...).
    """

    outcome: Literal["committed", "rolled-back"]
    backend: str
    source: str
    version: int
    partial: bool = False
    delta: bool = False
    changed: bool | None = None
    changes: tuple[ChangeRow, ...] = ()
    slots_written: int = 0
    slots_unchanged: int = 0
    bytes_written: int = 0
    stages: tuple[StageTime, ...] = ()
    memory: tuple[EngineMemory, ...] = ()
    kept: tuple[KeptWeights, ...] = ()
    ledger: tuple[ReportRow, ...] = ()
    state: tuple[StateRow, ...] = ()
    transforms: tuple[TransformRow, ...] = ()
    verification: VerificationResult | None = None
    notes: tuple[str, ...] = Field(default_factory=tuple)

    @property
    def most_changed(self) -> ChangeRow | None:
        """The slot that moves farthest for its length; None where nothing was measured."""
        return max(self.changes, key=lambda row: (row.relative, row.largest), default=None)

    @property
    def seconds(self) -> float:
        """Sum of all stages."""
        return sum(stage.seconds for stage in self.stages)


# MERGED diff: What two sets of weights differ in.

DiffState: TypeAlias = Literal[
    "changed", "other dtype", "other shape", "only in A", "only in B", "not usable", "same"
]

STATES: tuple[DiffState, ...] = (
    "changed",
    "other dtype",
    "other shape",
    "only in A",
    "only in B",
    "not usable",
    "same",
)
"""In the order in which a summary tells them."""


class DiffRow(Frozen):
    """One tensor of two sets of weights, A and B.

    Attributes:
        name: Its name; of a module the slot's, after the engine's where there are several.
        state: ``same``: the same bits; ``changed``; ``only in A``, ``only in B``; ``other shape``,
            ``other dtype``: of the same name and not alike; ``not usable``: no plain tensor with
            data, in A or B.
        dtype: In A, or in B where only B has it.
        shape: Likewise.
        other_dtype: In B, where it is another one.
        other_shape: In B, where it is another one.
        relative: How far B is from A, as in :class:`~refitkit.model.ChangeRow`, from all elements.
            None where they cannot be subtracted.
        largest: Largest absolute difference of two elements; None likewise.
        share: Share of elements of which any bit differs; of other dtypes, after both are
            converted to a wider one. None likewise.
        note: Why it is not usable, or the name under which A or B has the same tied weight.
    """

    name: str
    state: DiffState
    dtype: str = ""
    shape: tuple[int, ...] = ()
    other_dtype: str = ""
    other_shape: tuple[int, ...] | None = None
    relative: float | None = None
    largest: float | None = None
    share: float | None = None
    note: str = ""


class DiffReport(Frozen):
    """What two sets of weights differ in.

    Attributes:
        a: What A is, in words.
        b: What B is, in words.
        rows: One for each name in either: first those that cannot be subtracted, then by relative
            change, the largest first, then those that are the same.
        notes: How the names of A and B were read, where that was not as they are.
    """

    a: str
    b: str
    rows: tuple[DiffRow, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether any row is not ``same``."""
        return any(row.state != "same" for row in self.rows)

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows by state; of states that occur."""
        found = Counter(row.state for row in self.rows)
        return {state: found[state] for state in STATES if state in found}

    @property
    def summary(self) -> str:
        """All of it in a line: ``2 changed, 5 same``."""
        counted = ", ".join(f"{number} {state}" for state, number in self.counts.items())
        if self.differs:
            return counted
        return f"nothing changed: {counted}" if counted else "nothing changed: both are empty"


# MERGED events: Progress, as values. Bars, logs and metrics listen to these through
# ``refitkit_event``.


@dataclass(frozen=True, slots=True)
class Event:
    """Anything worth telling while a pipeline works.

    Attributes:
        verb: What the user asked for: ``compile``, ``load``, ``plan``, ``refit``, ``save``.
    """

    verb: str


@dataclass(frozen=True, slots=True)
class StageStarted(Event):
    """A stage begins.

    Attributes:
        stage: Its name.
        total: Number of steps to come; None where nobody knows.
    """

    stage: str
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Step(Event):
    """A stage came a step further. Sent for things that take long, never once per tensor.

    Attributes:
        stage: Its name.
        text: What was just done.
    """

    stage: str
    text: str


@dataclass(frozen=True, slots=True)
class StageFinished(Event):
    """A stage is over, well.

    Attributes:
        stage: Its name.
        seconds: Wall-clock time.
    """

    stage: str
    seconds: float
