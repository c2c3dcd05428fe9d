"""One refit, from weights to verdict: load, map, check, prepare, stage, commit, verify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from refitkit.errors import (
    NotRefittableError,
    PlanMismatchError,
    SourceError,
    VerificationError,
    raised_as,
)
from refitkit.pipeline import verify
from refitkit.pipeline.changes import measured
from refitkit.pipeline.check import check_abilities, check_weights
from refitkit.pipeline.clock import Clock
from refitkit.pipeline.commit import Transaction
from refitkit.pipeline.delta import Delta
from refitkit.pipeline.load import open_weights
from refitkit.pipeline.mapping import map_slots, require_all, require_reached
from refitkit.pipeline.overrides import left, overrides
from refitkit.pipeline.report import Findings
from refitkit.pipeline.stage import Staged
from refitkit.pipeline.tools import tools_for
from refitkit.pipeline.transform import Transformed, require_measured, transformed
from refitkit.protocols import VerifyRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.model import RefitReport, VerificationResult
    from refitkit.pipeline.compiled import CompiledModule
    from refitkit.pipeline.delta import Live
    from refitkit.pipeline.mapping import Mapping
    from refitkit.protocols import OpenedModule, Plan, WeightSource
    from refitkit.recipe import RefitPlan


@dataclass(frozen=True)
class Wish:
    """What a user asks of one refit; see ``refitkit.refit``."""

    weights: object
    plan: RefitPlan | None = None
    inputs: Any = None
    reference: Any = None
    verify: str | None = None
    partial: bool = False
    delta: bool = False


class Refit:
    """One refit of one module."""

    def __init__(self, host: Host, config: Config, compiled: CompiledModule, wish: Wish) -> None:
        """Prepare one; nothing is touched yet."""
        self._host, self._config, self._compiled, self._wish = host, config, compiled, wish
        self._module = compiled.opened
        self._clock = Clock(host, "refit")
        self._delta: Delta | None = None
        self._overridden: frozenset[str] = frozenset()

    def run(self) -> RefitReport:
        """Do it.

        Raises:
            RefitError: Refused or failed; unless it is a ``ModuleLostError``, the module answers
                as before.
        """
        with self._compiled.gate.refit():
            before, wish = self._compiled.version, self._wish
            self._found = Findings(
                self._compiled.backend, before, wish.partial, wish.delta, self._clock
            )
            with self._clock.stage("load"):
                source = open_weights(self._host, self._wish.weights, self._config)
                plan = self._bound_plan()
                source = self._transformed(plan, source)
                self._found.source = source.description
            self._delta = self._compared(plan, source) if wish.delta else None
            with self._clock.stage("map"):
                unchanged = self._delta.unchanged if self._delta else frozenset()
                mapping = self._map(plan, source, unchanged)
                self._found.mapping = mapping
            with self._clock.stage("check"):
                self._check(plan, source, mapping)
            with self._clock.stage("prepare"):
                judge = self._prepared(plan, source, mapping)
            return self._write(source, mapping, judge)

    def _bound_plan(self) -> RefitPlan:
        plan = self._wish.plan or self._compiled.plan
        if plan is None:
            raise PlanMismatchError(
                "The module has no plan, so nobody knows which weight goes into which slot.",
                hint="Make one from the program that was compiled: "
                "plan = refitkit.plan(program, target=compiled).",
            )
        plan.check_engines(self._compiled.backend, self._compiled.slots)
        return plan

    def _transformed(self, plan: RefitPlan, source: WeightSource) -> WeightSource:
        """The weights as the program reads them."""
        partial = self._wish.partial
        made = transformed(self._host, self._config, plan, source, partial=partial)
        if isinstance(made, Transformed):
            self._found.transforms = made.rows
        return made

    def _compared(self, plan: RefitPlan, source: WeightSource) -> Delta:
        live, version = self._compiled.live, self._compiled.version
        unreadable = raised_as(SourceError, f"{source.description} cannot be compared")
        with self._clock.stage("compare"), unreadable:
            return Delta(plan, self._module, source, live, version)

    def _map(
        self, plan: Plan, source: WeightSource, unchanged: frozenset[tuple[str, str]]
    ) -> Mapping:
        return map_slots(
            self._host,
            plan,
            self._module,
            source,
            self._compiled.program,
            self._config,
            unchanged=unchanged,
        )

    def _check(self, plan: RefitPlan, source: WeightSource, mapping: Mapping) -> None:
        partial = self._wish.partial
        check_weights(
            self._host,
            plan,
            self._module,
            source,
            partial=partial,
            config=self._config,
            unchanged=self._delta.same if self._delta else frozenset(),
        )
        check_abilities(self._module, partial=partial, config=self._config)
        with raised_as(SourceError, f"{source.description} cannot be read"):
            if partial:
                mapping.keep_pinned()
                before = self._compiled.overridden
                require_reached(mapping, source, before)
                self._overridden = left(before, plan, source)
            else:
                require_all(mapping, source)
                self._overridden = overrides(plan, source)

    def _prepared(
        self, plan: RefitPlan, source: WeightSource, mapping: Mapping
    ) -> Callable[[OpenedModule], VerificationResult] | None:
        wish = self._wish
        inputs = verify.as_inputs(wish.inputs)
        verifier = verify.choose(
            self._host, wish.verify, self._module, with_inputs=inputs is not None
        )
        if verifier is None:
            return None
        request = VerifyRequest(
            plan=plan,
            module=self._module,
            source=source,
            values=self._whole(source, mapping).values,
            inputs=inputs,
            reference=wish.reference,
            program=self._compiled.program,
            tolerances=verify.tolerances_for(self._config, self._module),
            tools=tools_for(self._host, self._config, "refit", "verify"),
        )
        return verify.prepared(verifier, request)

    def _whole(self, source: WeightSource, mapping: Mapping) -> Mapping:
        """Values of unchanged slots, too."""
        if not mapping.unchanged:
            return mapping
        whole = self._map(mapping.plan, source, frozenset())
        if self._wish.partial:
            whole.keep_pinned()
        whole.values.update(mapping.values)
        return whole

    def _write(
        self,
        source: WeightSource,
        mapping: Mapping,
        judge: Callable[[OpenedModule], VerificationResult] | None,
    ) -> RefitReport:
        staged = Staged(self._module)
        try:
            with self._clock.stage("stage"):
                self._stage(staged, source, mapping)
                self._found.changed = staged.changed()
                values = (self._found.mapping or mapping).values
                self._found.changes = measured(self._config, self._module, staged, values)
                self._found.memory = staged.memory()
            self._require_measured()
            return self._commit(staged, judge)
        finally:
            staged.discard()

    def _require_measured(self) -> None:
        try:
            require_measured(self._found.transforms())
        except VerificationError as exc:
            exc.report = self._found.report("rolled-back")
            raise

    def _stage(self, staged: Staged, source: WeightSource, mapping: Mapping) -> None:
        """Stage what changed; all of it where an engine has lost what the others hold."""
        if not mapping.unchanged:
            staged.fill(mapping.values, partial=self._wish.partial)
            return
        keeping = {engine for engine, _ in mapping.unchanged}
        some = {key: value for key, value in mapping.values.items() if key[0] in keeping}
        rest = {key: value for key, value in mapping.values.items() if key[0] not in keeping}
        try:
            staged.fill(rest, partial=self._wish.partial)
            staged.fill(some, partial=True)
        except NotRefittableError:
            if self._wish.partial:
                raise
            staged.discard()
            self._found.mapping = self._whole(source, mapping)
            staged.fill(self._found.mapping.values, partial=False)

    def _commit(
        self, staged: Staged, judge: Callable[[OpenedModule], VerificationResult] | None
    ) -> RefitReport:
        def verdict() -> None:
            self._tell(self._found.report("committed"))
            if judge is not None:
                self._judge(judge)
            reports.append(self._found.report("committed"))
            self._compiled.version += 1
            self._compiled.live = self._now_live()
            self._compiled.overridden = self._overridden

        def taken_back() -> None:
            self._compiled.version, self._compiled.live = self._found.before, live
            self._compiled.overridden = overridden
            self._tell(self._found.report("rolled-back"))

        reports: list[RefitReport] = []
        live, overridden = self._compiled.live, self._compiled.overridden
        gate = self._compiled.gate
        transaction = Transaction(self._module, gate, staged, on_rollback=taken_back)
        try:
            transaction.run(verdict, self._clock.stage("commit"))
        except VerificationError as exc:
            exc.report = self._found.report("rolled-back")
            raise
        return reports[0]

    def _now_live(self) -> Live | None:
        if self._delta is None or self._found.mapping is None:
            return None
        return self._delta.after(self._found.mapping.values, self._compiled.version)

    def _tell(self, report: RefitReport) -> None:
        self._host.call("refitkit_weights_changed", module=self._module, report=report)

    def _judge(self, judge: Callable[[OpenedModule], VerificationResult]) -> None:
        with self._clock.stage("verify"):
            self._found.verification = judge(self._module)
        if not self._found.verification.ok:
            raise VerificationError(
                "The refitted module is not what it should be; its old weights are back.",
                problems=verify.problems_of(self._found.verification),
            )
