"""A lowered program cut into the parts that become engines, and those that torch runs."""

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
"""How upstream names the children that become engines (``partitioning/_adjacency_partitioner.py``
and ``_global_partitioner.py``): it is their only mark."""


class Structure(Frozen):
    """What a part is, apart from its weights.

    Attributes:
        name: Name of the child.
        accelerated: Whether it becomes an engine.
        graph: sha256 over ops, shapes and dtypes; values of weights do not matter.
        ops: Its calls, in order, to tell what differs.
        inputs: Names of its inputs.
        outputs: Number of its outputs.
    """

    name: str
    accelerated: bool
    graph: str
    ops: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: int


@dataclass(frozen=True)
class ProgramPart:
    """One part.

    Attributes:
        structure: What it is, apart from its weights.
        module: Its graph, with weights.
        inputs: For an accelerated one, a ``torch_tensorrt.Input`` for each input.
    """

    structure: Structure
    module: GraphModule
    inputs: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """Name of the child."""
        return self.structure.name


@dataclass(frozen=True)
class PartitionedProgram:
    """A program in parts.

    Attributes:
        whole: What calls them.
        parts: The parts, in the order of their calls.
    """

    whole: GraphModule
    parts: tuple[ProgramPart, ...]


def partition_program(
    lowered: GraphModule, settings: Any, *, inlined: bool = False
) -> PartitionedProgram:
    """Cut a lowered program as upstream does.

    Args:
        lowered: What ``lowering.lower`` gave. It is used up.
        settings: A ``torch_tensorrt.dynamo.CompilationSettings``.
        inlined: Whether torch's parts are inlined, as in saved programs.

    Raises:
        CompileError: Too few ops are supported for any engine, or upstream fails.
    """
    with torch.no_grad(), raised_as(CompileError, "Torch-TensorRT cannot cut the program"):
        whole = _partitioned(lowered, settings)
        if inlined:
            from torch_tensorrt.dynamo._exporter import inline_torch_modules  # noqa: PLC0415

            inline_torch_modules(whole)
            whole.delete_all_unused_submodules()
        parts = tuple(
            _part(whole, name, child, settings)
            for name, child in whole.named_children()
            if isinstance(child, torch.fx.GraphModule)
        )
    if not any(part.structure.accelerated for part in parts):
        raise _nothing_to_accelerate(lowered, settings, "no part of the program")
    return PartitionedProgram(whole, parts)


def _partitioned(lowered: GraphModule, settings: Any) -> GraphModule:
    from torch.fx.passes.splitter_base import FxNetSplitterInternalError  # noqa: PLC0415
    from torch_tensorrt.dynamo import partitioning  # noqa: PLC0415
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import (  # noqa: PLC0415
        DYNAMO_CONVERTERS,
    )

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
            whole: GraphModule
            whole, _ = partitioning.fast_partition(
                lowered, skip_fusion=supported == total, **_known(partitioning, common)
            )
        except FxNetSplitterInternalError:
            pass  # as upstream: the global partitioner takes what the fast one cannot
        else:
            return whole
    whole, _ = partitioning.global_partition(lowered, **common)
    return whole


def _known(partitioning: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    names = inspect.signature(partitioning.fast_partition).parameters
    return {name: value for name, value in wanted.items() if name in names}


def _nothing_to_accelerate(lowered: GraphModule, settings: Any, what: str) -> CompileError:
    ops = sorted({str(n.target) for n in lowered.graph.nodes if n.op == "call_function"})
    return CompileError(
        f"Torch-TensorRT supports {what}, and min_block_size is {settings.min_block_size}: there "
        "would be no engine.",
        problems=[Problem(op, "op of the program") for op in ops],
        hint="Lower min_block_size, or compile with 'aotinductor'.",
    )


def _part(whole: GraphModule, name: str, child: GraphModule, settings: Any) -> ProgramPart:
    accelerated = ACCELERATED in name
    structure = structure_of(name, child, accelerated=accelerated)
    if not accelerated:
        return ProgramPart(structure, child)
    return ProgramPart(structure, child, tuple(_inputs(whole, name, child, settings)))


def structure_of(name: str, module: GraphModule, *, accelerated: bool) -> Structure:
    """What a part is, apart from its weights."""
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


def _inputs(whole: GraphModule, name: str, child: GraphModule, settings: Any) -> Sequence[Any]:
    from torch_tensorrt.dynamo import partitioning  # noqa: PLC0415

    inputs: Sequence[Any] = partitioning.construct_submodule_inputs(child)
    if not settings.truncate_double:
        return inputs
    from torch_tensorrt.dynamo.conversion.truncate_double import (  # noqa: PLC0415
        repair_double_inputs,
    )

    # it runs the part once, wherever that can be: the engine's own device may be missing
    tensor = next(iter(child.state_dict().values()), torch.empty(0))
    repaired: Sequence[Any] = repair_double_inputs(whole, child, inputs, tensor.device, name)
    return repaired


# MERGED lowering: A program as Torch-TensorRT lowers it before it cuts it into parts.
#
# The steps and their order are those of ``torch_tensorrt/dynamo/_compiler.py`` and ``_refit.py``
# (2.11 to 2.14). They change the program that they are given, so it has to be one of our own.


def lower(program: ExportedProgram, settings: Any) -> GraphModule:
    """Lower a program.

    Args:
        program: The program; it is changed, and its tensors are shared with the result.
        settings: A ``torch_tensorrt.dynamo.CompilationSettings``.

    Raises:
        CompileError: Torch-TensorRT cannot lower it, or the program changes buffers.
    """
    from torch_tensorrt.dynamo import lowering  # noqa: PLC0415 - imported by whoever calls this

    _check_pure(program)
    with torch.no_grad(), raised_as(CompileError, "Torch-TensorRT cannot lower the program"):
        program = lowering.pre_export_lowering(program, settings)
        program = program.run_decompositions(_decompositions(settings))
        lowered: GraphModule = lowering.post_lowering(program.module(), settings)
    return lowered


def _check_pure(program: ExportedProgram) -> None:
    """Refuse programs that change buffers: upstream turns those into inputs of the engines.

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
    """The table for these settings; its arguments differ from version to version."""
    from torch_tensorrt.dynamo.lowering import get_decompositions  # noqa: PLC0415

    wanted = {
        "enable_experimental_decompositions": settings.enable_experimental_decompositions,
        "decompose_attention": getattr(settings, "decompose_attention", False),
        "use_distributed_mode_trace": getattr(settings, "use_distributed_mode_trace", False),
        "use_fp32_acc": getattr(settings, "use_fp32_acc", False),
    }
    known = inspect.signature(get_decompositions).parameters
    return get_decompositions(**{name: value for name, value in wanted.items() if name in known})


# MERGED matching: Whether a program is cut into the parts that were compiled, and what differs if
# it is not.


def check_structures(found: Sequence[Structure], wanted: Sequence[Structure]) -> None:
    """Compare the parts of a program with those that were compiled.

    Raises:
        PlanMismatchError: Names, ops, shapes, dtypes, inputs or outputs differ; lists what does.
    """
    problems = list(_differences({s.name: s for s in found}, {s.name: s for s in wanted}))
    if problems:
        raise PlanMismatchError(
            "The program is not the one that was compiled: it makes other engines.",
            problems=problems,
            hint="Export the same model with the same inputs and dynamic shapes; only its weights "
            "may differ.",
        )


def check_slots(found: Mapping[str, Sequence[Slot]], wanted: Mapping[str, Sequence[Slot]]) -> None:
    """Compare the slots of the parts of a program with those that were compiled.

    Raises:
        PlanMismatchError: There are others, or they have other dtypes or shapes; lists them.
    """
    here, there = _by_key(found), _by_key(wanted)
    problems = [
        Problem("/".join(key), "slot", _slot_text(here.get(key)), _slot_text(there.get(key)))
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]
    if problems:
        raise PlanMismatchError("The networks have other weights.", problems=problems)


def _by_key(slots: Mapping[str, Sequence[Slot]]) -> dict[tuple[str, str], Slot]:
    return {(part, slot.name): slot for part, some in slots.items() for slot in some}


def _slot_text(slot: Slot | None) -> str:
    return "none" if slot is None else f"{slot.dtype} {slot.shape or f'of {slot.count} elements'}"


def _differences(found: dict[str, Structure], wanted: dict[str, Structure]) -> Iterator[Problem]:
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found:
            yield Problem(name, "no part for this engine", wanted=_kind(wanted[name]))
        elif name not in wanted:
            yield Problem(name, "no engine for this part", _kind(found[name]))
        else:
            yield from _within(found[name], wanted[name])


def _kind(structure: Structure) -> str:
    return f"{'an engine' if structure.accelerated else 'torch'} with {len(structure.ops)} ops"


def _within(found: Structure, wanted: Structure) -> Iterator[Problem]:
    name = wanted.name
    if found.accelerated != wanted.accelerated:
        yield Problem(name, "runs elsewhere", _kind(found), _kind(wanted))
    for number, (mine, theirs) in enumerate(zip_longest(found.ops, wanted.ops, fillvalue="none")):
        if mine != theirs:
            yield Problem(name, f"op {number}", mine, theirs)
            return
    if found.inputs != wanted.inputs:
        yield Problem(name, "inputs", ", ".join(found.inputs), ", ".join(wanted.inputs))
    elif found.outputs != wanted.outputs:
        yield Problem(name, "outputs", str(found.outputs), str(wanted.outputs))
    elif found.graph != wanted.graph:
        yield Problem(name, "shapes, dtypes or arguments of its ops")
