"""Partitions a program into the parts that become engines and those that torch runs.

``lower`` and then ``partition_program`` repeat upstream's compilation up to the point where
engines are built. The result must have the same parts as the compiled module. ``check_structures``
and ``check_slots`` compare the two and list the differences.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import CompileError, PlanMismatchError, Problem, raised_as
from refitkit.model.base import Frozen
from refitkit.program import facts_of
from refitkit.program.facts import graph_lines

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.export import ExportedProgram
    from torch.fx import GraphModule

    from refitkit.model import Slot


ACCELERATED = "_run_on_acc"
"""Marks the names of children that become engines.

Upstream gives them no other mark (``partitioning/_adjacency_partitioner.py`` and
``_global_partitioner.py``).
"""


class Structure(Frozen):
    """The structure of a part, without its weights.

    Attributes:
        name: Name of the child module.
        accelerated: Whether the part becomes an engine.
        graph: sha256 of ops, shapes and dtypes. Values of weights do not change it.
        ops: Names of the called ops in order, for error messages.
        inputs: Names of the inputs, in order.
        outputs: Number of outputs.
    """

    name: str
    accelerated: bool
    graph: str
    ops: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: int


@dataclass(frozen=True)
class ProgramPart:
    """One part of a program, with its weights.

    Attributes:
        structure: The part's structure.
        module: The part's graph and weights.
        inputs: A ``torch_tensorrt.Input`` for each input of an accelerated part; else empty.
    """

    structure: Structure
    module: GraphModule
    inputs: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """Name of the child module."""
        return self.structure.name


@dataclass(frozen=True)
class PartitionedProgram:
    """A program in parts.

    Attributes:
        root: The module that calls the parts.
        parts: The parts, in the order of their calls.
    """

    root: GraphModule
    parts: tuple[ProgramPart, ...]


def partition_program(
    lowered: GraphModule, settings: Any, *, inlined: bool = False
) -> PartitionedProgram:
    """Partition a lowered program as upstream does.

    Args:
        lowered: Result of ``lower``. It is changed and must not be used afterwards.
        settings: A ``torch_tensorrt.dynamo.CompilationSettings``.
        inlined: Whether to inline the parts that torch runs, as saved programs do.

    Raises:
        CompileError: Upstream fails, or it supports too few ops for an engine.
    """
    with torch.no_grad(), raised_as(CompileError, "Torch-TensorRT cannot partition the program"):
        root = _partition(lowered, settings)
        if inlined:
            from torch_tensorrt.dynamo._exporter import inline_torch_modules  # noqa: PLC0415

            # an inlined program has no children for torch's parts, so only engines remain
            inline_torch_modules(root)
            root.delete_all_unused_submodules()
        parts = tuple(
            _part_of(root, name, child, settings)
            for name, child in root.named_children()
            if isinstance(child, torch.fx.GraphModule)
        )
    if not any(part.structure.accelerated for part in parts):
        raise _nothing_to_accelerate(lowered, settings, "no part of the program")
    return PartitionedProgram(root, parts)


def _partition(lowered: GraphModule, settings: Any) -> GraphModule:
    from torch.fx.passes.splitter_base import FxNetSplitterInternalError  # noqa: PLC0415
    from torch_tensorrt.dynamo import partitioning  # noqa: PLC0415
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import (  # noqa: PLC0415
        DYNAMO_CONVERTERS,
    )

    # the registry is global: some converters support an op only with certain settings
    DYNAMO_CONVERTERS.set_compilation_settings(settings)
    supported, total = partitioning.get_graph_converter_support(
        lowered, settings.torch_executed_ops
    )
    if supported == 0 or supported < settings.min_block_size:
        raise _nothing_to_accelerate(lowered, settings, f"{supported} of {total} ops")
    common = {
        "min_block_size": settings.min_block_size,
        "torch_executed_ops": settings.torch_executed_ops,
        "require_full_compilation": settings.require_full_compilation,
    }
    if settings.use_fast_partitioner:
        try:
            root: GraphModule
            root, _ = partitioning.fast_partition(
                lowered, skip_fusion=supported == total, **_accepted(partitioning, common)
            )
        except FxNetSplitterInternalError:
            pass  # as upstream, which falls back to the global partitioner
        else:
            return root
    root, _ = partitioning.global_partition(lowered, **common)
    return root


def _accepted(partitioning: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    names = inspect.signature(partitioning.fast_partition).parameters
    return {name: value for name, value in wanted.items() if name in names}


def _nothing_to_accelerate(lowered: GraphModule, settings: Any, what: str) -> CompileError:
    ops = sorted({str(n.target) for n in lowered.graph.nodes if n.op == "call_function"})
    return CompileError(
        f"Torch-TensorRT supports {what}, and min_block_size is {settings.min_block_size}, so the "
        "program would have no engine.",
        problems=[Problem(op, "op of the program") for op in ops],
        hint="Lower min_block_size, or compile with 'aotinductor'.",
    )


def _part_of(root: GraphModule, name: str, child: GraphModule, settings: Any) -> ProgramPart:
    accelerated = ACCELERATED in name
    structure = structure_of(name, child, accelerated=accelerated)
    if not accelerated:
        return ProgramPart(structure, child)
    return ProgramPart(structure, child, tuple(_inputs_of(root, name, child, settings)))


def structure_of(name: str, module: GraphModule, *, accelerated: bool) -> Structure:
    """The structure of a part, without its weights."""
    nodes = list(module.graph.nodes)
    lines = "".join(graph_lines(module))
    result = nodes[-1].args[0] if nodes and nodes[-1].op == "output" else ()
    return Structure(
        name=name,
        accelerated=accelerated,
        graph=hashlib.sha256(lines.encode()).hexdigest(),
        ops=tuple(str(n.target) for n in nodes if n.op.startswith("call_")),
        inputs=tuple(n.name for n in nodes if n.op == "placeholder"),
        outputs=len(result) if isinstance(result, tuple | list) else 1,
    )


def _inputs_of(root: GraphModule, name: str, child: GraphModule, settings: Any) -> Sequence[Any]:
    from torch_tensorrt.dynamo import partitioning  # noqa: PLC0415

    inputs: Sequence[Any] = partitioning.construct_submodule_inputs(child)
    if not settings.truncate_double:
        return inputs
    from torch_tensorrt.dynamo.conversion.truncate_double import (  # noqa: PLC0415
        repair_double_inputs,
    )

    # upstream runs the part once on this device; the engine's own device may not exist here
    tensor = next(iter(child.state_dict().values()), torch.empty(0))
    repaired: Sequence[Any] = repair_double_inputs(root, child, inputs, tensor.device, name)
    return repaired


# -- lowering ------------------------------------------------------------------------------------


def lower(program: ExportedProgram, settings: Any) -> GraphModule:
    """Lower a program as Torch-TensorRT does before it partitions the program.

    Args:
        program: The program. It is changed, and the result shares its tensors.
        settings: A ``torch_tensorrt.dynamo.CompilationSettings``.

    Raises:
        CompileError: Torch-TensorRT cannot lower the program, or the program changes buffers.
    """
    from torch_tensorrt.dynamo import lowering  # noqa: PLC0415 - takes seconds to import

    _check_no_mutation(program)
    # the same steps in the same order as ``_compiler.py`` and ``_refit.py`` of 2.11 to 2.14
    with torch.no_grad(), raised_as(CompileError, "Torch-TensorRT cannot lower the program"):
        program = lowering.pre_export_lowering(program, settings)
        program = program.run_decompositions(_decompositions(settings))
        lowered: GraphModule = lowering.post_lowering(program.module(), settings)
    return lowered


def _check_no_mutation(program: ExportedProgram) -> None:
    """Raise an error if the program changes buffers.

    Upstream turns changed buffers into inputs of the engines, but only when it compiles:
    ``_compiler.py`` of 2.14 lifts them (``lift_mutated_buffers``), its ``_refit.py`` does not.
    """
    changed = [leaf.fqn for leaf in facts_of(program).leaves if leaf.mutated]
    if changed:
        raise CompileError(
            "The program changes buffers while it runs, which Torch-TensorRT cannot refit.",
            problems=[Problem(name, "changed in place") for name in changed],
            hint="Put the model into eval mode before the export, or compile with 'aotinductor'.",
        )


def _decompositions(settings: Any) -> Any:
    """The decomposition table for the settings."""
    from torch_tensorrt.dynamo.lowering import get_decompositions  # noqa: PLC0415

    wanted = {
        "enable_experimental_decompositions": settings.enable_experimental_decompositions,
        "decompose_attention": getattr(settings, "decompose_attention", False),
        "use_distributed_mode_trace": getattr(settings, "use_distributed_mode_trace", False),
        "use_fp32_acc": getattr(settings, "use_fp32_acc", False),
    }
    # versions differ in their parameters, and older settings lack the fields
    known = inspect.signature(get_decompositions).parameters
    return get_decompositions(**{name: value for name, value in wanted.items() if name in known})


# -- comparing with a compiled program -----------------------------------------------------------


def check_structures(found: Sequence[Structure], wanted: Sequence[Structure]) -> None:
    """Compare the parts of a program with the compiled ones.

    Args:
        found: Structures of the program's parts.
        wanted: Structures of the compiled parts.

    Raises:
        PlanMismatchError: Names, ops, shapes, dtypes, inputs or outputs differ.
            Lists the differences.
    """
    problems = list(_differences({s.name: s for s in found}, {s.name: s for s in wanted}))
    if problems:
        raise PlanMismatchError(
            "The program does not match the compiled one: it has other engines.",
            problems=problems,
            hint="Export the same model with the same inputs and dynamic shapes; only its weights "
            "may differ.",
        )


def check_slots(found: Mapping[str, Sequence[Slot]], wanted: Mapping[str, Sequence[Slot]]) -> None:
    """Compare the slots of a program's parts with the compiled ones.

    Args:
        found: Slots of the program, by part.
        wanted: Slots of the compiled program, by part.

    Raises:
        PlanMismatchError: Slots are missing or added, or their dtypes or shapes differ. Lists them.
    """
    found_slots, wanted_slots = _by_key(found), _by_key(wanted)
    problems = [
        Problem("/".join(key), "slot", _slot_text(one), _slot_text(other))
        for key in sorted(found_slots.keys() | wanted_slots.keys())
        if (one := found_slots.get(key)) != (other := wanted_slots.get(key))
    ]
    if problems:
        message = "The networks have other slots than the compiled ones."
        raise PlanMismatchError(message, problems=problems)


def _by_key(slots: Mapping[str, Sequence[Slot]]) -> dict[tuple[str, str], Slot]:
    return {(part, slot.name): slot for part, some in slots.items() for slot in some}


def _slot_text(slot: Slot | None) -> str:
    return "none" if slot is None else f"{slot.dtype} {slot.shape or f'of {slot.count} elements'}"


def _differences(found: dict[str, Structure], wanted: dict[str, Structure]) -> Iterator[Problem]:
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found:
            yield Problem(name, "no part for this engine", wanted=_summary(wanted[name]))
        elif name not in wanted:
            yield Problem(name, "no engine for this part", _summary(found[name]))
        else:
            yield from _part_differences(found[name], wanted[name])


def _summary(structure: Structure) -> str:
    return f"{'an engine' if structure.accelerated else 'torch'} with {len(structure.ops)} ops"


def _part_differences(found: Structure, wanted: Structure) -> Iterator[Problem]:
    name = wanted.name
    if found.accelerated != wanted.accelerated:
        yield Problem(name, "kind of part", _summary(found), _summary(wanted))
    pairs = zip_longest(found.ops, wanted.ops, fillvalue="none")
    for number, (found_op, wanted_op) in enumerate(pairs):
        if found_op != wanted_op:
            yield Problem(name, f"op {number}", found_op, wanted_op)
            return  # ops after the first difference usually differ too
    if found.inputs != wanted.inputs:
        yield Problem(name, "inputs", ", ".join(found.inputs), ", ".join(wanted.inputs))
    elif found.outputs != wanted.outputs:
        yield Problem(name, "outputs", str(found.outputs), str(wanted.outputs))
    elif found.graph != wanted.graph:
        yield Problem(name, "shapes, dtypes or arguments of its ops")
