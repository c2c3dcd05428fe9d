"""A backend in memory, and plugins, that fail when they are told to.

Everything that could fail in a refit calls a :class:`Tripwire` with a label first. A dry run counts
those calls; a test then arms one of them after another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

import refitkit
from refitkit.errors import Problem, WeightMismatchError
from refitkit.model import (
    CallRef,
    EngineMemory,
    Event,
    Fingerprint,
    Guard,
    Leaf,
    LeafKind,
    LedgerRow,
    OpCall,
    PinnedRef,
    PlanData,
    RefitReport,
    Slot,
    SlotState,
    SourceRef,
    StageFinished,
    StageStarted,
    Tensor,
    TensorInfo,
    VerificationResult,
    fingerprint_of_slots,
)
from refitkit.pipeline.pipeline import PLAN
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
from refitkit.recipe.store import index_of

if TYPE_CHECKING:
    from pathlib import Path

BACKEND = "fake"


class Tripwire:
    """Counts calls by label, and raises at some of them.

    Attributes:
        calls: Labels of all calls since it was armed.
        faults: What to raise at which call, by its number.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.faults: dict[int, BaseException] = {}

    def __call__(self, label: str) -> None:
        number = len(self.calls)
        self.calls.append(label)
        if number in self.faults:
            raise self.faults[number]

    def arm(self, faults: Mapping[int, BaseException] | None = None) -> None:
        """Count from 0 again, and raise these."""
        self.calls = []
        self.faults = dict(faults or {})


# -- engines ----------------------------------------------------------------------------------


class FakeStaged:
    """New values beside the live ones. ``did`` records which of its methods were called."""

    def __init__(self, engine: FakeEngine, values: Mapping[str, torch.Tensor]) -> None:
        self.engine, self.values = engine, values
        self.did: list[str] = []
        self._before: dict[str, torch.Tensor] = {}

    def _trip(self, label: str) -> None:
        self.engine.wire(f"{self.engine.name}.{label}")

    def changed(self) -> bool | None:
        self._trip("changed")
        live = self.engine.live
        return any(not _same(live[name], value) for name, value in self.values.items())

    def commit(self) -> None:
        self.did.append("commit")
        self._trip("commit")
        self._before = dict(self.engine.live)
        for name, value in self.values.items():
            self.engine.live[name] = value
            self._trip(f"commit-{name}")  # a failure here leaves a mixture

    def rollback(self) -> None:
        self.did.append("rollback")
        self._trip("rollback")
        self.engine.live.update(self._before)
        self._trip("rollback-end")

    def discard(self) -> None:
        self.did.append("discard")
        self._trip("discard")


class FakeEngine:
    """An engine that takes all its weights at once and cannot be read."""

    def __init__(
        self, name: str, values: Mapping[str, torch.Tensor], wire: Tripwire | None = None
    ) -> None:
        self.name = name
        self.live = {slot: value.detach().clone() for slot, value in values.items()}
        self.wire = wire or Tripwire()
        self.staged: list[FakeStaged] = []
        readable = hasattr(self, "read")
        self.slots = {
            slot: slot_for(slot, value, name, readable=readable)
            for slot, value in self.live.items()
        }

    @property
    def memory(self) -> EngineMemory:
        self.wire(f"{self.name}.memory")
        size = sum(slot.nbytes for slot in self.slots.values())
        return EngineMemory(engine=self.name, kind="device", bytes=size)

    def stage(self, values: Sequence[SlotValue]) -> FakeStaged:
        self.wire(f"{self.name}.stage")
        given = [value.slot.name for value in values]
        if sorted(given) != sorted(self.slots):
            raise WeightMismatchError(f"{self.name} needs {sorted(self.slots)}, got {given}.")
        return self._stage(values)

    def _stage(self, values: Sequence[SlotValue]) -> FakeStaged:
        copies = {}
        for value in values:
            tensor, slot = value.load(), self.slots[value.slot.name]
            if (str(tensor.dtype), tuple(tensor.shape)) != (f"torch.{slot.dtype}", slot.shape):
                raise WeightMismatchError(f"{slot.name} does not fit.")
            copies[slot.name] = tensor.detach().clone()
        self.wire(f"{self.name}.stage-end")
        staged = FakeStaged(self, copies)
        self.staged.append(staged)
        return staged


class OpenEngine(FakeEngine):
    """An engine that can be read, refitted in part, and has a spare buffer."""

    def read(self, slot: str) -> torch.Tensor:
        self.wire(f"{self.name}.read")
        return self.live[slot]

    def stage_partial(self, values: Sequence[SlotValue]) -> FakeStaged:
        self.wire(f"{self.name}.stage-partial")
        return self._stage(values)

    def free_spare(self) -> int:
        return 1


# -- modules ----------------------------------------------------------------------------------


class FakeModule:
    """An opened module. Called, it answers with all that its engines hold, times the input.

    So any bit of any weight shows in the answer. Another answer can be given as a function of the
    module and the inputs.
    """

    backend = BACKEND

    def __init__(
        self,
        engines: Sequence[FakeEngine],
        attachments: Mapping[str, bytes] | None = None,
        wire: Tripwire | None = None,
        answer: Callable[..., Any] | None = None,
    ) -> None:
        self.engines = {engine.name: engine for engine in engines}
        self.attachments = dict(attachments or {})
        self.wire = wire or Tripwire()
        self.answer = answer
        self.on_run: Callable[[], None] = lambda: None

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self.wire("run")
        self.on_run()
        if self.answer is not None:
            return self.answer(self, *args, **kwargs)
        return {
            f"{name}/{slot}": value * args[0] if args else value.clone()
            for name, engine in self.engines.items()
            for slot, value in engine.live.items()
        }

    def probe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self.wire("probe")
        return self.run(args, kwargs)

    def drain(self) -> None:
        self.wire("drain")

    def save(self, path: Path, attachments: Mapping[str, bytes]) -> None:
        names = {name: list(engine.slots) for name, engine in self.engines.items()}
        path.write_text(json.dumps({"engines": names, "attachments": sorted(attachments)}))
        self.attachments = dict(attachments)

    def reopen(self) -> FakeModule:
        engines = [type(e)(e.name, e.live, e.wire) for e in self.engines.values()]
        return FakeModule(engines, self.attachments, self.wire, self.answer)

    # what tests ask

    def holds(self) -> dict[str, torch.Tensor]:
        """Copies of all live values, past every gate and every wire."""
        return {
            f"{name}/{slot}": value.clone()
            for name, engine in self.engines.items()
            for slot, value in engine.live.items()
        }

    def staged(self) -> list[FakeStaged]:
        """Everything that was ever staged, in order of engines."""
        return [one for engine in self.engines.values() for one in engine.staged]


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


def slot_for(
    name: str, value: torch.Tensor, engine: str = "model", *, readable: bool = False
) -> Slot:
    """The slot that an engine would list for a tensor."""
    return Slot(
        engine=engine,
        name=name,
        dtype=str(value.dtype).removeprefix("torch."),
        shape=tuple(value.shape),
        count=value.numel(),
        readable=readable,
    )


def make_slot(
    name: str, shape: tuple[int, ...] = (2,), dtype: str = "float32", engine: str = "model"
) -> Slot:
    """A slot without a tensor."""
    return Slot(engine=engine, name=name, dtype=dtype, shape=shape, count=math.prod(shape))


def recipe_row(slot: Slot, *sources: str) -> LedgerRow:
    """A row that takes its value from a source's tensor; by default of the slot's own name."""
    names = sources or (slot.name,)
    return LedgerRow(
        slot=slot, state=SlotState.RECIPE, value=SourceRef(fqn=names[0]), sources=names
    )


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
        sha256=hashlib.sha256(_raw(now)).hexdigest(),
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


def leaf_for(slot: Slot, kind: LeafKind = LeafKind.PARAMETER, fqn: str | None = None) -> Leaf:
    """The leaf that a slot comes from."""
    return Leaf(fqn=fqn or slot.name, kind=kind, dtype=slot.dtype, shape=slot.shape or ())


def make_plan(
    rows: Sequence[LedgerRow],
    *,
    leaves: Sequence[Leaf] | None = None,
    ties: Sequence[tuple[str, ...]] = (),
    calls: Sequence[OpCall] = (),
    guards: Sequence[Guard] = (),
    pinned: Mapping[str, torch.Tensor] | None = None,
    backend: str = BACKEND,
    graph: str = "0" * 64,
) -> RefitPlan:
    """A plan around rows; by default with a parameter for each source that a row names."""
    if leaves is None:
        named = {name: leaf_for(row.slot, fqn=name) for row in rows for name in row.sources}
        leaves = tuple(named.values())
    pinned = dict(pinned or {})
    data = PlanData(
        backend=backend,
        leaves=tuple(leaves),
        ties=tuple(ties),
        ledger=tuple(rows),
        calls=tuple(calls),
        guards=tuple(guards),
        pinned=index_of(pinned),
        fingerprint=Fingerprint(graph=graph, slots=fingerprint_of_slots(row.slot for row in rows)),
    )
    return RefitPlan(data, pinned)


def plan_for(module: FakeModule, **more: Any) -> RefitPlan:
    """A plan that takes every slot from the parameter of its name."""
    slots = [slot for engine in module.engines.values() for slot in engine.slots.values()]
    return make_plan([recipe_row(slot) for slot in slots], **more)


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
    module = FakeModule(made, wire=wire)
    module.attachments = {PLAN: plan_for(module).to_bytes()}
    return module


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

    def __init__(self, wire: Tripwire, *, verdict: bool) -> None:
        self._wire, self._verdict = wire, verdict

    def prepare(self, request: VerifyRequest) -> Callable[[OpenedModule], VerificationResult]:
        self._wire("verifier.prepare")

        def judge(module: OpenedModule) -> VerificationResult:
            self._wire("verifier.judge")
            module.probe((), {})
            return VerificationResult(verifier=self.name, ok=self._verdict, note="as told")

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
        return [TrippingVerifier(self.wire, verdict=self.verdict)]

    @refitkit.hookimpl
    def refitkit_weights_changed(self, report: RefitReport) -> None:
        self.wire(f"refitkit_weights_changed {report.outcome}")
        self.reports.append(report)

    @refitkit.hookimpl
    def refitkit_event(self, event: Event) -> None:
        stage = getattr(event, "stage", "")
        kind = {StageStarted: "start", StageFinished: "finish"}.get(type(event), "step")
        self.wire(f"refitkit_event {kind} {stage}")
        self.events.append(event)


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


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, found without the package under test."""
    return _raw(a) == _raw(b)


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_state(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Whether two dicts hold the same bits under the same names."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and _same(a[name], b[name])
        for name in a
    )
