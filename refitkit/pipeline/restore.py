"""Restoring earlier weights: a refit whose values are kept copies, or come from a file.

``history.py`` says which weights are held; this task turns them into the values of a refit.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from refitkit.errors import (
    ConfigError,
    EngineError,
    NotRefittableError,
    PlanMismatchError,
    Problem,
    raised_as,
)
from refitkit.pipeline.checks import check_abilities
from refitkit.pipeline.history import RestorePoint, WeightState, as_problems, live_values
from refitkit.pipeline.mapping import SlotMapping
from refitkit.pipeline.module import CompiledModule
from refitkit.pipeline.refit import refit_task
from refitkit.pipeline.report import ReportDraft
from refitkit.pipeline.targets import open_target
from refitkit.pipeline.transaction import Prepared
from refitkit.pipeline.verify import VerifyOptions, verification
from refitkit.protocols import SlotValue
from refitkit.recipe import RefitPlan, TensorMap

if TYPE_CHECKING:
    import torch

    from refitkit.model import Slot
    from refitkit.pipeline.context import Context
    from refitkit.pipeline.history import LoadOrigin
    from refitkit.pipeline.refit import Task
    from refitkit.pipeline.verify import Judge
    from refitkit.protocols import OpenedModule

KEPT = "kept"
"""The strategy that reports name for kept values."""

_ON_VERSIONS = (
    "Pass modules that refitkit.compile or refitkit.load gave, and versions of their weights as "
    "compiled.kept lists them. Version 0 are the first weights."
)


@dataclass(frozen=True, kw_only=True)
class RestoreRequest(VerifyOptions):
    """A user's request to restore weights; see ``Pipeline.restore`` for the meanings."""

    version: int


def as_versions(modules: object) -> list[tuple[CompiledModule, int]]:
    """Modules and versions of their weights.

    Raises:
        ConfigError: The argument has anything else; lists all of it.
    """
    if not isinstance(modules, abc.Iterable) or isinstance(modules, str):
        raise ConfigError(f"modules is a {type(modules).__name__}, not a list.", hint=_ON_VERSIONS)
    versions: list[tuple[CompiledModule, int]] = []
    problems: list[Problem] = []
    for number, one in enumerate(modules, 1):
        match one:
            case (CompiledModule() as compiled, int() as version) if not isinstance(version, bool):
                versions.append((compiled, version))
            case _:
                wanted = "(compiled module, version)"
                problems.append(Problem(f"module {number}", "not a pair", repr(one)[:80], wanted))
    if problems:
        message = "These versions cannot be restored."
        raise ConfigError(message, problems=problems, hint=_ON_VERSIONS)
    return versions


def restore_task(
    context: Context,
    compiled: CompiledModule,
    request: RestoreRequest,
    *,
    delta: bool | None = None,
) -> Task:
    """A task that restores earlier weights of a module.

    If the first weights are wanted and ``compiled.base`` names them, that is an ordinary refit.

    Args:
        context: Plugins and settings.
        compiled: The module.
        request: The user's request.
        delta: Whether that refit writes only what changed; None: the settings decide.
    """
    if request.version != 0 or compiled.base is None:
        return RestoreTask(context, compiled, request)
    options = {
        "inputs": request.inputs,
        "reference": request.reference,
        "verify": request.verify,
        "delta": delta,
    }
    return refit_task(context, compiled, compiled.base, options)


class RestoreTask:
    """One module on its way to weights that it held before.

    Attributes:
        compiled: The module.
    """

    def __init__(self, context: Context, compiled: CompiledModule, request: RestoreRequest) -> None:
        """Touch nothing yet."""
        self._context, self._request = context, request
        self.compiled, self._module = compiled, compiled.opened
        self._second: OpenedModule | None = None

    def prepare(self) -> Prepared:
        """Find the earlier weights, and do all that can be done before anything is staged.

        Raises:
            NotRefittableError: The weights are not held any more.
            RefitError: The verifier cannot check these weights.
        """
        state, clock = self.compiled.state, self._context.clock("restore", self.compiled.name)
        draft = ReportDraft(backend=self.compiled.backend, before=state.version, clock=clock)
        with clock.stage("load"):
            point = self._restore_point(state)
            draft.source = f"version {self._request.version}: {point.state.source}"
            # the slots were written by the newest refit's plan, which ``plan=`` may have given
            plan = state.history.plan or self.compiled.plan
            if plan is None:
                raise PlanMismatchError("The module has no plan, and was never refitted.")
        with clock.stage("map"):
            mapping = self._mapping(plan, point)
            draft.mapping = mapping
        with clock.stage("check"):
            config = self._context.config
            check_abilities(self._module, partial=False, overwrite=False, config=config)
        with clock.stage("prepare"):
            judge = self._judge(plan, mapping, draft.source, point)
        return Prepared(
            draft=draft,
            plan=plan,
            judge=judge,
            all_values=lambda: mapping,
            state_after=lambda _: _state_at(point, draft.version),
        )

    def _restore_point(self, state: WeightState) -> RestorePoint:
        version = self._request.version
        # nothing to write, but still a refit with a verification and a version of its own
        if version == state.version:
            return RestorePoint({}, state)
        point = state.history.restore_point(version, state.version, self._module)
        if point is None and version == 0 and self.compiled.origin is not None:
            try:
                return self._from_file(self.compiled.origin, state)
            except NotRefittableError as exc:
                exc.problems = (*as_problems(self.compiled.kept), *exc.problems)
                raise
        if point is None:
            raise state.history.not_restorable(version, self.compiled.kept)
        return point

    def _from_file(self, origin: LoadOrigin, state: WeightState) -> RestorePoint:
        """The first values of all slots that were written, read from a second module."""
        origin.require_unchanged()  # before code in it runs, and after: opening takes a while
        second = open_target(self._context, origin.path, during="restore")
        with raised_as(
            EngineError, "An engine failed to report the values that it was loaded with"
        ):
            # all other slots of the module still hold their first values
            found = live_values(second, state.history.written)
        origin.require_unchanged()
        values = {key: value for key, value in found.items() if value is not None}
        if len(values) < len(found):
            mute = dict.fromkeys(name for name, slot in found if found[name, slot] is None)
            raise NotRefittableError(
                "Some engines cannot report the values that they were loaded with.",
                problems=[Problem(name, "no readback") for name in mute],
                hint="compiled.base names weights that restore() reads instead.",
            )
        self._second = second  # the values are aliases of its memory
        return RestorePoint(values, state.history.first)

    def _mapping(self, plan: RefitPlan, point: RestorePoint) -> SlotMapping:
        """Values of the slots that changed since; the others of their engines are unchanged."""
        engines = self._module.engines
        # engines without a restored slot are not staged
        touched = {name for name, _ in point.values}
        return SlotMapping(
            plan,
            values={
                (name, slot): _slot_value(engines[name].slots[slot], kept)
                for (name, slot), kept in point.values.items()
            },
            unchanged=frozenset(
                (name, slot)
                for name, engine in engines.items()
                for slot in engine.slots
                # if nothing is restored, the report lists all slots as unchanged
                if (name, slot) not in point.values and (name in touched or not point.values)
            ),
        )

    def _judge(
        self, plan: RefitPlan, mapping: SlotMapping, source: str, point: RestorePoint
    ) -> Judge | None:
        request = self._request
        # without a reference, the program would be needed, and kept values cannot be bound to it
        if request.inputs is not None and request.verify == "outputs" and request.reference is None:
            raise ConfigError(
                "The verifier 'outputs' has nothing to compare with: kept values belong to slots, "
                "and the program cannot be bound to those.",
                hint="Pass reference=, a callable or the outputs from then, or leave verify out.",
            )
        return verification(
            self._context,
            self.compiled,
            request,
            verb="restore",
            plan=plan,
            # kept values belong to slots, so there are no weights with names
            source=TensorMap({}, source),
            values=lambda: {
                key: _copied(value) if key in point.aliases else value
                for key, value in mapping.values.items()
            },
            outputs_by_default=request.reference is not None,
        )


def _slot_value(slot: Slot, kept: torch.Tensor) -> SlotValue:
    # an engine that knows no shape takes flat values
    shaped = kept if slot.shape is None else kept.reshape(slot.shape)
    return SlotValue(slot=slot, strategy=KEPT, sources=(), load=lambda: shaped, identity=True)


def _copied(value: SlotValue) -> SlotValue:
    """A copy for the verifier: by then the engine's own memory is overwritten or tested."""
    copy = value.load().detach().to("cpu", copy=True)
    return value._replace(load=lambda: copy)


def _state_at(point: RestorePoint, version: int) -> WeightState:
    """The state of then, under a new version."""
    live = None if point.state.live is None else replace(point.state.live, version=version)
    then = point.state
    return WeightState(version=version, label=then.label, live=live, overridden=then.overridden)
