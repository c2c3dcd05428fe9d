"""Leaves, ties and the graph fingerprint of a program. Reads it, never changes it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import InputKind

from refitkit.model import Leaf, LeafKind
from refitkit.program.dtypes import dtype_name

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
    """What a plan records of a program.

    Attributes:
        leaves: All parameters, buffers and lifted constants.
        ties: Classes of FQNs that are one tensor; only classes of two and more.
        graph: sha256 over ops, FQNs, shapes and dtypes; values of weights do not matter.
    """

    leaves: tuple[Leaf, ...]
    ties: tuple[tuple[str, ...], ...]
    graph: str


def facts_of(program: ExportedProgram) -> ProgramFacts:
    """Leaves, ties and fingerprint of a program."""
    leaves = tuple(_leaves(program))
    return ProgramFacts(leaves, _ties(program, leaves), _fingerprint(program))


def tensors_of(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """All tensors that a program holds, by FQN: its state_dict and its constants."""
    constants = {k: v for k, v in program.constants.items() if isinstance(v, torch.Tensor)}
    return {**program.state_dict, **constants}


def _leaves(program: ExportedProgram) -> Iterator[Leaf]:
    tensors = tensors_of(program)
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    mutated = _mutated_placeholders(program)
    for spec in program.graph_signature.input_specs:
        if spec.kind not in _KINDS or spec.target not in tensors:
            continue
        kind = _KINDS[spec.kind]
        if spec.kind is InputKind.BUFFER and not spec.persistent:
            kind = LeafKind.NON_PERSISTENT_BUFFER
        tensor, node = tensors[spec.target], placeholders[spec.arg.name]
        yield Leaf(
            fqn=spec.target,
            kind=kind,
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            device=str(tensor.device),
            used=bool(node.users),
            mutated=node.name in mutated,
        )


def _mutated_placeholders(program: ExportedProgram) -> set[str]:
    """Names of placeholders that the graph writes to, directly or through views.

    A program that was not decomposed has its in-place ops as they were written; a decomposed one
    lists what it writes back in its signature.
    """
    found: set[str] = set()
    by_target = {s.target: s.arg.name for s in program.graph_signature.input_specs if s.target}
    for fqn in program.graph_signature.buffers_to_mutate.values():
        found.add(by_target[fqn])
    for node in program.graph.nodes:
        for argument in _written_arguments(node):
            found |= _roots(argument)
    return found


def _arguments(node: torch.fx.Node) -> Iterator[tuple[Any, Any]]:
    """(schema argument, value) of a call of an aten op."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            yield argument, node.args[position]
        elif argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]


def _written_arguments(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    for argument, value in _arguments(node):
        if argument.alias_info is not None and argument.alias_info.is_write:
            values = value if isinstance(value, list | tuple) else [value]
            yield from (v for v in values if isinstance(v, torch.fx.Node))


def _roots(node: torch.fx.Node) -> set[str]:
    """Placeholders whose memory a node may share."""
    found: set[str] = set()
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            found.add(current.name)
        stack += [
            value
            for argument, value in _arguments(current)
            if argument.alias_info is not None and isinstance(value, torch.fx.Node)
        ]
    return found


def _ties(program: ExportedProgram, leaves: tuple[Leaf, ...]) -> tuple[tuple[str, ...], ...]:
    """FQNs whose tensors share memory exactly: one weight under several names."""
    classes: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    tensors = tensors_of(program)
    known = {leaf.fqn for leaf in leaves}
    for fqn, tensor in tensors.items():
        if fqn in known and tensor.numel():
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            classes[(*key, str(tensor.device))].append(fqn)
    return tuple(tuple(names) for names in classes.values() if len(names) > 1)


def _fingerprint(program: ExportedProgram) -> str:
    """sha256 of a canonical text of the graph: nodes by position, FQNs, shapes, dtypes."""
    digest = hashlib.sha256()
    targets = {s.arg.name: (s.kind.name, s.target) for s in _named_specs(program)}
    numbers: dict[torch.fx.Node, int] = {}
    for number, node in enumerate(program.graph.nodes):
        numbers[node] = number
        shown = targets.get(node.name, "") if node.op == "placeholder" else str(node.target)
        arguments = _canonical((node.args, node.kwargs), numbers)
        meta = _canonical(node.meta.get("val"), numbers)
        digest.update(f"{node.op} {shown} {arguments} {meta}\n".encode())
    return digest.hexdigest()


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
    if isinstance(value, torch.fx.GraphModule):
        return "graph:" + ";".join(str(n.target) for n in value.graph.nodes)
    return repr(value) if isinstance(value, str | int | float | bool | None) else str(value)
