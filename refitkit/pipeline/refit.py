"""One refit, from weights to verdict: load, map, check, prepare, stage, commit, verify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from refitkit.errors import PlanMismatchError, PluginError, RefitError, VerificationError
from refitkit.model import RefitReport
from refitkit.pipeline import verify
from refitkit.pipeline.check import check_abilities, check_weights
from refitkit.pipeline.clock import Clock
from refitkit.pipeline.commit import Transaction
from refitkit.pipeline.load import open_weights
from refitkit.pipeline.mapping import map_slots, require_all
from refitkit.pipeline.stage import discard, stage
from refitkit.protocols import VerifyRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.model import VerificationResult
    from refitkit.pipeline.compiled import CompiledModule
    from refitkit.pipeline.mapping import Mapping
    from refitkit.protocols import OpenedModule, StagedRefit, WeightSource
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


class Refit:
    """One refit of one module."""

    def __init__(self, host: Host, config: Config, compiled: CompiledModule, wish: Wish) -> None:
        """Prepare one; nothing is touched yet."""
        self._host, self._config, self._compiled, self._wish = host, config, compiled, wish
        self._module = compiled.opened
        self._clock = Clock(host, "refit")
        self._before = compiled.version
        self._changed: bool | None = None
        self._result: VerificationResult | None = None

    def run(self) -> RefitReport:
        """Do it.

        Raises:
            RefitError: Refused or failed; unless it is a ``ModuleLostError``, the module answers
                as before.
        """
        with self._compiled.gate.refit():
            self._before = self._compiled.version
            with self._clock.stage("load"):
                source = open_weights(self._host, self._wish.weights, self._config)
                plan = self._bound_plan()
            with self._clock.stage("map"):
                mapping = map_slots(self._host, plan, self._module, source, self._config)
            with self._clock.stage("check"):
                self._check(plan, source, mapping)
            with self._clock.stage("prepare"):
                judge = self._prepared(plan, source, mapping)
            with self._clock.stage("stage"):
                staged = stage(self._module, mapping.values, partial=self._wish.partial)
                self._changed = _any_changed(staged)
            return self._commit(staged, source, mapping, judge)

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

    def _check(self, plan: RefitPlan, source: WeightSource, mapping: Mapping) -> None:
        partial = self._wish.partial
        check_weights(self._host, plan, self._module, source, partial=partial, config=self._config)
        check_abilities(self._module, partial=partial, config=self._config)
        if not partial:
            require_all(mapping, source)

    def _prepared(
        self, plan: RefitPlan, source: WeightSource, mapping: Mapping
    ) -> Callable[[OpenedModule], VerificationResult] | None:
        wish = self._wish
        if wish.partial:  # pinned values are the plan's, not the user's: leave what is live
            mapping.values = {k: v for k, v in mapping.values.items() if v.sources}
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
            values=mapping.values,
            inputs=inputs,
            reference=wish.reference,
            program=self._compiled.program,
            tolerances=self._config.tolerances,
        )
        return verifier.prepare(request)

    def _commit(
        self,
        staged: list[tuple[str, StagedRefit]],
        source: WeightSource,
        mapping: Mapping,
        judge: Callable[[OpenedModule], VerificationResult] | None,
    ) -> RefitReport:
        def report(outcome: str) -> RefitReport:
            return self._report(outcome, source, mapping)

        def tell(outcome: str) -> None:
            told = report(outcome)
            self._host.call("refitkit_weights_changed", module=self._module, report=told)

        def verdict() -> None:
            tell("committed")
            if judge is not None:
                with self._clock.stage("verify"):
                    self._result = _judged(judge, self._module)
                if not self._result.ok:
                    raise VerificationError(
                        "The refitted module is not what it should be; its old weights are back.",
                        problems=verify.problems_of(self._result),
                    )
            self._compiled.version += 1

        transaction = Transaction(
            self._module,
            self._compiled.gate,
            staged,
            on_rollback=lambda: tell("rolled-back"),
        )
        try:
            transaction.run(verdict, self._clock.stage("commit"))
        except VerificationError as exc:
            exc.report = report("rolled-back")
            raise
        return report("committed")

    def _report(self, outcome: str, source: WeightSource, mapping: Mapping) -> RefitReport:
        values = mapping.values.values()
        return RefitReport(
            outcome="committed" if outcome == "committed" else "rolled-back",
            backend=self._compiled.backend,
            source=source.description,
            version=self._before + (outcome == "committed"),
            partial=self._wish.partial,
            changed=self._changed,
            slots_written=len(values),
            bytes_written=sum(value.slot.nbytes for value in values),
            stages=self._clock.stages,
            memory=tuple(engine.memory for engine in self._module.engines.values()),
            ledger=mapping.rows(),
            verification=self._result,
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self._changed is False:
            notes.append(
                "the new weights are bit for bit those that the module held: nothing changed"
            )
        if self._result is None:
            notes.append(verify.UNVERIFIED)
        return tuple(notes)


def _any_changed(staged: list[tuple[str, StagedRefit]]) -> bool | None:
    """Whether any engine would change; what is staged is forgotten when that cannot be told."""
    try:
        answers = [one.changed() for _, one in staged]
    except BaseException:
        discard(staged)
        raise
    if any(answers):
        return True
    return None if None in answers else False


def _judged(
    judge: Callable[[OpenedModule], VerificationResult], module: OpenedModule
) -> VerificationResult:
    try:
        return judge(module)
    except RefitError:
        raise
    except Exception as exc:
        raise PluginError(f"The verifier failed: {type(exc).__name__}: {exc}") from exc
