"""Interprets a program: its parts, their weights, and the origins of the weights.

``interpret_parts`` is the common core: it lowers a program, partitions it and makes a network of
each part, while a tape records how weights are computed. Sessions call it for networks without a
GPU (``worker.server``). ``interpret`` calls it in this process for a compiled target.
``draft_of`` turns either result into a draft of a plan.
"""

from __future__ import annotations

import copy
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from refitkit.builtin.torch_tensorrt.networks import Network, TorchTensors
from refitkit.builtin.torch_tensorrt.parts import lower, partition_program
from refitkit.builtin.torch_tensorrt.settings import settings_text, versions
from refitkit.builtin.torch_tensorrt.targets import REST
from refitkit.errors import PlanMismatchError, Problem
from refitkit.model import LedgerRow, SlotState
from refitkit.program import facts_of
from refitkit.program.facts import tensors_of
from refitkit.protocols import PlanDraft
from refitkit.recipe import Recorded, Tape, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch.export import ExportedProgram

    from refitkit.builtin.torch_tensorrt.parts import PartitionedProgram, Structure
    from refitkit.builtin.torch_tensorrt.targets import Target
    from refitkit.model import LayerType, Slot
    from refitkit.protocols import OpenedModule, Tools


@dataclass(frozen=True)
class InterpretedParts:
    """A program in parts, with their weights.

    Attributes:
        partitioned: The parts.
        holders: Weights of each part, by name of the part.
        recorded: Recipes that compute the weights from those of the program; None if not recorded.
    """

    partitioned: PartitionedProgram
    holders: Mapping[str, Network | TorchTensors]
    recorded: Recorded | None


def interpret_parts(
    program: ExportedProgram,
    settings: Any,
    layer_types: Mapping[str, LayerType],
    progress: Callable[[str], None],
    *,
    record: bool,
    inlined: bool = False,
    extra_modules: Callable[[PartitionedProgram], Mapping[str, Any]] = lambda _: {},
) -> InterpretedParts:
    """Lower a program, partition it, and make networks of its parts.

    Args:
        program: The program. It is changed, so pass a copy; see ``own_copy``.
        settings: A ``torch_tensorrt.dynamo.CompilationSettings``.
        layer_types: Layer types with weights, by name.
        progress: Called with one line of text for each step.
        record: Whether to write recipes that compute the weights from those of the program.
        inlined: Whether to inline the parts that torch runs, as saved programs do.
        extra_modules: Called with the parts before networks are made. It can reject them, and
            returns modules with further tensors, by name.

    Raises:
        CompileError: Torch-TensorRT cannot lower, partition or convert the program, or the program
            changes buffers.
        NotRefittableError: Names do not identify the weights.
        PlanMismatchError: ``extra_modules`` rejected the parts.
    """
    facts, tensors = facts_of(program), tensors_of(program)
    tape = Tape(tensors)
    holders: dict[str, Network | TorchTensors] = {}
    # also without record: under the tape, ops compute the same bits as recipes later do
    with tape:
        progress("lowering the program")
        lowered = lower(program, settings)
        progress("partitioning the program")
        found = partition_program(lowered, settings, inlined=inlined)
        # before the networks, because a mismatch should not cost their time
        extra = extra_modules(found)
        for part in found.parts:
            progress(f"reading the weights of {part.name}")
            holders[part.name] = (
                Network(part, settings, layer_types, tape)
                if part.structure.accelerated
                else TorchTensors(part.name, part.module, tape)
            )
        holders |= {name: TorchTensors(name, module, tape) for name, module in extra.items()}
    if not record:
        return InterpretedParts(found, holders, None)
    slots = [
        (slot, holder.origins[slot.name], holder.scanned[slot.name])
        for holder in holders.values()
        for slot in holder.slots
    ]
    return InterpretedParts(found, holders, write(tape, slots, facts.leaves, facts.ties, tensors))


# -- interpreting for a compiled target ----------------------------------------------------------


@dataclass(frozen=True)
class Interpreted:
    """A program, interpreted as the engines of a target were compiled.

    Attributes:
        structures: All parts, in the order of their calls.
        holders: Weights of each part by name; under ``REST`` those of the target itself, if any.
        constants: Tensors of the program that no state_dict has, by FQN.
        settings: Settings that parts and slots depend on, as text.
        versions: Versions of the packages that engines depend on.
        recorded: Recipes that compute the weights from those of the program; None if not recorded.
    """

    structures: tuple[Structure, ...]
    holders: Mapping[str, Network | TorchTensors]
    constants: Mapping[str, torch.Tensor]
    settings: Mapping[str, str]
    versions: Mapping[str, str]
    recorded: Recorded | None = None

    @property
    def slots(self) -> dict[str, dict[str, Slot]]:
        """Slots by part and name."""
        return {
            name: {slot.name: slot for slot in holder.slots}
            for name, holder in self.holders.items()
        }

    @property
    def layer_types(self) -> tuple[str, ...]:
        """Names of the layer types that have the weights, sorted."""
        return tuple(sorted({n for holder in self.holders.values() for n in holder.layer_types}))

    def values(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """Values by part and slot, one-dimensional."""
        return {name: holder.scanned for name, holder in self.holders.items()}


def interpret(
    program: ExportedProgram, target: Target, tools: Tools, *, record: bool = False
) -> Interpreted:
    """Interpret a program with the settings of a target, on the program's own device.

    Weight names differ between programs on a CPU and on a GPU. So a program for engines that were
    compiled on a GPU must be on a GPU too.

    Args:
        program: The program; it is not changed.
        target: The compiled target.
        tools: Layer types and progress reports of the pipeline.
        record: Whether to write recipes that compute the weights from those of the program.

    Raises:
        CompileError: Torch-TensorRT cannot lower, partition or convert the program.
        PlanMismatchError: The program has other engines than the target. Lists the differences.
        NotRefittableError: Names do not identify the weights.
    """
    # upstream may change the settings while it lowers; those of the target stay as they are
    settings = copy.copy(target.settings)

    def extra(found: PartitionedProgram) -> dict[str, Any]:
        check_parts([part.structure for part in found.parts], target)
        return {REST: _root_state(found)} if REST in target.torch_parts else {}

    found = interpret_parts(
        own_copy(program),
        settings,
        tools.layer_types,
        tools.progress,
        record=record,
        inlined=target.inlined,
        extra_modules=extra,
    )
    return Interpreted(
        structures=tuple(part.structure for part in found.partitioned.parts),
        holders=found.holders,
        constants=constants_of(program),
        settings=settings_text(settings),
        versions=versions(),
        recorded=found.recorded,
    )


def own_copy(program: ExportedProgram) -> ExportedProgram:
    """A copy of the program that upstream may change; its tensors share memory with the original's.

    Upstream changes the graph (``pre_export_lowering``) and moves parameters
    (``offload_module_to_cpu``).
    """
    shared = {id(tensor): _alias(tensor) for tensor in tensors_of(program).values()}
    # deepcopy takes the aliases from its memo, so it copies no weight
    return copy.deepcopy(program, dict(shared))


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor object on the same memory, so that moving one leaves the other in place."""
    alias = tensor.detach()
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(alias, requires_grad=False)
    return alias


def check_parts(structures: list[Structure], target: Target) -> None:
    """Compare the parts of a program with the engines of a target.

    Raises:
        PlanMismatchError: Names, inputs or outputs differ. Lists the differences.
    """
    problems = list(_part_differences({s.name: s for s in structures}, target))
    if problems:
        raise PlanMismatchError(
            "The program does not match the compiled one: it has other engines.",
            problems=problems,
            hint="Export the same model with the same inputs and dynamic shapes; only its weights "
            "may differ.",
        )


def _part_differences(found: dict[str, Structure], target: Target) -> Iterator[Problem]:
    accelerated = {name for name, one in found.items() if one.accelerated}
    for name in sorted(accelerated - target.engines.keys()):
        yield Problem(name, "no engine for this part", f"{len(found[name].ops)} ops")
    for name in sorted(target.engines.keys() - accelerated):
        yield Problem(name, "no part for this engine")
    for name in sorted(accelerated & target.engines.keys()):
        part, engine = found[name], target.engines[name]
        # engines do not expose their ops, so only names and numbers can be compared
        if part.inputs != tuple(engine.input_names):
            yield Problem(name, "inputs", ", ".join(part.inputs), ", ".join(engine.input_names))
        if part.outputs != len(engine.output_names):
            yield Problem(name, "outputs", str(part.outputs), str(len(engine.output_names)))


def _root_state(found: PartitionedProgram) -> Any:
    """A part with the tensors that belong to the root module itself."""
    names = [
        name
        for name, _ in (
            # a tied tensor is a slot under each of its names
            *found.root.named_parameters(remove_duplicate=False),
            *found.root.named_buffers(remove_duplicate=False),
        )
        if name.partition(".")[0] not in {part.name for part in found.parts}
    ]
    graph = torch.fx.Graph()
    graph.output(tuple(graph.get_attr(name) for name in names))
    return torch.fx.GraphModule(found.root, graph)


# -- drafts of plans -----------------------------------------------------------------------------

NOT_RECORDED = (
    "refitkit did not record how it is computed from the weights; the strategy 'rebuild' computes "
    "it from a program with the new weights"
)
"""Reason in the ledger for a slot without a recipe."""


class Recording(Protocol):
    """The result of interpreting a program, in this process or in a session."""

    @property
    def recorded(self) -> Recorded | None:
        """Recipes that compute slots from the program's weights; None if not recorded."""

    @property
    def constants(self) -> Mapping[str, torch.Tensor]:
        """Tensors of the program that no state_dict has, by FQN."""

    @property
    def settings(self) -> Mapping[str, str]:
        """Settings that slots depend on, as text."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the packages that the slots depend on."""

    @property
    def layer_types(self) -> tuple[str, ...]:
        """Names of the layer types that have the weights."""


def unmapped_row(slot: Slot) -> LedgerRow:
    """A ledger row for a slot that only the strategy ``rebuild`` can compute."""
    return LedgerRow(slot=slot, state=SlotState.UNMAPPED, reason=NOT_RECORDED)


def draft_of(found: Recording, slots: Iterable[Slot], device: str) -> PlanDraft:
    """The draft of a plan: recorded recipes, and unmapped rows for all other slots.

    Args:
        found: The interpreted program.
        slots: All slots of all engines.
        device: Kind of device that the slots belong to: ``cpu`` or ``cuda``.
    """
    # without a recording every slot becomes unmapped
    recorded = found.recorded or Recorded(())
    rows = {row.slot.key: row for row in recorded.rows}
    return PlanDraft(
        rows=tuple(_row_for(slot, rows.get(slot.key)) for slot in slots),
        calls=recorded.calls,
        guards=recorded.guards,
        pinned={**found.constants, **recorded.literals},
        settings=dict(found.settings),
        versions=dict(found.versions),
        platform=f"{platform.system()} {platform.machine()} {device}",
        layer_types=found.layer_types,
    )


def _row_for(slot: Slot, recorded: LedgerRow | None) -> LedgerRow:
    """The recorded row with the engine's own slot; unmapped if dtype or count differ."""
    if recorded is None:
        return unmapped_row(slot)
    # an engine can describe a slot in another way than its network; then the recipe does not fit
    if (recorded.slot.dtype, recorded.slot.count) != (slot.dtype, slot.count):
        return unmapped_row(slot)
    return recorded.model_copy(update={"slot": slot})


def slots_of(module: OpenedModule) -> list[Slot]:
    """All slots of a module, in the order of its engines."""
    return [slot for engine in module.engines.values() for slot in engine.slots.values()]


def constants_of(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Copies of the program's tensors that no state_dict has, by FQN. Plans store them."""
    tensors = tensors_of(program)
    return {
        leaf.fqn: tensors[leaf.fqn].detach().clone()
        for leaf in facts_of(program).leaves
        if leaf.kept
    }
