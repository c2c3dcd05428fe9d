"""Proves entries of the cached map with the program; the package docstring defines a proof.

Read it in this order: operands of a program (``operands_of``), engine weight names (``use_of``),
the :class:`Prover` that brings the two together, and entries of the cached map (``entry_of``).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch.export.graph_signature import InputKind

from refitkit.program.dtypes import dtype_name
from refitkit.program.liveness import submodules_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch.export import ExportedProgram
    from torch.fx import Node

    from refitkit.model import Leaf, PlanData, Slot


# -- operands of a program -----------------------------------------------------------------------

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
_BATCH_NORM_ROLES: tuple[Role, ...] = ("weight", "bias", "running_mean", "running_var")
_FOLDED: tuple[Role, ...] = ("scale", "shift")


@dataclass(frozen=True)
class Operand:
    """One operand of one operation.

    Attributes:
        use: The module, operation and role of the operand.
        fqns: Names of its parameters or buffers by role. A folded batch norm has weight, bias,
            running_mean and running_var, as far as the layer has them; any other operand has one
            name under its own role. None if the operand is computed.
        dtype: torch's name of the dtype, without the ``torch.``; empty if unknown.
        count: Number of elements; -1 if it is unknown or not fixed.
        eps: Epsilon of a batch norm; 0 for other operands.
    """

    use: Use
    fqns: Mapping[str, str] | None
    dtype: str
    count: int
    eps: float = 0.0


def operands_of(program: ExportedProgram) -> tuple[Operand, ...] | str:
    """All operands that can become engine weights with a known name form.

    Returns:
        The operands; or the reason as text, if the program has subgraphs.
    """
    nodes = list(program.graph.nodes)
    if any(submodules_of(node) for node in nodes):
        return "the program has subgraphs, and operands inside them are not tracked"
    leaves = {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind in {InputKind.PARAMETER, InputKind.BUFFER} and spec.target is not None
    }
    return tuple(operand for node in nodes for operand in _operands_of_node(node, leaves))


def _operands_of_node(node: Node, leaves: Mapping[str, str]) -> Iterator[Operand]:
    op = _OPS.get(_schema_name(node))
    if op is None:
        return
    arguments = _arguments_by_name(node)
    if op == "batch_norm":
        yield from _batch_norm(_module_of(node), arguments, leaves)
        return
    for role, argument in _ARGUMENTS[op]:
        value = arguments.get(argument)
        if isinstance(value, torch.fx.Node):
            # the converter of transposed convolutions makes another layer type (DECONVOLUTION)
            plain = not arguments.get("transposed") and "transpose" not in _schema_name(node)
            fqn = leaves.get(value.name) if plain else None
            fqns = None if fqn is None else {str(role): fqn}
            yield Operand(Use(_module_of(node), op, role), fqns, *_dtype_and_count(value))


def _batch_norm(
    module: str, arguments: Mapping[str, Any], leaves: Mapping[str, str]
) -> Iterator[Operand]:
    """The four operands as in 2.11, and scale and shift that 2.12 folds them to."""
    given = {role: arguments.get(role) for role in _BATCH_NORM_ROLES}
    nodes = {role: value for role, value in given.items() if isinstance(value, torch.fx.Node)}
    if "running_var" not in nodes:
        return  # the statistics are those of the batch, so no engine weight has them
    fixed = not arguments.get("training", False)
    fqns = {str(role): leaves[n.name] for role, n in nodes.items() if fixed and n.name in leaves}
    for role, node in nodes.items():
        one = {str(role): fqns[role]} if role in fqns else None
        yield Operand(Use(module, "batch_norm", role), one, *_dtype_and_count(node))
    dtype, count = _dtype_and_count(nodes["running_var"])
    # upstream adds missing operands as float32 (``batch_norm`` of normalization/ops.py)
    uniform = len(nodes) == len(_BATCH_NORM_ROLES) or dtype == "float32"
    plain = "running_mean" in nodes and len(fqns) == len(nodes) and uniform
    for role in _FOLDED:
        eps = float(arguments["eps"])
        use = Use(module, "batch_norm", role)
        yield Operand(use, fqns if plain else None, dtype, count, eps)


def _schema_name(node: Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""  # noqa: SLF001


def _arguments_by_name(node: Node) -> dict[str, Any]:
    """Arguments of a node by name, with the defaults of the op's schema."""
    schema = node.target._schema  # type: ignore[union-attr]  # noqa: SLF001 - an OpOverload
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def _module_of(node: Node) -> str:
    """Path of the innermost module, as in upstream's ``get_node_name`` (``converter_utils.py``)."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    return str(list(stack.values())[-1][0])


def _dtype_and_count(node: Node) -> tuple[str, int]:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return "", -1
    fixed = all(isinstance(size, int) for size in value.shape)
    return dtype_name(value.dtype), prod(value.shape) if fixed else -1


# -- engine weight names -------------------------------------------------------------------------

# The name forms are those of torch-tensorrt 2.11 and 2.12. ``to_trt_weights``
# (``converter_utils.py``) names the weights of layers, for example
# ``[CONVOLUTION]-[aten_ops.convolution.default]-[c/convolution] KERNEL``. Converters name
# constants, for example ``c/linear_1_weight CONSTANT``. Before the ``/`` is the node's innermost
# module, after it the node of the lowered graph.

Op = Literal["convolution", "batch_norm", "linear", "addmm", "embedding", "layer_norm"]
Role = Literal["weight", "bias", "running_mean", "running_var", "scale", "shift"]


@dataclass(frozen=True)
class Use:
    """The use of an operand.

    Attributes:
        module: Path of the innermost module; empty for the model itself.
        op: Name of the operation.
        role: Role of the operand in the operation. ``scale`` and ``shift`` belong to a folded batch
            norm.
    """

    module: str
    op: Op
    role: Role

    def __str__(self) -> str:
        return f"the {self.role} of {self.op} in {self.module or 'the model itself'!r}"


_BATCH_NORM = r"(?:_native_batch_norm_legit_no_training|native_batch_norm|batch_norm)"
_FORMS: tuple[tuple[Op, Role, str], ...] = (
    (
        "convolution",
        "weight",
        r"\[CONVOLUTION\]-\[aten_ops\.convolution\.default\]-\[{module}/convolution{n}\] KERNEL",
    ),
    (
        "convolution",
        "bias",
        r"\[CONVOLUTION\]-\[aten_ops\.convolution\.default\]-\[{module}/convolution{n}\] BIAS",
    ),
    (
        "batch_norm",
        "scale",
        rf"\[SCALE\]-\[aten_ops\.{_BATCH_NORM}\.default\]-\[{{module}}/{_BATCH_NORM}{{n}}\] SCALE",
    ),
    (
        "batch_norm",
        "shift",
        rf"\[SCALE\]-\[aten_ops\.{_BATCH_NORM}\.default\]-\[{{module}}/{_BATCH_NORM}{{n}}\] SHIFT",
    ),
    # 2.11 does not fold: TensorRT does it while it builds
    ("batch_norm", "weight", rf"{{module}}/{_BATCH_NORM}{{n}}_weight CONSTANT"),
    ("batch_norm", "bias", rf"{{module}}/{_BATCH_NORM}{{n}}_bias CONSTANT"),
    ("batch_norm", "running_mean", rf"{{module}}/{_BATCH_NORM}{{n}}_running_mean CONSTANT"),
    ("batch_norm", "running_var", rf"{{module}}/{_BATCH_NORM}{{n}}_running_var CONSTANT"),
    ("linear", "weight", r"{module}/linear{n}_weight CONSTANT"),
    ("linear", "bias", r"{module}/linear{n}_bias CONSTANT"),
    ("addmm", "weight", r"{module}/addmm{n}_mm_other CONSTANT"),
    ("addmm", "bias", r"{module}/addmm{n}_constant_0 CONSTANT"),
    ("embedding", "weight", r"{module}/embedding{n}_embedding_tensor CONSTANT"),
    ("layer_norm", "weight", r"{module}/native_layer_norm{n}_weight CONSTANT"),
    ("layer_norm", "bias", r"{module}/native_layer_norm{n}_bias CONSTANT"),
)
_PATTERNS = tuple(
    (op, role, re.compile(form.format(module=r"(?P<module>[^/\[\]]*)", n=r"(?:_\d+)?")))
    for op, role, form in _FORMS
)


def use_of(slot: str) -> Use | None:
    """The use that an engine weight's name describes; None if the name has no known form."""
    for op, role, pattern in _PATTERNS:
        found = pattern.fullmatch(slot)
        if found:
            return Use(found["module"], op, role)
    return None


Kind = tuple[Use, str, int]
"""Use, dtype and count. An operand and a slot match if no other one has the same kind."""


@dataclass(frozen=True)
class SlotProof:
    """The proven source of a slot's value.

    Attributes:
        operand: The operand that becomes the slot.
        leaves: Parameters and buffers that the operand consists of, by role.
    """

    operand: Operand
    leaves: Mapping[str, Leaf]


class Prover:
    """Proves slots one by one, with the facts of a program and a plan."""

    def __init__(self, operands: Sequence[Operand], plan: PlanData) -> None:
        """Group operands and slots by kind.

        Args:
            operands: All operands of the compiled program.
            plan: The plan, whose ledger has all slots of all engines.
        """
        self._operands: dict[Kind, list[Operand]] = defaultdict(list)
        for operand in operands:
            self._operands[operand.use, operand.dtype, operand.count].append(operand)
        self._slots = _count_kinds(row.slot for row in plan.ledger)
        self._leaves = {leaf.fqn: leaf for leaf in plan.leaves}
        self._tied_names = {name: frozenset(tie) for tie in plan.ties for name in tie}

    def prove(self, slot: Slot, entry: NameMapEntry) -> SlotProof | str:
        """The proof for one entry; or the reason as text, if something is missing."""
        use = use_of(slot.name)
        if use is None:
            return "its name has no form that belongs to an unchanged operand"
        operand = self._only_operand(use, slot)
        if isinstance(operand, str):
            return operand
        if operand.fqns is None:
            return f"{use} is computed; it is not a parameter or buffer"
        leaves = self._constant_leaves(operand.fqns, slot)
        if isinstance(leaves, str):
            return leaves
        contradiction = self._contradiction(entry, operand.fqns, slot)
        return contradiction or SlotProof(operand, leaves)

    def _only_operand(self, use: Use, slot: Slot) -> Operand | str:
        kind = (use, slot.dtype, slot.count)
        found = self._operands.get(kind, [])
        elements = f"{slot.count} elements of {slot.dtype}"
        if not found:
            return f"the program has no operand of {elements} as {use}"
        # several calls with the same operand are one candidate
        if any((one.fqns, one.eps) != (found[0].fqns, found[0].eps) for one in found):
            return f"the program has {len(found)} candidates of {elements} for {use}"
        # more slots than calls: one of them must come from somewhere else
        if self._slots[kind] > len(found):
            return f"{self._slots[kind]} slots of {elements} could be {use}"
        if any(_is_inner_candidate(use, kind, other) for other in self._operands):
            return f"inner modules also have candidates of {elements} for {use}"
        return found[0]

    def _constant_leaves(self, fqns: Mapping[str, str], slot: Slot) -> dict[str, Leaf] | str:
        leaves = {role: self._leaves[fqn] for role, fqn in fqns.items() if fqn in self._leaves}
        for role, fqn in fqns.items():
            leaf = leaves.get(role)
            if leaf is None:
                return f"the plan does not contain {fqn!r}"
            if leaf.mutated:
                return f"the program changes {fqn!r}"
            if leaf.dtype != slot.dtype:  # possible for a batch norm, whose four tensors can differ
                return f"{fqn!r} is {leaf.dtype}{list(leaf.shape)}, unlike the slot"
        return leaves

    def _contradiction(self, entry: NameMapEntry, fqns: Mapping[str, str], slot: Slot) -> str:
        if entry.dtype != slot.dtype:
            return f"its dtype is {entry.dtype} in the cached map, but {slot.dtype} in the engine"
        for fqn in fqns.values():
            if not self._tied_names.get(fqn, frozenset((fqn,))) & set(entry.fqns):
                claimed = ", ".join(map(repr, entry.fqns))
                return f"the cached map says {claimed}, the program {fqn!r}"
        return ""


def _count_kinds(slots: Iterable[Slot]) -> Counter[Kind]:
    kinds: Counter[Kind] = Counter()
    for slot in slots:
        use = use_of(slot.name)
        if use is not None:
            kinds[use, slot.dtype, slot.count] += 1
    return kinds


def _is_inner_candidate(use: Use, kind: Kind, other: Kind) -> bool:
    """Whether an operand of an inner module can have this name too.

    It has the same operation, role, dtype and count, and its module is inside the module of
    ``use``.
    """
    inner = other[0]
    matching = (inner.op, inner.role, *other[1:]) == (use.op, use.role, *kind[1:])
    prefix = f"{use.module}." if use.module else ""
    return matching and inner.module != use.module and inner.module.startswith(prefix)


# -- entries of the cached map -------------------------------------------------------------------

CONSTANTS = "constant_mapping"
"""Entry with old values by engine weight, without names; empty in 2.11 and 2.12."""
_DAMAGED = "its entry in the cached map is damaged"


@runtime_checkable
class HasNameMap(Protocol):
    """An engine that may have a cached weight name map."""

    @property
    def name_map(self) -> Mapping[str, Any] | None:
        """The map as upstream stores it; None if there is none. Callers must not change it."""


@dataclass(frozen=True)
class NameMapEntry:
    """The claim of the cached map about one engine weight.

    Attributes:
        fqns: Names of the sources; four for a folded batch norm.
        dtype: torch's name of the engine weight's dtype, without the ``torch.``.
    """

    fqns: tuple[str, ...]
    dtype: str


def entry_of(name_map: Mapping[str, Any], slot: str) -> NameMapEntry | str:
    """The entry of one engine weight; or the reason as text, if it cannot be used.

    The map can come from a file of another author, so every part of it is checked.

    Args:
        name_map: The cached map.
        slot: Engine weight name.
    """
    if slot not in name_map:
        constants = name_map.get(CONSTANTS)
        if isinstance(constants, Mapping) and slot in constants:
            return "the cached map has its old value, but not the name of its source"
        return "the cached map has no entry for it"
    found = name_map[slot]
    if not isinstance(found, list | tuple) or len(found) != 2:  # noqa: PLR2004 - name and dtype
        return _DAMAGED
    names, dtype = found  # (FQN or FQNs, dtype)
    return _parse_entry((names,) if isinstance(names, str) else names, dtype)


def _parse_entry(fqns: Any, dtype: Any) -> NameMapEntry | str:
    if fqns == ("",):
        return "torch-tensorrt found no source for it"
    if isinstance(fqns, tuple) and len(fqns) == 3:  # noqa: PLR2004 - name, dimension, index
        return "the cached map claims a slice of a buffer, which was found by its value only"
    if not isinstance(fqns, list | tuple) or not all(isinstance(fqn, str) for fqn in fqns):
        return _DAMAGED
    return NameMapEntry(tuple(fqns), _dtype_text(dtype))


def _dtype_text(dtype: Any) -> str:
    """The dtype's name. Maps that were read without importing torch have it as text already."""
    return str(dtype).removeprefix("torch.")
