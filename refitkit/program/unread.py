"""Which tensors of a program have values that nothing depends on, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.program.facts import facts_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.export import ExportedProgram
    from torch.fx import Node

_OF_FIRST = frozenset(
    f"aten.{name}"
    for name in (
        *("empty_like", "full_like", "ones_like", "zeros_like", "rand_like", "randn_like"),
        *("new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros"),
        *("size", "stride", "numel", "dim", "is_contiguous", "is_same_size"),
        *("sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "sym_is_contiguous"),
        "_assert_tensor_metadata",
    )
)
"""Ops that read the shape and dtype of their first operand, never its values."""
_OF_SECOND = frozenset(
    {"aten.type_as", "aten.expand_as", "aten.view_as", "aten.reshape_as", "aten.to.other"}
)
"""The same of their second operand."""
_ON_SHAPE = "the program reads its shape and dtype only"
_ON_DEAD = "nothing that the program returns depends on its values"


def unread(program: ExportedProgram) -> dict[str, str]:
    """Why the values of some tensors do not matter, by FQN.

    A tensor is named where the graph uses it, and no output and no effect depends on its values.
    """
    graph = program.graph
    roots = [node for node in graph.nodes if node.op == "output" or _has_effect(node)]
    alive = set(roots)
    while roots:
        for below in _read_by(roots.pop()):
            if below not in alive:
                alive.add(below)
                roots.append(below)
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    nodes = {
        spec.target: placeholders[spec.arg.name]
        for spec in program.graph_signature.input_specs
        if getattr(spec.arg, "name", None) in placeholders
    }
    return {
        leaf.fqn: _ON_SHAPE if alive.intersection(nodes[leaf.fqn].users) else _ON_DEAD
        for leaf in facts_of(program).leaves
        if leaf.used and nodes[leaf.fqn] not in alive
    }


def _has_effect(node: Node) -> bool:
    return node.op not in {"placeholder", "output"} and node.is_impure() and not _only_asserts(node)


def _only_asserts(node: Node) -> bool:
    return str(node.target).startswith("aten._assert_tensor_metadata")


def _read_by(node: Node) -> Iterator[Node]:
    """The nodes whose values a node reads."""
    name = str(node.target)
    short = name.rpartition(".")[0] if name.count(".") > 1 else name
    blind = 0 if short in _OF_FIRST else 1 if {name, short} & _OF_SECOND else None
    if node.op != "call_function" or blind is None:
        yield from node.all_input_nodes
        return
    skipped = node.args[blind] if len(node.args) > blind else None
    yield from (one for one in node.all_input_nodes if one is not skipped)
