"""One refit from the user's request to the verdict, of one module or of several.

``run`` takes tasks, one for each module, through one transaction. A ``RefitTask`` does everything
that can be done before anything is staged: load, compare, map, check and prepare. The other kind of
task is in ``restore.py``. The rest is in ``transaction.py``.
"""

from __future__ import annotations

from collections import abc
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from refitkit.errors import (
    ConfigError,
    PlanMismatchError,
    Problem,
    RefitError,
    SourceError,
    VerificationError,
    raised_as,
)
from refitkit.pipeline.checks import check_abilities, check_weights, judging_engines
from refitkit.pipeline.delta import Delta
from refitkit.pipeline.gate import in_lock_order, inside_all
from refitkit.pipeline.history import WeightState
from refitkit.pipeline.mapping import (
    find_left_out,
    map_slots,
    overridden_by,
    require_all_slots,
    require_partial_slots,
    still_overridden,
)
from refitkit.pipeline.module import alone
from refitkit.pipeline.needs import is_built_in, require_needs
from refitkit.pipeline.repeats import LastMapping
from refitkit.pipeline.report import ReportDraft
from refitkit.pipeline.targets import for_one_refit, require_unchanged
from refitkit.pipeline.transaction import ModuleTransaction, Prepared, Transaction
from refitkit.pipeline.transform import Transformed, transformed
from refitkit.pipeline.verify import VerifyOptions, verification, why_unused
from refitkit.processes import quick_turns
from refitkit.recipe import RefitPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from refitkit.model import SlotKey
    from refitkit.pipeline.context import Context
    from refitkit.pipeline.mapping import SlotMapping
    from refitkit.pipeline.module import CompiledModule
    from refitkit.pipeline.verify import Judge
    from refitkit.protocols import Plan, WeightSource

T = TypeVar("T")

_WITH_OPTIONS = 3
_LOADS = "refitkit_load_weights"
_ON_JOBS = 'Pass [(module, weights), ...], or (module, weights, {"inputs": (x,)}) for some of them.'


# -- running tasks ------------------------------------------------------------------------------


class Task(Protocol):
    """New weights for one module."""

    @property
    def compiled(self) -> CompiledModule:
        """The module."""

    def prepare(self) -> Prepared:
        """Do all that can be done before anything is staged, and change nothing."""


def run(context: Context, tasks: Sequence[Task]) -> list[ReportDraft]:
    """Carry out all tasks in one transaction.

    Returns:
        The facts for the report of each task, in their order.

    Raises:
        ConfigError: Two tasks are for one module.
        RefitError: Refused or failed, with the problems of all tasks. Unless it is a
            ``ModuleLostError``, all modules answer as before.
    """
    # before the gates: a gate that one thread enters twice would report a refit inside a refit
    _require_distinct(tasks)
    # one lock order everywhere, so two refits of the same modules never wait for one another
    gates = in_lock_order(task.compiled.gate for task in tasks)
    others = alone(task.compiled for task in tasks)
    with quick_turns():
        return inside_all([*(gate.refit for gate in gates), *others], lambda: _run(context, tasks))


def _run(context: Context, tasks: Sequence[Task]) -> list[ReportDraft]:
    names = [_name(number, task) for number, task in enumerate(tasks)]
    prepared = each(names, [task.prepare for task in tasks])
    modules = [
        ModuleTransaction(context, task.compiled, one, name if len(tasks) > 1 else "")
        for task, one, name in zip(tasks, prepared, names, strict=True)
    ]
    try:
        each(names, [module.stage for module in modules])
        each(names, [module.verify_staged for module in modules])
        Transaction(modules).run()
    finally:
        # after a failure or an interrupt no staged memory stays; after a commit none is left
        for module in modules:
            module.discard()
    return [module.draft for module in modules]


def _name(number: int, task: Task) -> str:
    return f"module {number + 1} ({task.compiled.backend})"


def _require_distinct(tasks: Sequence[Task]) -> None:
    first: dict[int, int] = {}
    twice = [
        Problem(_name(number, task), "the same module", hint=f"it is module {seen + 1}, too")
        for number, task in enumerate(tasks)
        if (seen := first.setdefault(_identity(task.compiled), number)) != number
    ]
    if twice:
        hint = "Give each module once, with all its weights."
        raise ConfigError("A module can be refitted once at a time.", problems=twice, hint=hint)


def _identity(compiled: CompiledModule) -> int:
    """Equal for handles of one module: a handle, and the handle that it was loaded from."""
    if compiled.shared is not None:
        return compiled.shared.key
    return id(compiled if compiled.target is None else compiled.target)


def each(names: Sequence[str], actions: Sequence[Callable[[], T]]) -> list[T]:
    """The results of all actions.

    Args:
        names: Names of the modules in errors, if there are several.
        actions: One action for each module.

    Raises:
        RefitError: Some actions were refused: one error with all problems, which names the modules.
    """
    done: list[T] = []
    refused: list[tuple[str, RefitError]] = []
    for name, action in zip(names, actions, strict=True):
        try:
            done.append(action())
        except RefitError as exc:
            if len(names) == 1:
                raise
            refused.append((name, exc))
    if refused:
        raise _as_one(refused, len(names)) from refused[0][1]
    return done


def _as_one(refused: Sequence[tuple[str, RefitError]], of: int) -> RefitError:
    """One error for several; of their type if they share it, and with the report of the first."""
    errors = [error for _, error in refused]
    kinds = {type(error) for error in errors}
    # callers catch errors by type, so a type that all of them share is kept
    kind = kinds.pop() if len(kinds) == 1 else RefitError
    problems = [
        replace(problem, subject=f"{name}: {problem.subject}")
        for name, error in refused
        # an error without problems must still show up in the list
        for problem in error.problems or [Problem(type(error).__name__, "refused", error.message)]
    ]
    reasons = " ".join(f"{name[0].upper()}{name[1:]}: {error.message}" for name, error in refused)
    hints = dict.fromkeys(error.hint for error in errors if error.hint)
    one = kind(
        f"{len(refused)} of {of} modules cannot be refitted, and none was. {reasons}",
        problems=problems,
        hint=" ".join(hints),
    )
    if isinstance(one, VerificationError) and isinstance(errors[0], VerificationError):
        one.report = errors[0].report
    return one


def get_ready(context: Context) -> None:
    """Have plugins import what they give to each refit; see ``Pipeline.get_ready``."""
    host, config = context.host, context.config
    questions: list[Callable[[], object]] = [
        lambda: host.offers("refitkit_mapping_strategies"),
        lambda: host.named("refitkit_verifiers"),
        lambda: list(host.named_items("refitkit_weight_transforms", config=config)),
    ]
    for info in host.plugins():
        # others may refuse weights without entries
        if _LOADS in info.hooks and is_built_in(host, info.name):
            given = {"source": {}, "config": config, "open_weights": None}
            questions.append(partial(host.call_one, info.name, _LOADS, **given))
    for question in questions:
        with suppress(RefitError):
            question()


# -- requests of users ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RefitRequest(VerifyOptions):
    """A user's request for one refit; see :func:`refitkit.refit` for the meanings."""

    weights: object
    label: str = ""
    plan: RefitPlan | None = None
    partial: bool = False
    delta: bool = False
    rollback: bool = True
    reset_state: bool = False
    donate: bool = False


_OPTIONS = frozenset(field.name for field in fields(RefitRequest)) - {"weights", "label"}


def refit_task(
    context: Context, compiled: CompiledModule, weights: object, options: abc.Mapping[str, Any]
) -> RefitTask:
    """A task that gives a module new weights.

    Args:
        context: Plugins and settings.
        compiled: The module.
        weights: The weights, as the user gave them.
        options: Arguments of ``Pipeline.refit``. The settings decide about those that are None.
    """
    config = context.config
    # None means that the argument was not given, and would override the settings
    chosen = {name: value for name, value in options.items() if value is not None}
    defaults = {"delta": config.delta, "rollback": config.rollback}
    return RefitTask(context, compiled, RefitRequest(weights=weights, **{**defaults, **chosen}))


def refit_tasks(
    context: Context,
    modules: Iterable[Sequence[Any]],
    options: dict[str, Any],
    load: Callable[[object], CompiledModule],
) -> list[RefitTask]:
    """Tasks that give several modules new weights; see ``Pipeline.refit_all``.

    Args:
        context: Plugins and settings.
        modules: Targets, weights and, for some, options.
        options: Options for all.
        load: Gives the handle of a target.

    Raises:
        ConfigError: The arguments are unusable; lists all that is wrong.
        RefitError: Targets cannot be opened; with the problems of all of them.
    """
    jobs = _as_jobs(modules, options)
    opened = _opened([target for target, _, _ in jobs], load)
    return [
        refit_task(context, compiled, weights, own)
        for compiled, (_, weights, own) in zip(opened, jobs, strict=True)
    ]


def _as_jobs(
    modules: Iterable[Sequence[Any]], options: dict[str, Any]
) -> list[tuple[object, object, dict[str, Any]]]:
    """Targets, weights and options."""
    if not isinstance(modules, abc.Iterable) or isinstance(modules, str | abc.Mapping):
        raise ConfigError(f"modules is a {type(modules).__name__}, not a list.", hint=_ON_JOBS)
    jobs: list[tuple[object, object, dict[str, Any]]] = []
    problems: list[Problem] = []
    for number, job in enumerate(modules, 1):
        wrong = list(_wrong_with(job, options))
        problems += [replace(problem, subject=f"module {number}") for problem in wrong]
        if not wrong:
            own = job[2] if len(job) == _WITH_OPTIONS else {}
            jobs.append((job[0], job[1], {**options, **own}))
    if problems:
        message = "These modules cannot be refitted together."
        raise ConfigError(message, problems=problems, hint=_ON_JOBS)
    return jobs


def _wrong_with(job: Any, options: dict[str, Any]) -> Iterator[Problem]:
    if not isinstance(job, tuple | list) or len(job) not in {2, 3}:
        yield Problem("", "not a pair", repr(job)[:80], "(module, weights, options)")
        return
    own = job[2] if len(job) == _WITH_OPTIONS else {}
    if not isinstance(own, abc.Mapping):
        yield Problem("", "options", repr(own)[:80], "a dict of arguments of refit")
        return
    names = ", ".join(sorted(_OPTIONS))
    for name in {**options, **own}:
        if name not in _OPTIONS:
            yield Problem("", "no such option", str(name), names)


def _opened(
    targets: Sequence[object], load: Callable[[object], CompiledModule]
) -> list[CompiledModule]:
    """Handles of targets. An object that is given twice has one handle, and is refused later."""
    handles: dict[int, CompiledModule] = {}

    def open_once(target: object) -> CompiledModule:
        if isinstance(target, str | Path):  # each path is opened anew
            return load(target)
        # the caller's list keeps all targets alive, so no two of them have the same id
        if id(target) not in handles:
            handles[id(target)] = load(target)
        return handles[id(target)]

    names = [f"module {number}" for number in range(1, len(targets) + 1)]
    return each(names, [partial(open_once, target) for target in targets])


# -- one refit, before anything is staged ---------------------------------------------------------


class RefitTask:
    """One refit of one module.

    Attributes:
        compiled: The module.
    """

    def __init__(self, context: Context, compiled: CompiledModule, request: RefitRequest) -> None:
        """Touch nothing yet."""
        self._context, self._request = context, request
        self.compiled, self._module = compiled, compiled.opened
        self._delta: Delta | None = None
        self._last: LastMapping | None = None
        self._overridden: frozenset[str] = frozenset()

    def prepare(self) -> Prepared:
        """Load, compare, map, check and prepare, and change nothing.

        Raises:
            RefitError: Refused or failed.
        """
        request, clock = self._request, self._context.clock("refit", self.compiled.name)
        self._draft = draft = ReportDraft(
            backend=self.compiled.backend,
            before=self.compiled.version,
            clock=clock,
            partial=request.partial,
            delta=request.delta,
        )
        with clock.stage("load"):
            source = self._open()
            plan = self._bound_plan()
            # asked of the given source: a transformed one does not list the entries it leaves out
            draft.left_out = find_left_out(plan, source, self._context.config.rules.wrappers)
            # transforms make an entry when it is read, not now
            source = transformed(self._context, plan, source, self._module, partial=request.partial)
            if isinstance(source, Transformed):
                draft.transforms = source.rows
            draft.source = source.description
            self._source = source
            last = self._last_mapping(plan, source)
        if request.delta:
            with clock.stage("compare"):
                self._delta = self._compare(plan, source)
        with clock.stage("map"):
            mapping = self._map(plan, source) if last is None else last.mapping
            draft.mapping = mapping
        with clock.stage("check"):
            self._check(plan, source, mapping, is_known=last is not None)
            if last is not None and not last.source.still_gives(source):
                # a check or another thread has replaced entries meanwhile
                last = self._last = None
                draft.mapping = mapping = self._map(plan, source)
                self._check(plan, source, mapping, is_known=False)
        if last is None and self._repeatable:
            self._last = LastMapping.of(self._context, plan, source, mapping)
        # a verifier that cannot verify this refit refuses here, before anything is staged
        with clock.stage("prepare"):
            judge = self._judge(plan, source, mapping)
        return Prepared(
            draft=draft,
            plan=plan,
            judge=judge,
            # a function, because it maps all slots again, and few refits need that
            all_values=lambda: self._with_unchanged(source, mapping),
            state_after=self._state_after,
            require_read=lambda: require_unchanged(source, reread=self._context.config.reread),
            partial=request.partial,
            rollback=request.rollback,
            check_finite=self._context.config.check_finite,
            name_weights=lambda: self._check_weights(plan, source, deferred=frozenset()),
            done=self._keep_mapping,
        )

    def _open(self) -> WeightSource:
        """The weights as the user gave them."""
        one = self._request
        return for_one_refit(self._context, one.weights, rollback=one.rollback, donate=one.donate)

    @property
    def _repeatable(self) -> bool:
        """Whether the request is of the usual kind: other weights for all slots."""
        one = self._request
        return not (one.partial or one.delta or one.reset_state)

    def _last_mapping(self, plan: RefitPlan, source: WeightSource) -> LastMapping | None:
        """The mapping of the last refit, if it serves this one.

        The module has none meanwhile, so that it keeps no tensor alive if this refit is refused.
        """
        last, self.compiled.last_mapping = self.compiled.last_mapping, None
        if last is None or not self._repeatable or not last.serves(self._context, plan, source):
            return None
        self._last = last
        return last

    def _keep_mapping(self) -> None:
        """Keep the mapping for the next refit, and none of its tensors."""
        if self._last is not None:
            self._last.end()
            # an engine may have been interrupted while it noted how it copies these values
            if self._draft.summary is not None:
                self.compiled.last_mapping = self._last

    def _bound_plan(self) -> RefitPlan:
        """The plan, checked against the plugins and the module's slots."""
        plan = self._request.plan if self._request.plan is not None else self.compiled.plan
        if plan is None:
            raise PlanMismatchError(
                "The module has no plan, so the weight of each slot is unknown.",
                hint="Make a plan from the program that was compiled: "
                "plan = refitkit.plan(program, target=compiled).",
            )
        if not isinstance(plan, RefitPlan):
            raise ConfigError(
                f"plan= must be a RefitPlan, and is a {type(plan).__name__}.",
                hint="Pass the result of refitkit.plan, or refitkit.RefitPlan.load(path).",
            )
        require_needs(self._context, plan)
        plan.check_engines(self.compiled.backend, self.compiled.slots)
        return plan

    def _compare(self, plan: RefitPlan, source: WeightSource) -> Delta:
        state = self.compiled.state
        with raised_as(SourceError, f"{source.description} cannot be compared"):
            return Delta(plan, self._module, source, state.live, state.version)

    def _map(self, plan: Plan, source: WeightSource, *, whole: bool = False) -> SlotMapping:
        program = self.compiled.program
        delta = None if whole else self._delta
        unchanged: frozenset[SlotKey] = delta.unchanged if delta else frozenset()
        return map_slots(self._context, plan, self._module, source, program, unchanged=unchanged)

    def _check(
        self, plan: RefitPlan, source: WeightSource, mapping: SlotMapping, *, is_known: bool
    ) -> None:
        """Check weights and mapping. A mapping that is known has passed its checks before."""
        partial, overwrite = self._request.partial, not self._request.rollback
        self._check_weights(plan, source, self._deferred(mapping), same_headers=is_known)
        config = self._context.config
        check_abilities(self._module, partial=partial, overwrite=overwrite, config=config)
        if is_known:
            return
        with raised_as(SourceError, f"{source.description} cannot be read"):
            # the live value may come from an earlier refit; the plan's value must not replace it
            if partial:
                mapping.drop_plan_values()
                before = self.compiled.state.overridden
                require_partial_slots(mapping, source, before)
                self._overridden = still_overridden(before, plan, source)
            else:
                require_all_slots(mapping, source)
                self._overridden = overridden_by(plan, source)
            mapping.require_complete(source.names() if partial else None)
        if self._request.reset_state:
            mapping.reset_state()
        if self._delta is not None:
            with raised_as(SourceError, f"{source.description} cannot be compared"):
                mapping.settle(self._delta.settled(mapping.values.values()))

    @property
    def _for_checks(self) -> Context:
        """The context that checks of plugins get."""
        return self._context

    def _deferred(self, mapping: SlotMapping) -> frozenset[str]:
        """Names of the entries that are checked for finiteness where they are staged."""
        overwrite = not self._request.rollback
        return mapping.entries_of(judging_engines(self._module, overwrite=overwrite))

    def _check_weights(
        self,
        plan: RefitPlan,
        source: WeightSource,
        deferred: frozenset[str],
        *,
        same_headers: bool = False,
    ) -> None:
        check_weights(
            self._for_checks,
            plan,
            self._module,
            source,
            partial=self._request.partial,
            unchanged=self._delta.same if self._delta else frozenset(),
            deferred=deferred,
            same_headers=same_headers,
        )

    def _judge(self, plan: RefitPlan, source: WeightSource, mapping: SlotMapping) -> Judge | None:
        self._draft.unused = why_unused(self._request, self._module)
        return verification(
            self._context,
            self.compiled,
            self._request,
            verb="refit",
            plan=plan,
            source=source,
            values=lambda: self._with_unchanged(source, mapping).values,
        )

    def _with_unchanged(self, source: WeightSource, mapping: SlotMapping) -> SlotMapping:
        """The mapping, with values of the unchanged slots too."""
        if not mapping.unchanged:
            return mapping
        whole = self._map(mapping.plan, source, whole=True)
        if self._request.partial:
            whole.drop_plan_values()
        if self._request.reset_state:
            whole.reset_state()
        whole.values.update(mapping.values)
        return whole

    def _state_after(self, mapping: SlotMapping) -> WeightState:
        """The module's state, but for its history, once these values are live."""
        live = None
        if self._delta is not None:
            # known by digest from now on, so the next delta can skip the slots that did not change
            live = self._delta.after(mapping.values, self._draft.version)
        return WeightState(
            version=self._draft.version,
            label=self._request.label,
            live=live,
            overridden=self._overridden,
        )
