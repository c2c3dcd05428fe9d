"""Operands of the operations of a program, by the module in which they run."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import InputKind

from refitkit.builtin.torch_tensorrt.name_map.uses import Op, Role, Use
from refitkit.program.dtypes import dtype_name
from refitkit.program.mutation import submodules_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.export import ExportedProgram
    from torch.fx import Node

_CONVOLUTIONS = (
    "aten::convolution",
    "aten::conv1d",
    "aten::conv2d",
    "aten::conv3d",
    "aten::conv_transpose1d",
    "aten::conv_transpose2d",
    "aten::conv_transpose3d",
)
_OPS: Mapping[str, Op] = {
    **dict.fromkeys(_CONVOLUTIONS, "convolution"),
    "aten::batch_norm": "batch_norm",
    "aten::_native_batch_norm_legit_no_training": "batch_norm",
    "aten::linear": "linear",
    "aten::addmm": "addmm",
    "aten::embedding": "embedding",
    "aten::layer_norm": "layer_norm",
    "aten::native_layer_norm": "layer_norm",
}
_ARGUMENTS: Mapping[Op, tuple[tuple[Role, str], ...]] = {
    "convolution": (("weight", "weight"), ("bias", "bias")),
    "linear": (("weight", "weight"), ("bias", "bias")),
    "addmm": (("bias", "self"), ("weight", "mat2")),
    "embedding": (("weight", "weight"),),
    "layer_norm": (("weight", "weight"), ("bias", "bias")),
}
_STATISTICS: tuple[Role, ...] = ("weight", "bias", "running_mean", "running_var")
_FOLDED: tuple[Role, ...] = ("scale", "shift")


@dataclass(frozen=True)
class Operand:
    """One operand of one operation.

    Attributes:
        use: Where it is used.
        fqns: The parameters or buffers that it is, by role: one under its own role, or for a
            folded batch norm weight, bias, running_mean and running_var, as far as it has them.
            None where it is computed, so that nobody can say here what it will be.
        dtype: torch's name without the ``torch.``.
        count: Number of elements; -1 where that is not fixed.
        eps: Epsilon of a batch norm.
    """

    use: Use
    fqns: Mapping[str, str] | None
    dtype: str
    count: int
    eps: float = 0.0


def operands_of(program: ExportedProgram) -> tuple[Operand, ...] | str:
    """All operands that engine weights of known names can come from; or why nobody can tell."""
    nodes = list(program.graph.nodes)
    if any(submodules_of(node) for node in nodes):
        return "the program has inner graphs, in which operands cannot be followed"
    leaves = {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind in {InputKind.PARAMETER, InputKind.BUFFER} and spec.target is not None
    }
    return tuple(operand for node in nodes for operand in _of(node, leaves))


def _of(node: Node, leaves: Mapping[str, str]) -> Iterator[Operand]:
    op = _OPS.get(_schema_name(node))
    if op is None:
        return
    arguments = _bound(node)
    if op == "batch_norm":
        yield from _batch_norm(_module_of(node), arguments, leaves)
        return
    for role, argument in _ARGUMENTS[op]:
        value = arguments.get(argument)
        if isinstance(value, torch.fx.Node):
            # upstream's converter for transposed convolutions has a layer type of its own
            plain = not arguments.get("transposed") and "transpose" not in _schema_name(node)
            fqn = leaves.get(value.name) if plain else None
            fqns = None if fqn is None else {str(role): fqn}
            yield Operand(Use(_module_of(node), op, role), fqns, *_facts(value))


def _batch_norm(
    module: str, arguments: Mapping[str, Any], leaves: Mapping[str, str]
) -> Iterator[Operand]:
    """The four operands, as 2.11 has them, and what 2.12 folds them to."""
    given = {role: arguments.get(role) for role in _STATISTICS}
    nodes = {role: value for role, value in given.items() if isinstance(value, torch.fx.Node)}
    if "running_var" not in nodes:
        return  # statistics of the batch: no engine weight holds them
    fixed = not arguments.get("training", False)
    fqns = {str(role): leaves[n.name] for role, n in nodes.items() if fixed and n.name in leaves}
    for role, node in nodes.items():
        one = {str(role): fqns[role]} if role in fqns else None
        yield Operand(Use(module, "batch_norm", role), one, *_facts(node))
    dtype, count = _facts(nodes["running_var"])
    # what a layer lacks is float32, whatever the rest is (``batch_norm`` of normalization/ops.py)
    uniform = len(nodes) == len(_STATISTICS) or dtype == "float32"
    plain = "running_mean" in nodes and len(fqns) == len(nodes) and uniform
    for role in _FOLDED:
        eps = float(arguments["eps"])
        use = Use(module, "batch_norm", role)
        yield Operand(use, fqns if plain else None, dtype, count, eps)


def _schema_name(node: Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""  # noqa: SLF001


def _bound(node: Node) -> dict[str, Any]:
    """Arguments by name."""
    schema = node.target._schema  # type: ignore[union-attr]  # noqa: SLF001 - an OpOverload
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def _module_of(node: Node) -> str:
    """Path of the innermost module, as ``get_node_name`` of ``converter_utils.py`` takes it."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    return str(list(stack.values())[-1][0])


def _facts(node: Node) -> tuple[str, int]:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return "", -1
    fixed = all(isinstance(size, int) for size in value.shape)
    return dtype_name(value.dtype), prod(value.shape) if fixed else -1
