"""What a program becomes: its parts, their weights, and where those come from."""

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
    """A program in parts.

    Attributes:
        cut: The parts.
        holders: Their weights, by part.
        recorded: How those follow from the program's own; None where nothing was recorded.
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
    more: Callable[[PartitionedProgram], Mapping[str, Any]] = lambda _: {},
) -> InterpretedParts:
    """Lower a program, cut it, and make networks of its parts.

    Args:
        program: A program of our own: it is changed.
        settings: A ``torch_tensorrt.dynamo.CompilationSettings``.
        layer_types: Layer types that hold weights.
        progress: Called with one line of text for each step.
        record: Whether to write down how weights follow from those of the program.
        inlined: Whether torch's parts are inlined, as in saved programs.
        more: Judges the parts, and gives modules with further tensors, by name.

    Raises:
        CompileError: Torch-TensorRT cannot lower, cut or convert it; or it would change its
            tensors.
        NotRefittableError: Weights cannot be told apart.
        PlanMismatchError: ``more`` refused the parts.
    """
    facts, tensors = facts_of(program), tensors_of(program)
    tape = Tape(tensors)
    holders: dict[str, Network | TorchTensors] = {}
    with tape:  # also where nothing is written down: ops give the bits that recipes will give
        progress("lowering the program")
        lowered = lower(program, settings)
        progress("cutting the program into parts")
        found = partition_program(lowered, settings, inlined=inlined)
        rest = more(found)
        for part in found.parts:
            progress(f"reading the weights of {part.name}")
            holders[part.name] = (
                Network(part, settings, layer_types, tape)
                if part.structure.accelerated
                else TorchTensors(part.name, part.module, tape)
            )
        holders |= {name: TorchTensors(name, module, tape) for name, module in rest.items()}
    if not record:
        return InterpretedParts(found, holders, None)
    slots = [
        (slot, holder.origins[slot.name], holder.scanned[slot.name])
        for holder in holders.values()
        for slot in holder.slots
    ]
    return InterpretedParts(found, holders, write(tape, slots, facts.leaves, facts.ties, tensors))


# MERGED in_process: Planning in the process that holds the engines: on a GPU, on the program's
# own device.
#
# Names of weights differ between programs on a CPU and on a GPU, so what was compiled on a GPU is
# interpreted there, with the settings of the compiled children.


@dataclass(frozen=True)
class Interpreted:
    """A program as the engines of a target would be made of it.

    Attributes:
        structures: All parts, in the order of their calls.
        holders: Their weights, by part; for a target with state of its own also under ``REST``.
        constants: What the program has and no state_dict holds, by FQN.
        settings: Settings on which parts and slots depend, as text.
        versions: Versions of what makes engines here.
        recorded: How weights follow from those of the program; None where it was not recorded.
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
        """Names of the layer types that hold weights."""
        return tuple(sorted({n for holder in self.holders.values() for n in holder.layer_types}))

    def values(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """Values by part and slot, flat."""
        return {name: holder.scanned for name, holder in self.holders.items()}


def interpret(
    program: ExportedProgram, target: Target, tools: Tools, *, record: bool = False
) -> Interpreted:
    """Cut and interpret a program with the settings of a target.

    Args:
        program: The program; it is read only.
        target: What was compiled.
        tools: What the pipeline lends.
        record: Whether to write down how weights follow from those of the program.

    Raises:
        CompileError: Torch-TensorRT cannot lower, cut or convert it.
        PlanMismatchError: It makes other engines than the target has; lists what differs.
        NotRefittableError: Weights cannot be told apart.
    """
    settings = copy.copy(target.settings)

    def rest(found: PartitionedProgram) -> dict[str, Any]:
        check_parts([part.structure for part in found.parts], target)
        return {REST: _state_of(found)} if REST in target.torch_parts else {}

    found = interpret_parts(
        own_copy(program),
        settings,
        tools.layer_types,
        tools.progress,
        record=record,
        inlined=target.inlined,
        more=rest,
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
    """A program that upstream may change, on the memory of another's tensors.

    ``pre_export_lowering`` works on the graph of the program that it is given, and
    ``offload_module_to_cpu`` moves its parameters.
    """
    shared = {id(tensor): _alias(tensor) for tensor in tensors_of(program).values()}
    return copy.deepcopy(program, dict(shared))


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as another object, which can be moved elsewhere without the first."""
    alias = tensor.detach()
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(alias, requires_grad=False)
    return alias


def check_parts(structures: list[Structure], target: Target) -> None:
    """Compare parts of a program with the engines of a target.

    Raises:
        PlanMismatchError: Names, inputs or outputs differ; lists what does.
    """
    problems = list(_differences({s.name: s for s in structures}, target))
    if problems:
        raise PlanMismatchError(
            "The program is not the one that was compiled: it makes other engines.",
            problems=problems,
            hint="Export the same model with the same inputs and dynamic shapes; only its weights "
            "may differ.",
        )


def _differences(found: dict[str, Structure], target: Target) -> Iterator[Problem]:
    made = {name for name, one in found.items() if one.accelerated}
    for name in sorted(made - target.engines.keys()):
        yield Problem(name, "no engine for this part", f"{len(found[name].ops)} ops")
    for name in sorted(target.engines.keys() - made):
        yield Problem(name, "no part for this engine")
    for name in sorted(made & target.engines.keys()):
        part, engine = found[name], target.engines[name]
        if part.inputs != tuple(engine.input_names):
            yield Problem(name, "inputs", ", ".join(part.inputs), ", ".join(engine.input_names))
        if part.outputs != len(engine.output_names):
            yield Problem(name, "outputs", str(part.outputs), str(len(engine.output_names)))


def _state_of(found: PartitionedProgram) -> Any:
    """The state that lies in the whole itself, as a part of its own."""
    names = [
        name
        for name, _ in (
            *found.whole.named_parameters(remove_duplicate=False),
            *found.whole.named_buffers(remove_duplicate=False),
        )
        if name.partition(".")[0] not in {part.name for part in found.parts}
    ]
    graph = torch.fx.Graph()
    graph.output(tuple(graph.get_attr(name) for name in names))
    return torch.fx.GraphModule(found.whole, graph)


# MERGED rows: Drafts of plans.

NOT_RECORDED = (
    "how it follows from the weights was not recorded; the strategy 'rebuild' serves it from a "
    "program with the new weights"
)


class Recording(Protocol):
    """What became of a program when it was planned, in this process or in another one."""

    @property
    def recorded(self) -> Recorded | None:
        """How slots follow from the program's weights; None where it was not recorded."""

    @property
    def constants(self) -> Mapping[str, torch.Tensor]:
        """What the program has and no state_dict holds, by FQN."""

    @property
    def settings(self) -> Mapping[str, str]:
        """Settings on which slots depend, as text."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of what made them."""

    @property
    def layer_types(self) -> tuple[str, ...]:
        """Names of the layer types that hold weights."""


def unmapped_row(slot: Slot) -> LedgerRow:
    """A slot that only an interpreter's run can serve."""
    return LedgerRow(slot=slot, state=SlotState.UNMAPPED, reason=NOT_RECORDED)


def draft_of(found: Recording, slots: Iterable[Slot], device: str) -> PlanDraft:
    """A draft of what was recorded; other rows can only be served by an interpreter's run.

    Args:
        found: What the program became.
        slots: All slots of all engines.
        device: Kind of device that names and values of slots are for.
    """
    recorded = found.recorded or Recorded(())
    rows = {row.slot.key: row for row in recorded.rows}
    return PlanDraft(
        rows=tuple(_row(slot, rows.get(slot.key)) for slot in slots),
        calls=recorded.calls,
        guards=recorded.guards,
        pinned={**found.constants, **recorded.literals},
        settings=dict(found.settings),
        versions=dict(found.versions),
        platform=f"{platform.system()} {platform.machine()} {device}",
        layer_types=found.layer_types,
    )


def _row(slot: Slot, recorded: LedgerRow | None) -> LedgerRow:
    """A row for a slot as its engine describes it, of what the network's slot was recorded as."""
    if recorded is None:
        return unmapped_row(slot)
    if (recorded.slot.dtype, recorded.slot.count) != (slot.dtype, slot.count):
        return unmapped_row(slot)
    return recorded.model_copy(update={"slot": slot})


def slots_of(module: OpenedModule) -> list[Slot]:
    """All slots, as the engines list them."""
    return [slot for engine in module.engines.values() for slot in engine.slots.values()]


def constants_of(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Copies of what a program has and no state_dict holds: a plan keeps them."""
    tensors = tensors_of(program)
    return {
        leaf.fqn: tensors[leaf.fqn].detach().clone()
        for leaf in facts_of(program).leaves
        if leaf.kept
    }
