"""What a program becomes: its parts, their weights, and where those come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt.lowering import lower
from refitkit.builtin.torch_tensorrt.networks import Network
from refitkit.builtin.torch_tensorrt.parts import cut
from refitkit.builtin.torch_tensorrt.torch_tensors import TorchTensors
from refitkit.program import facts_of
from refitkit.program.facts import tensors_of
from refitkit.recipe import Tape, write

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.export import ExportedProgram

    from refitkit.builtin.torch_tensorrt.parts import Cut
    from refitkit.model import LayerType
    from refitkit.recipe import Recorded


@dataclass(frozen=True)
class Reading:
    """A program in parts.

    Attributes:
        cut: The parts.
        holders: Their weights, by part.
        recorded: How those follow from the program's own; None where nothing was recorded.
    """

    cut: Cut
    holders: Mapping[str, Network | TorchTensors]
    recorded: Recorded | None


def read(
    program: ExportedProgram,
    settings: Any,
    layer_types: Mapping[str, LayerType],
    tell: Callable[[str], None],
    *,
    record: bool,
    inlined: bool = False,
    more: Callable[[Cut], Mapping[str, Any]] = lambda _: {},
) -> Reading:
    """Lower a program, cut it, and make networks of its parts.

    Args:
        program: A program of our own: it is changed.
        settings: A ``torch_tensorrt.dynamo.CompilationSettings``.
        layer_types: Layer types that hold weights.
        tell: Tells of progress.
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
        tell("lowering the program")
        lowered = lower(program, settings)
        tell("cutting the program into parts")
        found = cut(lowered, settings, inlined=inlined)
        rest = more(found)
        for part in found.parts:
            tell(f"reading the weights of {part.name}")
            holders[part.name] = (
                Network(part, settings, layer_types, tape)
                if part.structure.accelerated
                else TorchTensors(part.name, part.module, tape)
            )
        holders |= {name: TorchTensors(name, module, tape) for name, module in rest.items()}
    if not record:
        return Reading(found, holders, None)
    slots = [
        (slot, holder.origins[slot.name], holder.scanned[slot.name])
        for holder in holders.values()
        for slot in holder.slots
    ]
    return Reading(found, holders, write(tape, slots, facts.leaves, facts.ties, tensors))
