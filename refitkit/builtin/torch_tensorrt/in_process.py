"""Planning in the process that holds the engines: on a GPU, on the program's own device.

Names of weights differ between programs on a CPU and on a GPU, so what was compiled on a GPU is
interpreted there, with the settings of the compiled children.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.torch_tensorrt.options import versions
from refitkit.builtin.torch_tensorrt.recording import read
from refitkit.builtin.torch_tensorrt.rows import constants_of
from refitkit.builtin.torch_tensorrt.settings import settings_text
from refitkit.builtin.torch_tensorrt.targets import REST
from refitkit.errors import PlanMismatchError, Problem
from refitkit.program.facts import tensors_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.export import ExportedProgram

    from refitkit.builtin.torch_tensorrt.networks import Network
    from refitkit.builtin.torch_tensorrt.parts import Cut, Structure
    from refitkit.builtin.torch_tensorrt.targets import Target
    from refitkit.builtin.torch_tensorrt.torch_tensors import TorchTensors
    from refitkit.model import Slot
    from refitkit.protocols import Tools
    from refitkit.recipe import Recorded


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

    def rest(found: Cut) -> dict[str, Any]:
        check_parts([part.structure for part in found.parts], target)
        return {REST: _state_of(found)} if REST in target.torch_parts else {}

    found = read(
        own_copy(program),
        settings,
        tools.layer_types,
        tools.tell,
        record=record,
        inlined=target.inlined,
        more=rest,
    )
    return Interpreted(
        structures=tuple(part.structure for part in found.cut.parts),
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


def _state_of(found: Cut) -> Any:
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
