"""New values of one module on their way: staged, committed, judged; or taken back."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from refitkit.errors import NotRefittableError, VerificationError
from refitkit.pipeline import verify
from refitkit.pipeline.changes import measured
from refitkit.pipeline.finite import FiniteCheck
from refitkit.pipeline.history import History
from refitkit.pipeline.keeping import GIVEN_UP, SnapshotBuilder
from refitkit.pipeline.stage import Staged
from refitkit.pipeline.transform import require_measured

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from contextlib import AbstractContextManager

    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.model import KeptWeights, SlotKey, VerificationResult
    from refitkit.pipeline.compiled import CompiledModule
    from refitkit.pipeline.gate import Gate
    from refitkit.pipeline.held import WeightState
    from refitkit.pipeline.mapping import SlotMapping
    from refitkit.pipeline.report import Findings, Outcome
    from refitkit.protocols import OpenedModule, SlotValue
    from refitkit.recipe import RefitPlan


@dataclass(frozen=True)
class Prepared:
    """All that is known before anything is staged.

    Attributes:
        found: What the report will say.
        plan: The plan that is followed.
        judge: What judges the result; None: nothing does.
        whole: Values of all slots, of those too that hold theirs already: for engines that have
            lost them.
        held: What the module will hold, but for its history, once these values are live.
        read: Called once all is staged; raises where what was read is not of one version.
        partial: Whether slots without a value keep theirs.
        rollback: Whether the weights from before are kept until the verdict.
        finite: Whether new values have to be finite where the present ones are.
    """

    found: Findings
    plan: RefitPlan
    judge: Callable[[OpenedModule], VerificationResult] | None
    whole: Callable[[], SlotMapping]
    held: Callable[[SlotMapping], WeightState]
    read: Callable[[], None] = lambda: None
    partial: bool = False
    rollback: bool = True
    finite: bool = False


class Writing:
    """One module's part in a transaction; see ``commit.Part``.

    Attributes:
        staged: What is staged.
        outcome: What was done; there once it is committed and judged.
    """

    outcome: Outcome

    def __init__(
        self, host: Host, config: Config, compiled: CompiledModule, prepared: Prepared
    ) -> None:
        """Nothing is staged yet."""
        self._host, self._config, self._compiled = host, config, compiled
        self._prepared, self._found = prepared, prepared.found
        self._before = compiled.held
        self._keeping: SnapshotBuilder | None = None
        self.staged = Staged(compiled.opened)
        self._finite: FiniteCheck | None = None
        if prepared.finite:
            overwrite = not prepared.rollback
            self._finite = FiniteCheck(compiled.opened, prepared.plan, overwrite=overwrite)

    @property
    def module(self) -> OpenedModule:
        """The opened module."""
        return self._compiled.opened

    @property
    def gate(self) -> Gate:
        """Its gate."""
        return self._compiled.gate

    @property
    def _mapping(self) -> SlotMapping:
        mapping = self._found.mapping
        if mapping is None:
            raise RuntimeError("nothing is written before it is mapped")
        return mapping

    # -- before the commit --------------------------------------------------------------------

    def stage(self) -> None:
        """Stage all values, and copy what is kept of the old ones.

        Raises:
            RefitError: An engine refuses or fails, or what was computed is too bad or not finite.
        """
        with self._found.clock.stage("stage"):
            self._stage()
            self._prepared.read()
            written = self._mapping.values
            if self._finite is not None:
                self._finite.require(self.staged, written)
            changes = measured(self._config, self.module, self.staged, written)
            # where a sample differs nobody has to compare all of both sets
            self._found.changed = changes.seen or self.staged.changed()
            self._found.changes = changes
            self._found.memory = self.staged.memory()
            if self._prepared.rollback:
                self._keeping = self._kept()
        with self._reporting():
            require_measured(self._found.transforms())

    def _stage(self) -> None:
        """Stage what changed; all of it where an engine has lost what the others hold."""
        mapping, partial = self._mapping, self._prepared.partial
        keeping = {engine for engine, _ in (*mapping.unchanged, *mapping.kept)}
        try:
            self._stage_keeping(keeping)
        except NotRefittableError:
            if partial or not mapping.unchanged:
                raise
            self.staged.discard()
            self._found.mapping = self._prepared.whole()
            self._stage_keeping({engine for engine, _ in self._mapping.kept})

    def _stage_keeping(self, keeping: Collection[str]) -> None:
        """Stage all values; engines of these names keep what they have no value for."""
        values = self._mapping.values
        some = {key: value for key, value in values.items() if key[0] in keeping}
        rest = {key: value for key, value in values.items() if key[0] not in keeping}
        self._fill(rest, partial=self._prepared.partial)
        self._fill(some, partial=True)

    def _fill(self, values: dict[SlotKey, SlotValue], *, partial: bool) -> None:
        watched = values if self._finite is None else self._finite.watched(values)
        self.staged.fill(watched, partial=partial, overwrite=not self._prepared.rollback)

    def _kept(self) -> SnapshotBuilder:
        return SnapshotBuilder(
            self.module,
            self._before,
            self._mapping.values,
            self._config,
            with_base=self._wants_base,
        )

    @property
    def _wants_base(self) -> bool:
        """Whether copies are the way back to the first weights."""
        elsewhere = self._compiled.base is not None or self._compiled.origin is not None
        return self._config.keep_base and self._prepared.rollback and not elsewhere

    def discard(self) -> None:
        """Forget what is staged and was not committed."""
        self.staged.discard()

    # -- the transaction ----------------------------------------------------------------------

    def put_aside(self) -> None:
        """Copy what calls may have written since."""
        if self._keeping is not None:
            self._keeping.copy_mutable()

    def timed(self) -> AbstractContextManager[None]:
        """Times the commit."""
        return self._found.clock.stage("commit")

    def judge(self) -> None:
        """Tell plugins, have the result judged, and note what the module holds."""
        after = self._after()
        self._found.kept = self._shown(after.history)
        if self._wants_base and not self._before.history.base_lost:
            self._found.base_lost = after.history.base_lost
        self._tell("committed")
        if self._prepared.judge is not None:
            with self._reporting():
                self._judge(self._prepared.judge)
        self.outcome = self._found.outcome("committed")
        self._compiled.held = after

    def _after(self) -> WeightState:
        held = self._prepared.held(self._mapping)
        return replace(held, source=self._found.source, history=self._history(held.version))

    def _history(self, version: int) -> History:
        if self._keeping is None:
            before = self._before.history
            return History(
                base_lost=GIVEN_UP,
                written=before.written | self._mapping.values.keys(),
                plan=self._prepared.plan,
                overridden=before.overridden,
            )
        return self._keeping.after(version, self._prepared.plan)

    def _judge(self, judge: Callable[[OpenedModule], VerificationResult]) -> None:
        with self._found.clock.stage("verify"):
            self._found.verification = judge(self.module)
        if not self._found.verification.ok:
            raise VerificationError(
                "The refitted module is not what it should be; its old weights are back.",
                problems=verify.problems_of(self._found.verification),
            )

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Give a verdict the report of the attempt, with all that was measured."""
        try:
            yield
        except VerificationError as exc:
            self._find_before()
            exc.report = self._found.report("rolled-back")
            raise

    def taken_back(self) -> None:
        """The old weights are live again: note it, and tell plugins."""
        self._compiled.held = self._before
        self._find_before()
        self._tell("rolled-back")

    def _find_before(self) -> None:
        """What is kept is what was, but for what engines had."""
        self._found.kept = self._shown(self._before.history, spent=True)
        self._found.base_lost = ""

    def _shown(self, history: History, *, spent: bool = False) -> tuple[KeptWeights, ...]:
        named = self._compiled.base is not None
        return history.shown(self._compiled.origin, named=named, spent=spent)

    def _tell(self, outcome: Literal["committed", "rolled-back"]) -> None:
        hook = "refitkit_weights_changed"
        if self._host.has(hook):  # mostly nobody asks, and a report takes its time
            self._host.call(hook, module=self.module, report=self._found.report(outcome))
