"""Reports of refits, verifications and diffs.

:class:`RefitReport` and :class:`DiffReport` are the results that users get; the models before them
are their rows.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, Self, TypeAlias

from pydantic import Field, model_validator

from refitkit.model.base import Frozen
from refitkit.model.plan import SlotState

# -- refits -----------------------------------------------------------------------------------


class StageTime(Frozen):
    """The duration of one stage.

    Attributes:
        stage: ``load``, ``map``, ``check``, ``prepare``, ``stage``, ``commit``, ``verify``, ...
        seconds: Wall-clock time in seconds.
    """

    stage: str
    seconds: float


class EngineMemory(Frozen):
    """The memory that one engine uses so that a refit can be rolled back.

    Attributes:
        engine: Name of the engine.
        kind: Where the previous weights are: ``inactive-buffer``, ``device``,
            ``mapped-file``, ``engine-bytes`` or ``none``.
        bytes: Size of the previous weights in bytes.
    """

    engine: str
    kind: str
    bytes: int


class EngineRoute(Frozen):
    """The way in which one engine got its weights.

    Attributes:
        engine: Name of the engine.
        name: Name of the way: ``c-interface``, ``binding``, ``direct``, ``refitter``, ...
        why: Why it is not the fastest one; empty if it is.
    """

    engine: str
    name: str
    why: str = ""


class KeptWeights(Frozen):
    """Earlier weights that a module can restore.

    Attributes:
        version: Version number of the weights.
        source: Description of the weights.
        bytes: Size in bytes of the copies for this version alone; 0 if the engines have the weights
            anyway.
        where: ``host``: in host memory. ``engine``: in the engines, until the next refit. ``file``:
            in the file that the module was loaded from. ``base``: in the weights that
            ``compiled.base`` names.
    """

    version: int
    source: str
    bytes: int
    where: str


class ReportRow(Frozen):
    """One slot in the report of a refit.

    Attributes:
        engine: Name of the engine.
        slot: Name of the slot.
        state: State of the slot in the ledger of the plan.
        strategy: Strategy that returned the new value; empty if the slot kept its value.
        sources: FQNs that the value was computed from.
        reason: Why the slot kept its value, or why other strategies returned no value.
    """

    engine: str
    slot: str
    state: SlotState
    strategy: str = ""
    sources: tuple[str, ...] = ()
    reason: str = ""


class StateRow(Frozen):
    """The effect of a refit on one slot that calls of the module write.

    Attributes:
        engine: Name of the engine.
        slot: Name of the slot.
        outcome: ``kept``: the slot keeps the value that calls wrote, because the weights do not
            contain it. ``set``: it has the value of the weights. ``reset``: it has the value from
            the export of the program.
    """

    engine: str
    slot: str
    outcome: Literal["kept", "set", "reset"]


class ChangeRow(Frozen):
    """The distance between the old and the new value of one slot.

    Attributes:
        engine: Name of the engine.
        slot: Name of the slot.
        relative: ||new - old|| / ||old||, in 2-norms. 0 if the values are equal; infinite if the
            old value is all zeros, or if an element changed that is not finite. For integers and
            booleans, the share of elements that differ.
        largest: Largest absolute difference of two elements; infinite if an element changed that is
            not finite.
        sampled: Whether only some elements, evenly spread, were compared. Then 0 does not prove
            that nothing changed.
    """

    engine: str
    slot: str
    relative: float
    largest: float
    sampled: bool = False


class Metric(Frozen):
    """One number beside the largest error: a cosine similarity, a signal-to-noise ratio, ...

    Attributes:
        name: Name of the number, with its unit if it has one: ``SQNR in dB``.
        value: The number.
        limit: Limit of the number; None if it does not decide.
        at_least: Whether the limit is the smallest value that passes. False: the largest.
    """

    name: str
    value: float
    limit: float | None = None
    at_least: bool = False

    @property
    def ok(self) -> bool:
        """Whether the number is within its limit. NaN is not."""
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        """The number and its limit: ``cosine similarity 0.98, at least 0.99``."""
        text = f"{self.name} {self.value:.6g}"
        if self.limit is None:
            return text
        return f"{text}, at {'least' if self.at_least else 'most'} {self.limit:.6g}"


class OutputMeasure(Frozen):
    """The result of one comparison: of an output with a reference, or of a slot with its value.

    Attributes:
        name: Path of the output in the result (``['logits']``), or name of the slot.
        ok: Whether the comparison passes.
        max_abs_error: Largest absolute difference of two elements, in the unit of the output.
        limit: Largest absolute difference that passes; 0 if bits are compared.
        scale: Largest absolute value of the reference.
        note: Description of the failure; empty if it passes.
        metrics: Other numbers, for verifiers and transforms that judge by them.
    """

    name: str
    ok: bool
    max_abs_error: float = 0.0
    limit: float = 0.0
    scale: float = 0.0
    note: str = ""
    metrics: tuple[Metric, ...] = ()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.ok and self.failed:
            text = "; ".join(map(str, self.failed))
            raise ValueError(f"ok is True, but a metric is outside its limit: {text}")
        return self

    @property
    def failed(self) -> tuple[Metric, ...]:
        """The metrics that are outside their limits."""
        return tuple(metric for metric in self.metrics if not metric.ok)

    @property
    def why(self) -> str:
        """Why the comparison fails: the note and the metrics outside their limits."""
        return "; ".join(filter(None, [self.note, *map(str, self.failed)]))


class VerificationResult(Frozen):
    """The result of a verifier.

    Attributes:
        verifier: Name of the verifier.
        ok: Whether the module passes.
        measures: One entry for each comparison. If one is not ``ok``, the result is not.
        note: Description of what was checked and what was not.
        notes: How the names of the weights were changed to fit the program. Set by
            ``refitkit.verify`` only; a refit has this in ``RefitReport.notes``.
    """

    verifier: str
    ok: bool
    measures: tuple[OutputMeasure, ...] = ()
    note: str = ""
    notes: tuple[str, ...] = ()

    @property
    def max_abs_error(self) -> float:
        """Largest absolute difference over all measures; 0 if there are none."""
        return max((m.max_abs_error for m in self.measures), default=0.0)


class TransformRow(Frozen):
    """One group of entries that a transform computed from other entries.

    Attributes:
        transform: Name of the transform.
        plugin: Name of the plugin that offers the transform.
        takes: Names of the entries of the source that the transform consumed.
        gives: FQNs of the entries that it computed.
        measures: Errors of the computed entries; empty if they were not read or not measured.
        note: Remark of the transform, which is also in ``RefitReport.notes``.
    """

    transform: str
    plugin: str
    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    measures: tuple[OutputMeasure, ...] = ()
    note: str = ""


class RefitReport(Frozen):
    """The report of one refit.

    Attributes:
        outcome: ``committed`` or ``rolled-back``.
        backend: Name of the backend.
        source: Description of the new weights.
        version: Version of the weights that the module has after the refit. It is 0 as compiled or
            loaded, and each commit adds 1.
        partial: Whether slots without a new value were to keep their values.
        delta: Whether slots whose weights did not change were to keep their values.
        changed: Whether any bit of any slot changed; None if no engine knows.
        changes: Distance between old and new value of each written slot, for engines that show
            both.
        slots_written: Number of slots that got a new value.
        slots_unchanged: Number of slots that kept their value because of ``delta``.
        bytes_written: Size of the written slots in bytes.
        stages: Duration of each stage, in order.
        memory: Memory that each engine used for a rollback.
        kept: Earlier weights that the module can restore after the refit.
        ledger: One row for every slot.
        state: One row for every slot that calls of the module write.
        transforms: One row for each group of entries that a transform computed.
        verification: Result of the verifier; None if none ran.
        pause_seconds: The longest time that this refit could delay a call, in seconds: from closing
            to opening the gate. It includes the wait for running calls, the commit, hooks, and the
            verifier if it runs behind the gate. 0 if the gate was not closed; None while it is.
        routes: The way in which each engine got its weights, for engines that have several.
        notes: Remarks for the user (only staging was checked, nothing changed, ...).
        trial: Whether refitkit made this refit itself, to prove a plan. The user's weights follow.
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
    pause_seconds: float | None = None
    routes: tuple[EngineRoute, ...] = ()
    notes: tuple[str, ...] = Field(default_factory=tuple)
    trial: bool = False

    @property
    def most_changed(self) -> ChangeRow | None:
        """Row with the largest relative change; None if nothing was measured."""
        # ``largest`` decides between rows of equal or infinite relative change
        return max(self.changes, key=lambda row: (row.relative, row.largest), default=None)

    @property
    def seconds(self) -> float:
        """Duration of all stages in seconds."""
        return sum(stage.seconds for stage in self.stages)


# -- diffs ------------------------------------------------------------------------------------

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
"""All states, in the order of a summary."""


class DiffRow(Frozen):
    """One tensor of two sets of weights, A and B.

    Attributes:
        name: Name of the tensor. For a module, the name of the slot, after the name of the engine
            if there are several.
        state: ``same``: equal bits. ``changed``: equal dtype and shape, other bits. ``other
            dtype``, ``other shape``: they differ. ``only in A``, ``only in B``: missing in the
            other. ``not usable``: not a plain tensor with data, in A or B.
        dtype: Dtype in A, or in B if only B has the tensor.
        shape: Shape in A, or in B if only B has the tensor.
        other_dtype: Dtype in B if it differs; else empty.
        other_shape: Shape in B if it differs; else None.
        relative: Relative change from A to B, as in :class:`~refitkit.model.ChangeRow`, from all
            elements. None if the tensors cannot be subtracted.
        largest: Largest absolute difference of two elements. None in the same case.
        share: Share of elements with at least one different bit. If the dtypes differ, both are
            first converted to a wider one. None in the same case.
        note: Why the tensor is not usable, or the name that A or B has for the same tied weight.
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
    """The differences between two sets of weights, A and B.

    Attributes:
        a: Description of A.
        b: Description of B.
        rows: One row for each name in A or B: first tensors that cannot be subtracted, then changed
            tensors with the largest relative change first, then equal tensors.
        notes: How the names of A and B were changed to match each other.
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
        """Number of rows by state, without states that do not occur."""
        found = Counter(row.state for row in self.rows)
        return {state: found[state] for state in STATES if state in found}

    @property
    def summary(self) -> str:
        """The counts in one line: ``2 changed, 5 same``."""
        counted = ", ".join(f"{number} {state}" for state, number in self.counts.items())
        if self.differs:
            return counted
        return f"nothing changed: {counted}" if counted else "nothing changed: both are empty"
