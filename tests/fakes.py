"""A backend in memory, and plugins, that fail when they are told to.

What writers of plugins need, too, is in ``refitkit.testing``; here are the rest, and engines that
keep what was staged.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

import refitkit
from refitkit.config import Config
from refitkit.model import (
    Aborted,
    CallRef,
    Event,
    Failed,
    Finished,
    Guard,
    LedgerRow,
    OpCall,
    PinnedRef,
    RefitReport,
    Slot,
    SlotState,
    SourceRef,
    StageFailed,
    StageFinished,
    StageStarted,
    Started,
    Tensor,
    TensorInfo,
    VerificationResult,
)
from refitkit.pipeline import CompiledModule, Pipeline
from refitkit.pipeline.targets import PLAN_MEMBER
from refitkit.program.facts import facts_of, tensors_of
from refitkit.protocols import (
    Mapped,
    MapRequest,
    OpenedModule,
    PlanDraft,
    PlanKey,
    SlotValue,
    Tools,
    VerifyRequest,
)
from refitkit.recipe import RefitPlan, TensorMap
from refitkit.testing import fakes
from refitkit.testing.fakes import BACKEND, FakeStaged, Tripwire, slot_for
from refitkit.testing.oracles import NewMemory, bits
from refitkit.testing.scenes import leaf_for, make_plan, make_slot, plan_for, recipe_row

if TYPE_CHECKING:
    from pathlib import Path

    from refitkit.errors import Problem

__all__ = [  # what is the kit's, and tests import from here
    "BACKEND",
    "FakeStaged",
    "Tripwire",
    "leaf_for",
    "make_plan",
    "make_slot",
    "plan_for",
    "recipe_row",
    "slot_for",
]


# -- engines and modules that keep what was staged --------------------------------------------


class _Recording:
    """Keeps everything that was ever staged, for tests to look at."""

    def __init__(
        self, name: str, values: Mapping[str, torch.Tensor], wire: Tripwire | None = None
    ) -> None:
        super().__init__(name, values, wire)  # type: ignore[call-arg]
        self.staged: list[FakeStaged] = []

    def _stage(self, values: Sequence[SlotValue]) -> FakeStaged:
        staged = super()._stage(values)  # type: ignore[misc]
        self.staged.append(staged)
        return staged


class FakeEngine(_Recording, fakes.FakeEngine):
    """The kit's, recording."""


class OpenEngine(_Recording, fakes.OpenEngine):
    """The kit's, recording."""


class GradualEngine(OpenEngine):
    """An open engine that stages values as they arrive."""

    def begin_staging(self, slots: Collection[str]) -> GradualFilling:
        self.wire(f"{self.name}.begin")
        assert set(slots) <= self.slots.keys()
        return GradualFilling(self, slots)


class GradualFilling:
    """What has arrived for a ``GradualEngine``."""

    def __init__(self, engine: GradualEngine, slots: Collection[str]) -> None:
        self.engine, self.slots = engine, set(slots)
        self.values: dict[str, SlotValue] = {}
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, values: Sequence[SlotValue]) -> None:
        self.engine.wire(f"{self.engine.name}.add")
        for value in values:
            assert value.slot.name in self.slots
            assert value.slot.name not in self.tensors
            self.tensors[value.slot.name] = value.load().clone()

    def finish(self) -> FakeStaged:
        self.engine.wire(f"{self.engine.name}.finish")
        assert self.tensors.keys() == self.slots
        staged = FakeStaged(self.engine, self.tensors)
        self.engine.staged.append(staged)
        return staged

    def discard(self) -> None:
        self.engine.wire(f"{self.engine.name}.drop")
        self.tensors.clear()


class FakeModule(fakes.FakeModule):
    """The kit's, around engines that record."""

    def staged(self) -> list[FakeStaged]:
        """Everything that was ever staged, in order of engines."""
        return [one for engine in self.engines.values() for one in engine.staged]

    def by_slot(self) -> dict[str, torch.Tensor]:
        """What slots hold, by their names alone: as weights for another refit are."""
        return {name.partition("/")[2]: value for name, value in self.holds().items()}


class FakeBackend:
    """Compiles a program into one engine for each top-level child that has weights.

    It leaves the program alone, answers with the eager program, and plans every slot.
    """

    name = BACKEND

    def __init__(self) -> None:
        self.described: Mapping[str, Any] | None = None
        self.attached: Mapping[str, bytes] = {}

    def compile(
        self, program: torch.export.ExportedProgram, options: Mapping[str, Any], tools: Tools
    ) -> FakeModule:
        unknown = options.keys() - {"mute"}
        if unknown:
            raise refitkit.ConfigError(f"There are no options {sorted(unknown)}.")
        kind = FakeEngine if options.get("mute") else OpenEngine
        engines = [kind(name, part) for name, part in parts_of(program).items()]
        graph = program.module()

        def answer(module: FakeModule, *args: Any, **kwargs: Any) -> Any:
            state = {k: v for e in module.engines.values() for k, v in e.live.items()}
            with torch.no_grad():
                return torch.func.functional_call(graph, state, args, kwargs)

        return FakeModule(engines, answer=answer)

    def draft(
        self, parts: Mapping[str, Any], module: OpenedModule | None, tools: Tools
    ) -> PlanDraft:
        slots = [
            slot_for(slot, value, name, readable=True)
            for name, part in parts.items()
            for slot, value in part.items()
        ]
        rows = tuple(recipe_row(slot) for slot in slots)
        return PlanDraft(rows, settings={"mode": "fake"}, versions={"fake": "1"}, platform="here")

    def describe(self, path: Path) -> Mapping[str, Any] | None:
        return self.described

    def attachments(self, path: Path) -> Mapping[str, bytes]:
        return self.attached


class KeyedBackend(FakeBackend):
    """A backend whose plans can be kept: they depend on what its attributes say.

    Attributes:
        drafts: How often it planned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drafts = 0
        self.key: PlanKey | None = PlanKey("options", {"fake": "1"}, "here")
        self.guards: tuple[Guard, ...] = ()
        self.program: torch.export.ExportedProgram | None = None

    def plan_key(
        self,
        program: torch.export.ExportedProgram,
        module: OpenedModule | None,
        options: Mapping[str, Any],
    ) -> PlanKey | None:
        return self.key and dataclasses.replace(self.key, text=f"{self.key.text} {dict(options)}")

    def draft(
        self, parts: Mapping[str, Any], module: OpenedModule | None, tools: Tools
    ) -> PlanDraft:
        self.drafts += 1
        assert self.program is not None
        tensors = tensors_of(self.program)
        kept = [leaf.fqn for leaf in facts_of(self.program).leaves if not leaf.persistent]
        return dataclasses.replace(
            super().draft(parts, module, tools),
            guards=self.guards,
            pinned={name: tensors[name] for name in kept},
            versions=dict(self.key.versions) if self.key else {},
            platform=self.key.platform if self.key else "",
        )


def parts_of(program: torch.export.ExportedProgram) -> dict[str, dict[str, torch.Tensor]]:
    """A program's state by top-level child."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in program.state_dict.items():
        parts.setdefault(name.partition(".")[0], {})[name] = tensor
    return parts


class FakePlugin:
    """Registers a :class:`FakeBackend`, cuts programs for it, and opens :class:`FakeModule`."""

    name = "fake"

    def __init__(self) -> None:
        self.backend = FakeBackend()

    @refitkit.hookimpl
    def refitkit_register_backends(self, register: Callable[[Any], None]) -> None:
        register(self.backend)

    @refitkit.hookimpl
    def refitkit_load_module(self, target: object) -> OpenedModule | None:
        return target if isinstance(target, FakeModule) else None

    @refitkit.hookimpl
    def refitkit_partition(
        self, program: torch.export.ExportedProgram, backend: str
    ) -> Mapping[str, Any] | None:
        return parts_of(program) if backend == BACKEND else None


class Opener(FakePlugin):
    """Opens the one module that it has, by name and from any file: what a command line can say.

    Attributes:
        module: The module; its name is ``fake:module``, and files of it end in ``.fake``.
        config: The settings that it was last asked with.
    """

    def __init__(self, module: FakeModule) -> None:
        super().__init__()
        self.module, self.config = module, Config()

    @refitkit.hookimpl
    def refitkit_load_module(self, target: Any, config: Config) -> FakeModule | None:  # type: ignore[override]  # takes more
        self.config = config
        named = target == "fake:module" or getattr(target, "suffix", "") == ".fake"
        return self.module if named else None


class KeyedPlugin(FakePlugin):
    """The same with a :class:`KeyedBackend`."""

    def __init__(self) -> None:
        super().__init__()
        self.keyed = self.backend = KeyedBackend()

    @refitkit.hookimpl
    def refitkit_partition(
        self, program: torch.export.ExportedProgram, backend: str
    ) -> Mapping[str, Any] | None:
        self.keyed.program = program
        return super().refitkit_partition(program, backend)


# -- plans ------------------------------------------------------------------------------------


def call_row(slot: Slot, call: int, *sources: str) -> LedgerRow:
    """A row whose value is the first result of a call."""
    return LedgerRow(slot=slot, state=SlotState.RECIPE, value=CallRef(call=call), sources=sources)


def op_call(op: str, *args: Any, shape: tuple[int, ...] = (2,), **kwargs: Any) -> OpCall:
    """A call of an aten op with one float32 result; strings that begin with ``@`` are sources."""
    found = [SourceRef(fqn=a[1:]) if isinstance(a, str) and a[0] == "@" else a for a in args]
    result = Tensor(dtype="float32", shape=shape)
    return OpCall(op=f"aten.{op}", args=tuple(found), kwargs=kwargs, results=(result,))


def guard_of(value: Any, now: torch.Tensor, reason: str = "bool() of it") -> Guard:
    """A guard that holds while a value has the bits of a tensor."""
    return Guard(
        value=value,
        sha256=hashlib.sha256(bits(now)[1]).hexdigest(),
        dtype=str(now.dtype).removeprefix("torch."),
        shape=tuple(now.shape),
        shown=str(now.tolist()),
        reason=reason,
    )


def pinned_row(slot: Slot, *sources: str, name: str | None = None) -> LedgerRow:
    """A row whose value the plan keeps."""
    return LedgerRow(
        slot=slot,
        state=SlotState.PINNED,
        value=PinnedRef(name=name or slot.name),
        sources=sources,
        reason="a constant of the graph",
    )


def weights_for(module: FakeModule, fill: float) -> dict[str, torch.Tensor]:
    """A state_dict for a module, with other values than it holds."""
    return {
        slot: torch.full_like(value, fill + number)
        for engine in module.engines.values()
        for number, (slot, value) in enumerate(engine.live.items())
    }


def make_module(
    engines: int = 1, *, wire: Tripwire | None = None, kind: type[FakeEngine] = OpenEngine
) -> FakeModule:
    """A module with engines ``e0``, ``e1``, ... of two slots each, and a plan inside it."""
    wire = wire or Tripwire()
    made = [
        kind(
            f"e{n}",
            {
                f"e{n}.weight": torch.arange(6.0).reshape(2, 3) + n,
                f"e{n}.bias": torch.tensor([-0.0, n]),
            },
            wire,
        )
        for n in range(engines)
    ]
    return with_plan(FakeModule(made, wire=wire))


def with_plan(module: FakeModule) -> FakeModule:
    """A module with a plan inside it: every slot is a parameter of its name."""
    module.attachments = {PLAN_MEMBER: plan_for(module).to_bytes()}
    return module


def pipeline_with(*plugins: object, **settings: Any) -> Pipeline:
    """A pipeline that opens fakes, with these plugins and settings."""
    return Pipeline(settings, plugins=[FakePlugin(), *plugins])


class Loaded:
    """A fake that a pipeline has loaded, for scenes to inherit.

    Attributes:
        module: The fake.
        pipeline: What loaded it.
        compiled: Its handle.
    """

    def __init__(self, module: FakeModule, *plugins: object, **settings: Any) -> None:
        self.module = module
        self.pipeline = pipeline_with(*plugins, **settings)
        self.compiled: CompiledModule = self.pipeline.load(module)

    def holds(self) -> dict[str, torch.Tensor]:
        """What its slots hold, by their names."""
        return self.module.by_slot()


class UnderRules(Loaded):
    """A module that holds zeros, refitted under rules."""

    def __init__(self, program: Mapping[str, torch.Tensor], **rules: Any) -> None:
        zeros = {name: torch.zeros_like(value) for name, value in program.items()}
        super().__init__(FakeModule([OpenEngine("e0", zeros)]), rules=rules)
        self.compiled.plan = plan_for(self.module)

    def refit(self, weights: Any, **how: Any) -> dict[str, torch.Tensor]:
        """Refit it, and return what it holds then."""
        self.pipeline.refit(self.compiled, weights, **how)
        return self.holds()


# -- a plugin that fails at will --------------------------------------------------------------


class TrippingSource(TensorMap):
    """A source whose every method calls a wire."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], wire: Tripwire) -> None:
        super().__init__(tensors, "tripping weights")
        self._wire = wire

    def info(self, fqn: str) -> TensorInfo:
        self._wire("source.info")
        return super().info(fqn)

    def get(self, fqn: str) -> torch.Tensor:
        self._wire("source.get")
        return super().get(fqn)


@dataclasses.dataclass(frozen=True)
class Tripping:
    """What users of a :class:`TrippingPlugin` hand over as weights."""

    tensors: Mapping[str, torch.Tensor]


class TrippingStrategy:
    """Serves like ``recipe``, before it."""

    name = "tripping-strategy"
    priority = 1

    def __init__(self, wire: Tripwire) -> None:
        self._wire = wire

    def map(self, request: MapRequest) -> Mapped:
        self._wire("strategy.map")
        plan = request.plan
        assert isinstance(plan, RefitPlan)
        found = {row.slot.key: plan.value_of(row, request.source) for row in request.wanted}
        return Mapped({key: value for key, value in found.items() if isinstance(value, SlotValue)})


class TrippingVerifier:
    """Calls the module and says what it was told to say."""

    name = "tripping-verifier"

    def __init__(self, plugin: TrippingPlugin) -> None:
        self._wire, self._plugin = plugin.wire, plugin

    def prepare(self, request: VerifyRequest) -> Callable[[OpenedModule], VerificationResult]:
        self._wire("verifier.prepare")

        def judge(module: OpenedModule) -> VerificationResult:
            self._wire("verifier.judge")
            module.probe((), {})
            return VerificationResult(verifier=self.name, ok=self._plugin.verdict, note="as told")

        return judge


class TrippingPlugin:
    """Implements the hooks of a refit; each calls the wire with the hook's name.

    Labels that begin with ``refitkit_`` are hooks.
    """

    name = "tripping"

    def __init__(self, wire: Tripwire, *, verdict: bool = True) -> None:
        self.wire, self.verdict = wire, verdict
        self.events: list[Event] = []
        self.reports: list[RefitReport] = []
        self.problems: list[Problem] = []

    @refitkit.hookimpl
    def refitkit_load_weights(self, source: object) -> TrippingSource | None:
        self.wire("refitkit_load_weights")
        return TrippingSource(source.tensors, self.wire) if isinstance(source, Tripping) else None

    @refitkit.hookimpl
    def refitkit_mapping_strategies(self) -> list[TrippingStrategy]:
        self.wire("refitkit_mapping_strategies")
        return [TrippingStrategy(self.wire)]

    @refitkit.hookimpl
    def refitkit_weight_transforms(self) -> list[Any]:
        self.wire("refitkit_weight_transforms")
        return []

    @refitkit.hookimpl
    def refitkit_check(self) -> list[Problem]:
        self.wire("refitkit_check")
        return self.problems

    @refitkit.hookimpl
    def refitkit_verifiers(self) -> list[TrippingVerifier]:
        self.wire("refitkit_verifiers")
        return [TrippingVerifier(self)]

    @refitkit.hookimpl
    def refitkit_weights_changed(self, report: RefitReport) -> None:
        self.wire(f"refitkit_weights_changed {report.outcome}")
        self.reports.append(report)

    @refitkit.hookimpl
    def refitkit_event(self, event: Event) -> None:
        stage = getattr(event, "stage", "")
        kind = _KINDS.get(type(event), "step")
        self.wire(f"refitkit_event {kind} {stage}")
        self.events.append(event)


_KINDS = {
    Started: "begin",
    StageStarted: "start",
    StageFinished: "finish",
    StageFailed: "fail",
    Finished: "end ",
    Failed: "end ",
    Aborted: "end ",
}
END = "refitkit_event end  "
"""Label of the last event: what was interrupted there was complete."""


# -- memory -----------------------------------------------------------------------------------


class PeakMemory(NewMemory):
    """Records the most new memory that was held after an op, in bytes."""

    peak = 0

    def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__torch_dispatch__(*args, **kwargs)
        held = sum(one.nbytes for one in self._new.values() if not one.expired())
        self.peak = max(self.peak, held)
        return result


# -- mappings ---------------------------------------------------------------------------------


class CountingMapping(Mapping[str, torch.Tensor]):
    """A mapping that counts how often each value is read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.reads: Counter[str] = Counter()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.reads[name] += 1
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def same_state(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Whether two dicts hold the same bits under the same names."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and bits(a[name]) == bits(b[name])
        for name in a
    )
