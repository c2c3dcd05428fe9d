"""Which inputs of a graph its ops write to, directly, through views, or inside submodules.

``torch.export`` leaves in-place ops as they were written, and puts regions such as
``torch.no_grad()`` into submodules; a decomposed program lists what it writes back in its
signature. Where an exact answer would need more than schemas, the answer errs towards "written":
that costs a copy, the other error would change a caller's tensors.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.export import ExportedProgram


_IN_TRAINING = {
    "aten::batch_norm": "training",
    "aten::native_batch_norm": "training",
    "aten::cudnn_batch_norm": "training",
    "aten::miopen_batch_norm": "training",
    "aten::instance_norm": "use_input_stats",
}
"""Ops that update ``running_mean`` and ``running_var`` unless this flag is False.

Their schemas in ``aten/src/ATen/native/native_functions.yaml`` do not say so.
"""


_QUIET_ALIASES = frozenset(
    f"aten::{name}"
    for name in (
        "alpha_dropout",
        "atleast_1d",
        "atleast_2d",
        "atleast_3d",
        "broadcast_tensors",
        "dropout",
        "einsum",
        "feature_dropout",
        "meshgrid",
        "sum_to_size",
        "type_as",
    )
)
"""Ops that may give back their input itself, or a view of it, which their schemas do not say."""


def mutated_placeholders(program: ExportedProgram) -> set[str]:
    """Names of the placeholders of a program that it changes in place."""
    signature = program.graph_signature
    by_target = {spec.target: spec.arg.name for spec in signature.input_specs if spec.target}
    listed = [
        *signature.buffers_to_mutate.values(),
        *getattr(signature, "parameters_to_mutate", {}).values(),
    ]
    return {by_target[fqn] for fqn in listed} | _written(program.graph_module)


def submodules_of(node: torch.fx.Node) -> list[torch.fx.GraphModule]:
    """Graphs that a node calls: the branches of a condition, the body of a region."""
    owner = node.graph.owning_module
    found = (
        getattr(owner, str(argument.target), None)
        for argument in node.all_input_nodes
        if argument.op == "get_attr"
    )
    return [module for module in found if isinstance(module, torch.fx.GraphModule)]


def _written(module: torch.fx.GraphModule) -> set[str]:
    found: set[str] = set()
    for node in module.graph.nodes:
        for argument in written_arguments(node):
            found |= _roots(argument)
    return found


def written_arguments(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Arguments that a call writes to."""
    for argument, value in arguments_of(node):
        if argument.alias_info is not None and argument.alias_info.is_write:
            values = value if isinstance(value, list | tuple) else [value]
            yield from (v for v in values if isinstance(v, torch.fx.Node))
    yield from _running_statistics(node)
    if any(_written(module) for module in submodules_of(node)):
        yield from node.all_input_nodes


def _running_statistics(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    flag = _IN_TRAINING.get(getattr(getattr(node.target, "_schema", None), "name", ""))
    if flag is None:
        return
    given = {argument.name: value for argument, value in arguments_of(node)}
    if given.get(flag) is not False:
        names = ("running_mean", "running_var")
        yield from (given[n] for n in names if isinstance(given.get(n), torch.fx.Node))


def arguments_of(node: torch.fx.Node) -> Iterator[tuple[Any, Any]]:
    """(schema argument, value) of a call of an op."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            yield argument, node.args[position]
        elif argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]


def aliased_inputs(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Nodes whose memory the result of a node may share."""
    quiet = getattr(getattr(node.target, "_schema", None), "name", "") in _QUIET_ALIASES
    if quiet or node.target is operator.getitem or submodules_of(node):
        yield from node.all_input_nodes
    for argument, value in arguments_of(node):
        if argument.alias_info is not None and isinstance(value, torch.fx.Node):
            yield value


def _roots(node: torch.fx.Node) -> set[str]:
    """Placeholders whose memory a node may share."""
    found: set[str] = set()
    stack, seen = [node], set[torch.fx.Node]()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            found.add(current.name)
        stack += aliased_inputs(current)
    return found
