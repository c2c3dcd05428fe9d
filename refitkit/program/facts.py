"""Leaves, ties and the graph fingerprint of a program. Nothing here changes the program.

:func:`facts_of` returns them all. :func:`tensors_of` returns the tensors themselves.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind

from refitkit.errors import NotRefittableError, Problem
from refitkit.model import Leaf, LeafKind
from refitkit.program.dtypes import dtype_name, unusable_dtype
from refitkit.program.liveness import live_inputs, mutated_placeholders, submodules_of
from refitkit.program.views import with_overlaps

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.export import ExportedProgram

_KINDS = {
    InputKind.PARAMETER: LeafKind.PARAMETER,
    InputKind.BUFFER: LeafKind.BUFFER,
    InputKind.CONSTANT_TENSOR: LeafKind.CONSTANT,
}


@dataclass(frozen=True)
class ProgramFacts:
    """The facts about a program that a plan records.

    Attributes:
        leaves: All parameters, buffers and lifted constants.
        ties: Classes of two or more FQNs that are one tensor.
        graph: sha256 over ops, FQNs, shapes and dtypes, as hexadecimal text. It does not depend on
            the values of weights.
        conflicts: Problems of leaves that share memory in a way that no recipe can follow.
    """

    leaves: tuple[Leaf, ...]
    ties: tuple[tuple[str, ...], ...]
    graph: str
    conflicts: tuple[Problem, ...] = ()


def facts_of(program: ExportedProgram) -> ProgramFacts:
    """Return leaves, ties and fingerprint of a program.

    Raises:
        NotRefittableError: The program has tensors of dtypes that refitkit cannot refit. It lists
            all of them.
    """
    problems = [
        Problem(name, "dtype", dtype_name(tensor.dtype), hint="keep its bytes in a uint8 tensor")
        for name, tensor in tensors_of(program).items()
        if unusable_dtype(dtype_name(tensor.dtype))
    ]
    if problems:
        message = "The program holds tensors of dtypes that refitkit cannot refit."
        raise NotRefittableError(message, problems=problems)
    leaves, conflicts = with_overlaps(tuple(_leaves(program)), tensors_of(program))
    return ProgramFacts(leaves, _ties(program, leaves), _fingerprint(program), conflicts)


def tensors_of(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Return all tensors of a program by FQN: its state_dict and its tensor constants."""
    constants = {k: v for k, v in program.constants.items() if isinstance(v, torch.Tensor)}
    return {**program.state_dict, **constants}


def _leaves(program: ExportedProgram) -> Iterator[Leaf]:
    tensors = tensors_of(program)
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    mutated = mutated_placeholders(program)
    live = live_inputs(program.graph_module)
    listed = set()
    for spec in program.graph_signature.input_specs:
        if spec.kind not in _KINDS or spec.target not in tensors:
            continue  # inputs of the user, tokens, and custom objects
        kind = _KINDS[spec.kind]
        if spec.kind is InputKind.BUFFER and not spec.persistent:
            kind = LeafKind.NON_PERSISTENT_BUFFER
        tensor, node = tensors[spec.target], placeholders[spec.arg.name]
        listed.add(spec.target)
        yield _leaf(spec.target, kind, tensor, used=node in live, mutated=node.name in mutated)
    # a strict export lists no inputs for tensors that it does not read: other names of tied weights
    for fqn in [name for name in program.state_dict if name not in listed]:
        tensor = program.state_dict[fqn]
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        kind = LeafKind.PARAMETER if is_parameter else LeafKind.BUFFER
        yield _leaf(fqn, kind, tensor, used=False, mutated=False)


def _leaf(fqn: str, kind: LeafKind, tensor: torch.Tensor, *, used: bool, mutated: bool) -> Leaf:
    return Leaf(
        fqn=fqn,
        kind=kind,
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        device=str(tensor.device),
        used=used,
        mutated=mutated,
    )


def _ties(program: ExportedProgram, leaves: tuple[Leaf, ...]) -> tuple[tuple[str, ...], ...]:
    """Return classes of FQNs that name one tensor: same address, dtype, shape and strides."""
    classes: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    tensors = tensors_of(program)
    known = {leaf.fqn for leaf in leaves}
    for fqn, tensor in tensors.items():
        if fqn in known and tensor.numel():
            key = (tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device))
            classes[(_address(tensor), *key)].append(fqn)
    return tuple(tuple(names) for names in classes.values() if len(names) > 1)


def _address(tensor: torch.Tensor) -> tuple[str, int, int]:
    """Return a key for the address of a tensor; a storage object stands for missing data."""
    # tensors without data all have the address 0
    if tensor.is_meta or isinstance(tensor, FakeTensor) or not tensor.data_ptr():
        return "storage", tensor.untyped_storage()._cdata, int(tensor.storage_offset())  # noqa: SLF001
    return "memory", tensor.data_ptr(), 0


def _fingerprint(program: ExportedProgram) -> str:
    """Return the sha256 over a canonical text of the graph, in which FQNs name the placeholders."""
    digest = hashlib.sha256()
    targets = {s.arg.name: f"{s.kind.name} {s.target}" for s in _named_specs(program)}
    for line in graph_lines(program.graph_module, targets):
        digest.update(line.encode())
    return digest.hexdigest()


def graph_lines(
    module: torch.fx.GraphModule, targets: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yield a canonical text of a graph, one line for each node, then those of its submodules.

    A line has the op, its arguments with nodes by position, and the shape and dtype of the result.
    It has no values of tensors and no names of nodes, which differ between exports.

    Args:
        module: Graph to describe.
        targets: Text for placeholders, by node name.
    """
    targets = targets or {}
    numbers: dict[torch.fx.Node, int] = {}
    for number, node in enumerate(module.graph.nodes):
        numbers[node] = number
        shown = targets.get(node.name, "") if node.op == "placeholder" else str(node.target)
        arguments = _canonical((node.args, node.kwargs), numbers)
        # only programs that torch.export.load returned have values at their output node
        value = None if node.op == "output" else node.meta.get("val")
        meta = _canonical(value, numbers)
        yield f"{node.op} {shown} {arguments} {meta}\n"
        for inner in submodules_of(node):  # nodes of a submodule have positions of their own
            yield from graph_lines(inner)


def _named_specs(program: ExportedProgram) -> Iterator[Any]:
    return (s for s in program.graph_signature.input_specs if hasattr(s.arg, "name"))


def _canonical(value: Any, numbers: Mapping[torch.fx.Node, int]) -> str:
    if isinstance(value, torch.fx.Node):
        return f"%{numbers.get(value, -1)}"
    if isinstance(value, torch.Tensor):
        return f"{dtype_name(value.dtype)}{[str(d) for d in value.shape]}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_canonical(v, numbers) for v in value) + "]"
    if isinstance(value, dict):
        items = sorted(value.items(), key=lambda item: str(item[0]))
        return "{" + ",".join(f"{k}:{_canonical(v, numbers)}" for k, v in items) + "}"
    return repr(value) if isinstance(value, str | int | float | bool | None) else str(value)
