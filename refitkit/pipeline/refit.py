"""What a refit does before anything is staged: load, compare, map, check, prepare."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from refitkit.errors import ConfigError, PlanMismatchError, Problem, SourceError, raised_as
from refitkit.pipeline import verify
from refitkit.pipeline.check import check_abilities, check_weights
from refitkit.pipeline.clock import StageClock
from refitkit.pipeline.delta import Delta
from refitkit.pipeline.finite import judged_where_staged
from refitkit.pipeline.held import WeightState
from refitkit.pipeline.load import for_one_refit, require_unchanged
from refitkit.pipeline.mapping import map_slots, require_all, require_reached
from refitkit.pipeline.needs import require_needs
from refitkit.pipeline.overrides import differing, left, overrides
from refitkit.pipeline.report import Findings
from refitkit.pipeline.tools import tools_for
from refitkit.pipeline.transform import Transformed, transformed
from refitkit.pipeline.writing import Prepared
from refitkit.protocols import VerifyRequest
from refitkit.recipe import RefitPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.model import VerificationResult
    from refitkit.pipeline.compiled import CompiledModule
    from refitkit.pipeline.mapping import SlotMapping
    from refitkit.protocols import OpenedModule, Plan, WeightSource


_WITH_OPTIONS = 3
_ON_JOBS = 'Pass [(module, weights), ...], or (module, weights, {"inputs": (x,)}) for some of them.'


@dataclass(frozen=True)
class RefitRequest:
    """What a user asks of one refit; see ``refitkit.refit``."""

    weights: object
    plan: RefitPlan | None = None
    inputs: Any = None
    reference: Any = None
    verify: str | None = None
    partial: bool = False
    delta: bool = False
    rollback: bool = True
    reset_state: bool = False


_OPTIONS = frozenset(field.name for field in fields(RefitRequest)) - {"weights"}


def as_jobs(
    modules: Iterable[Sequence[Any]], how: dict[str, Any]
) -> list[tuple[object, object, dict[str, Any]]]:
    """Targets, weights and options as users give them for several modules.

    Raises:
        ConfigError: Something else than those, or options that do not exist; lists all of them.
    """
    if not isinstance(modules, abc.Iterable) or isinstance(modules, str | abc.Mapping):
        raise ConfigError(f"A {type(modules).__name__} is no list of modules.", hint=_ON_JOBS)
    jobs: list[tuple[object, object, dict[str, Any]]] = []
    problems: list[Problem] = []
    for number, job in enumerate(modules, 1):
        wrong = list(_wrong_with(job, how))
        problems += [replace(problem, subject=f"module {number}") for problem in wrong]
        if not wrong:
            own = job[2] if len(job) == _WITH_OPTIONS else {}
            jobs.append((job[0], job[1], {**how, **own}))
    if problems:
        message = "These modules cannot be refitted together."
        raise ConfigError(message, problems=problems, hint=_ON_JOBS)
    return jobs


def _wrong_with(job: Any, how: dict[str, Any]) -> Iterator[Problem]:
    if not isinstance(job, tuple | list) or len(job) not in {2, 3}:
        yield Problem("", "no pair", repr(job)[:80], "(module, weights, options)")
        return
    own = job[2] if len(job) == _WITH_OPTIONS else {}
    if not isinstance(own, abc.Mapping):
        yield Problem("", "no options", repr(own)[:80], "a dict of arguments of refit")
        return
    names = ", ".join(sorted(_OPTIONS))
    for name in {**how, **own}:
        if name not in _OPTIONS:
            yield Problem("", "no such option", str(name), names)


class RefitTask:
    """One refit of one module.

    Attributes:
        compiled: The module.
    """

    def __init__(self, host: Host, config: Config, compiled: CompiledModule, wish: RefitRequest) -> None:
        """Prepare one; nothing is touched yet."""
        self._host, self._config, self._wish = host, config, wish
        self.compiled, self._module = compiled, compiled.opened
        self._clock = StageClock(host, "refit")
        self._delta: Delta | None = None
        self._overridden: frozenset[str] = frozenset()

    def prepare(self) -> Prepared:
        """Do all that can be done before anything is staged.

        Raises:
            RefitError: Refused or failed; nothing has changed.
        """
        before, wish = self.compiled.version, self._wish
        self._found = Findings(self.compiled.backend, before, wish.partial, wish.delta, self._clock)
        with self._clock.stage("load"):
            source = for_one_refit(self._host, wish.weights, self._config, rollback=wish.rollback)
            plan = self._bound_plan()
            self._found.left_out = differing(plan, source, self._config.rules.wrappers)
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
            judge = self._judge(plan, source, mapping)
        return Prepared(
            found=self._found,
            plan=plan,
            judge=judge,
            whole=lambda: self._whole(source, mapping),
            held=self._held,
            read=lambda: require_unchanged(source, reread=self._config.reread),
            partial=wish.partial,
            rollback=wish.rollback,
            finite=self._config.check_finite,
        )

    def _bound_plan(self) -> RefitPlan:
        plan = self._wish.plan if self._wish.plan is not None else self.compiled.plan
        if plan is None:
            raise PlanMismatchError(
                "The module has no plan, so nobody knows which weight goes into which slot.",
                hint="Make one from the program that was compiled: "
                "plan = refitkit.plan(program, target=compiled).",
            )
        if not isinstance(plan, RefitPlan):
            raise ConfigError(
                f"plan= is a {type(plan).__name__}.",
                hint="Pass what refitkit.plan gives, or refitkit.RefitPlan.load(path).",
            )
        require_needs(self._host, self._config, plan)
        plan.check_engines(self.compiled.backend, self.compiled.slots)
        return plan

    def _transformed(self, plan: RefitPlan, source: WeightSource) -> WeightSource:
        """The weights as the program reads them."""
        partial = self._wish.partial
        made = transformed(self._host, self._config, plan, source, partial=partial)
        if isinstance(made, Transformed):
            self._found.transforms = made.rows
        return made

    def _compared(self, plan: RefitPlan, source: WeightSource) -> Delta:
        held = self.compiled.held
        unreadable = raised_as(SourceError, f"{source.description} cannot be compared")
        with self._clock.stage("compare"), unreadable:
            return Delta(plan, self._module, source, held.live, held.version)

    def _map(
        self, plan: Plan, source: WeightSource, unchanged: frozenset[tuple[str, str]]
    ) -> SlotMapping:
        return map_slots(
            self._host,
            plan,
            self._module,
            source,
            self.compiled.program,
            self._config,
            unchanged=unchanged,
        )

    def _check(self, plan: RefitPlan, source: WeightSource, mapping: SlotMapping) -> None:
        partial, overwrite = self._wish.partial, not self._wish.rollback
        check_weights(
            self._host,
            plan,
            self._module,
            source,
            partial=partial,
            config=self._config,
            unchanged=self._delta.same if self._delta else frozenset(),
            deferred=judged_where_staged(mapping.values, self._module, overwrite=overwrite),
        )
        check_abilities(self._module, partial=partial, overwrite=overwrite, config=self._config)
        with raised_as(SourceError, f"{source.description} cannot be read"):
            if partial:
                mapping.keep_pinned()
                before = self.compiled.held.overridden
                require_reached(mapping, source, before)
                self._overridden = left(before, plan, source)
            else:
                require_all(mapping, source)
                self._overridden = overrides(plan, source)
            mapping.require_complete(source.names() if partial else None)
        if self._wish.reset_state:
            mapping.reset_state()

    def _judge(
        self, plan: RefitPlan, source: WeightSource, mapping: SlotMapping
    ) -> Callable[[OpenedModule], VerificationResult] | None:
        wish = self._wish
        inputs = verify.as_inputs(wish.inputs)
        verify.require_used(wish.reference, inputs, wish.verify)
        self._found.unused = verify.why_unused(inputs, wish.verify, self._module)
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
            program=self.compiled.program,
            tolerances=verify.tolerances_for(self._config, self._module),
            tools=tools_for(self._host, self._config, "refit", "verify"),
        )
        return verify.prepared(verifier, request)

    def _whole(self, source: WeightSource, mapping: SlotMapping) -> SlotMapping:
        """Values of unchanged slots, too."""
        if not mapping.unchanged:
            return mapping
        whole = self._map(mapping.plan, source, frozenset())
        if self._wish.partial:
            whole.keep_pinned()
        if self._wish.reset_state:
            whole.reset_state()
        whole.values.update(mapping.values)
        return whole

    def _held(self, mapping: SlotMapping) -> WeightState:
        """What the module will hold once these values are live."""
        version, live = self._found.before + 1, None
        if self._delta is not None:
            live = self._delta.after(mapping.values, version)
        return WeightState(version=version, live=live, overridden=self._overridden)
