"""Ops whose results have torch's default dtype, and how a graph keeps the one of its export.

``torch.ones(3)`` and the quotient of two integers have the default dtype. Exported graphs leave it
out, so they would compute in whatever the process has set when they run. That cannot be changed
for one thread: other threads would get it, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

_WHERE = torch.ops.aten.where


def keep_default_dtype(module: torch.fx.GraphModule) -> None:
    """Have all ops of a graph give the dtypes that they had in the export, whatever is set.

    Args:
        module: From an exported program, with the values of its export (``meta["val"]``). Changed.
    """
    for one in module.modules():
        if isinstance(one, torch.fx.GraphModule):
            nodes = [node for node in one.graph.nodes if _has_default_dtype(node)]
            for node in nodes:
                _keep(node)
            if nodes:
                one.recompile()


def _has_default_dtype(node: torch.fx.Node) -> bool:
    """Whether a node gives fractions, and neither operands nor arguments say in which dtype."""
    if not isinstance(node.target, OpOverload) or not _is_fractional(node):
        return False
    if any(map(_is_fractional, node.all_input_nodes)):
        return False
    return _argument(node, "dtype") is None


def _is_fractional(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    several = value if isinstance(value, list | tuple) else [value]
    tensors = [one for one in several if isinstance(one, torch.Tensor)]
    return any(one.is_floating_point() or one.is_complex() for one in tensors)


def _argument(node: torch.fx.Node, name: str) -> Any:
    places = {a.name: place for place, a in enumerate(node.target._schema.arguments)}  # type: ignore[union-attr]  # noqa: SLF001
    place = places.get(name, len(node.args))
    return node.args[place] if place < len(node.args) else node.kwargs.get(name)


def _keep(node: torch.fx.Node) -> None:
    dtype = node.meta["val"].dtype if isinstance(node.meta["val"], torch.Tensor) else None
    op = node.target
    if dtype is None or not isinstance(op, OpOverload):
        return
    if any(argument.name == "dtype" for argument in op._schema.arguments):  # noqa: SLF001
        node.kwargs = {**node.kwargs, "dtype": dtype}
    elif op is _WHERE.Scalar:
        condition, *numbers = node.args
        made = [_inserted(node, torch.ops.aten.scalar_tensor.default, n, dtype) for n in numbers]
        node.target, node.args = _WHERE.self, (condition, *made)
    elif torch.Tag.pointwise in op.tags:  # which computes in the dtype of its operands
        for operand in node.all_input_nodes:
            if isinstance(operand.meta.get("val"), torch.Tensor):
                cast = _inserted(node, torch.ops.aten._to_copy.default, operand, dtype)  # noqa: SLF001
                node.replace_input_with(operand, cast)


def _inserted(before: torch.fx.Node, op: OpOverload, value: Any, dtype: torch.dtype) -> Any:
    with before.graph.inserting_before(before):
        return before.graph.call_function(op, (value,), {"dtype": dtype})
