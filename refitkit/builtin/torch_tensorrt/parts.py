"""A lowered program cut into the parts that become engines, and those that torch runs."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import CompileError, Problem, raised_as
from refitkit.model.base import Frozen
from refitkit.program.facts import graph_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import GraphModule

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
class Part:
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
class Cut:
    """A program in parts.

    Attributes:
        whole: What calls them.
        parts: The parts, in the order of their calls.
    """

    whole: GraphModule
    parts: tuple[Part, ...]


def cut(lowered: GraphModule, settings: Any, *, inlined: bool = False) -> Cut:
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
    return Cut(whole, parts)


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


def _part(whole: GraphModule, name: str, child: GraphModule, settings: Any) -> Part:
    accelerated = ACCELERATED in name
    structure = structure_of(name, child, accelerated=accelerated)
    if not accelerated:
        return Part(structure, child)
    return Part(structure, child, tuple(_inputs(whole, name, child, settings)))


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
