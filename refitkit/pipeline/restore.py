"""Going back to earlier weights: a refit whose values are those that were kept."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from refitkit.errors import (
    ConfigError,
    EngineError,
    NotRefittableError,
    PlanMismatchError,
    Problem,
    raised_as,
)
from refitkit.pipeline import verify
from refitkit.pipeline.check import check_abilities
from refitkit.pipeline.clock import StageClock
from refitkit.pipeline.compiled import CompiledModule
from refitkit.pipeline.held import WeightState
from refitkit.pipeline.history import FIRST, RestorePoint, as_problems
from refitkit.pipeline.keeping import present
from refitkit.pipeline.load import open_target
from refitkit.pipeline.mapping import SlotMapping
from refitkit.pipeline.report import Findings
from refitkit.pipeline.tools import tools_for
from refitkit.pipeline.writing import Prepared
from refitkit.protocols import SlotValue, VerifyRequest
from refitkit.recipe import RefitPlan, TensorMap

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.model import Slot, SlotKey, VerificationResult
    from refitkit.pipeline.origin import LoadOrigin
    from refitkit.protocols import OpenedModule

_ON_WAYS = (
    "Pass modules that refitkit.compile or refitkit.load gave, and numbers of their weights as "
    "compiled.kept lists them: 0 are the first."
)

KEPT = "kept"
"""What reports give as the strategy of values that were kept."""


@dataclass(frozen=True)
class RestoreRequest:
    """What a user asks for; see ``Pipeline.restore``."""

    version: int
    inputs: Any = None
    reference: Any = None
    verify: str | None = None


def as_ways(back: object) -> list[tuple[CompiledModule, int]]:
    """Modules and numbers of their weights as users give them.

    Raises:
        ConfigError: Something else than those; lists all of it.
    """
    if not isinstance(back, abc.Iterable) or isinstance(back, str):
        raise ConfigError(f"A {type(back).__name__} is no list of modules.", hint=_ON_WAYS)
    ways: list[tuple[CompiledModule, int]] = []
    problems: list[Problem] = []
    for number, way in enumerate(back, 1):
        match way:
            case (CompiledModule() as compiled, int() as version) if not isinstance(version, bool):
                ways.append((compiled, version))
            case _:
                wanted = "a compiled module and a whole number"
                problems.append(Problem(f"module {number}", "no version", repr(way)[:80], wanted))
    if problems:
        message = "Nobody can go back to what this names."
        raise ConfigError(message, problems=problems, hint=_ON_WAYS)
    return ways


class RestoreTask:
    """One module on its way back to weights that it held before.

    Attributes:
        compiled: The module.
    """

    def __init__(self, host: Host, config: Config, compiled: CompiledModule, wish: RestoreRequest) -> None:
        """Nothing is looked at yet."""
        self._host, self._config, self._wish = host, config, wish
        self.compiled, self._module = compiled, compiled.opened
        self._clock = StageClock(host, "restore")
        self._second: OpenedModule | None = None

    def prepare(self) -> Prepared:
        """Find the way back, and do all that can be done before anything is staged.

        Raises:
            NotRefittableError: The weights are not held any more.
            RefitError: The verifier cannot judge this.
        """
        held = self.compiled.held
        found = Findings(self.compiled.backend, held.version, False, False, self._clock)  # noqa: FBT003
        with self._clock.stage("load"):
            way = self._way(held)
            found.source = f"version {self._wish.version}: {way.source}"
            plan = held.history.plan or self.compiled.plan
            if plan is None:
                raise PlanMismatchError("The module has no plan, and was never refitted.")
        with self._clock.stage("map"):
            mapping = self._mapping(plan, way)
            found.mapping = mapping
        with self._clock.stage("check"):
            check_abilities(self._module, partial=False, overwrite=False, config=self._config)
        with self._clock.stage("prepare"):
            judge = self._judge(plan, mapping, found.source, way.lent)
        return Prepared(
            found=found,
            plan=plan,
            judge=judge,
            whole=lambda: mapping,
            held=lambda _: _held(way, held.version + 1),
        )

    def _way(self, held: WeightState) -> RestorePoint:
        version = self._wish.version
        if version == held.version:
            return RestorePoint({}, held.source, held.live, held.overridden)
        way = held.history.way_to(version, held.version, self._module)
        if way is None and version == 0 and self.compiled.origin is not None:
            try:
                return self._from(self.compiled.origin, held)
            except NotRefittableError as exc:
                exc.problems = (*as_problems(self.compiled.kept), *exc.problems)
                raise
        if way is None:
            raise held.history.no_way_to(version, self.compiled.kept)
        return way

    def _from(self, origin: LoadOrigin, held: WeightState) -> RestorePoint:
        """What slots held that were written since, read off a second module."""
        origin.require_unchanged()  # before code in it runs, and after: it takes a while
        tools = tools_for(self._host, self._config, "restore", "open")
        second = open_target(self._host, origin.path, self._config, tools)
        with raised_as(EngineError, "An engine failed to tell what it was loaded with"):
            found = present(second, held.history.written)
        origin.require_unchanged()
        values = {key: value for key, value in found.items() if value is not None}
        if len(values) < len(found):
            mute = dict.fromkeys(name for name, slot in found if found[name, slot] is None)
            raise NotRefittableError(
                "Some engines cannot tell what they were loaded with.",
                problems=[Problem(name, "no readback") for name in mute],
                hint="compiled.base names weights that restore() reads instead.",
            )
        self._second = second  # its memory is what the values are in
        return RestorePoint(values, FIRST, None, held.history.overridden)

    def _mapping(self, plan: RefitPlan, way: RestorePoint) -> SlotMapping:
        """Values of the slots that hold other ones now; the others of their engines are left."""
        engines = self._module.engines
        touched = {name for name, _ in way.values}
        return SlotMapping(
            plan,
            values={
                key: _value(engines[key[0]].slots[key[1]], kept) for key, kept in way.values.items()
            },
            unchanged=frozenset(
                (name, slot)
                for name, engine in engines.items()
                for slot in engine.slots
                if (name, slot) not in way.values and (name in touched or not way.values)
            ),
        )

    def _judge(
        self, plan: RefitPlan, mapping: SlotMapping, source: str, lent: frozenset[SlotKey]
    ) -> Callable[[OpenedModule], VerificationResult] | None:
        wish, module = self._wish, self._module
        inputs = verify.as_inputs(wish.inputs)
        verify.require_used(wish.reference, inputs, wish.verify)
        if inputs is not None and wish.verify == "outputs" and wish.reference is None:
            raise ConfigError(
                "The verifier 'outputs' has nothing to compare with: kept values are those of "
                "slots, which the program cannot be bound to.",
                hint="Pass reference=, a callable or the outputs from then, or leave verify out.",
            )
        with_inputs = inputs is not None and wish.reference is not None
        verifier = verify.choose(self._host, wish.verify, module, with_inputs=with_inputs)
        if verifier is None:
            return None
        request = VerifyRequest(
            plan=plan,
            module=module,
            source=TensorMap({}, source),
            values={
                key: _copied(value) if key in lent else value
                for key, value in mapping.values.items()
            },
            inputs=inputs,
            reference=wish.reference,
            program=self.compiled.program,
            tolerances=verify.tolerances_for(self._config, module),
            tools=tools_for(self._host, self._config, "restore", "verify"),
        )
        return verify.prepared(verifier, request)


def _value(slot: Slot, kept: torch.Tensor) -> SlotValue:
    shaped = kept if slot.shape is None else kept.reshape(slot.shape)
    return SlotValue(slot=slot, strategy=KEPT, sources=(), load=lambda: shaped, identity=True)


def _copied(value: SlotValue) -> SlotValue:
    """The value for the verdict: by then the engine's own is what is judged, or overwritten."""
    copy = value.load().detach().to("cpu", copy=True)
    return value._replace(load=lambda: copy)


def _held(way: RestorePoint, version: int) -> WeightState:
    live = None if way.live is None else replace(way.live, version=version)
    return WeightState(version=version, live=live, overridden=way.overridden)
