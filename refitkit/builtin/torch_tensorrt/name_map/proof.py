"""Entries of the cached map against the program; see the package for what a proof is."""

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


# MERGED operands: Operands of the operations of a program, by the module in which they run.

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


# MERGED uses: Engine weight names, read: in which module, by which operation, as which operand.
#
# The forms are those of torch-tensorrt 2.11 and 2.12. ``to_trt_weights`` (``converter_utils.py``)
# names weights of layers ``[CONVOLUTION]-[aten_ops.convolution.default]-[c/convolution] KERNEL``;
# constants are named by their converters, as ``c/linear_1_weight CONSTANT``. Before the ``/``
# stands the innermost module of the node, behind it the node of the lowered graph.

Op = Literal["convolution", "batch_norm", "linear", "addmm", "embedding", "layer_norm"]
Role = Literal["weight", "bias", "running_mean", "running_var", "scale", "shift"]


@dataclass(frozen=True)
class Use:
    """Where an operand is used.

    Attributes:
        module: Path of the innermost module; empty for the model itself.
        op: The operation.
        role: What it is to the operation; ``scale`` and ``shift`` are the two of a folded batch
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
    # 2.11 leaves the folding to TensorRT
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
    """What an engine weight's name says; None where it has none of the known forms."""
    for op, role, pattern in _PATTERNS:
        found = pattern.fullmatch(slot)
        if found:
            return Use(found["module"], op, role)
    return None


Kind = tuple[Use, str, int]
"""Use, dtype and count: what one operand and one slot must have for themselves alone."""


@dataclass(frozen=True)
class SlotProof:
    """Where the value of a slot comes from, beyond doubt.

    Attributes:
        operand: The operand that the slot is.
        leaves: What it is made of, by role.
    """

    operand: Operand
    leaves: Mapping[str, Leaf]


class Prover:
    """Holds what the program and the plan say; asked for one slot after another."""

    def __init__(self, operands: Sequence[Operand], plan: PlanData) -> None:
        """Sort the operands and slots by what tells them apart.

        Args:
            operands: All operands of the program that was compiled.
            plan: The plan, whose ledger has all slots of all engines.
        """
        self._operands: dict[Kind, list[Operand]] = defaultdict(list)
        for operand in operands:
            self._operands[operand.use, operand.dtype, operand.count].append(operand)
        self._slots = _count_kinds(row.slot for row in plan.ledger)
        self._leaves = {leaf.fqn: leaf for leaf in plan.leaves}
        self._twins = {name: frozenset(tie) for tie in plan.ties for name in tie}

    def prove(self, slot: Slot, entry: NameMapEntry) -> SlotProof | str:
        """The proof for one entry; or what is missing."""
        use = use_of(slot.name)
        if use is None:
            return "its name does not tell which operand it is unchanged"
        operand = self._only_operand(use, slot)
        if isinstance(operand, str):
            return operand
        if operand.fqns is None:
            return f"{use} is computed, not a parameter itself"
        leaves = self._constant_leaves(operand.fqns, slot)
        if isinstance(leaves, str):
            return leaves
        wrong = self._contradiction(entry, operand.fqns, slot)
        return wrong or SlotProof(operand, leaves)

    def _only_operand(self, use: Use, slot: Slot) -> Operand | str:
        kind = (use, slot.dtype, slot.count)
        found = self._operands.get(kind, [])
        what = f"{slot.count} elements of {slot.dtype}"
        if not found:
            return f"the program has nothing of {what} as {use}"
        if any((one.fqns, one.eps) != (found[0].fqns, found[0].eps) for one in found):
            return f"the program has {len(found)} candidates of {what} for {use}"
        if self._slots[kind] > len(found):
            return f"{self._slots[kind]} slots of {what} could be {use}"
        if any(_is_inside(use, kind, other) for other in self._operands):
            return f"modules inside have candidates of {what} too for {use}"
        return found[0]

    def _constant_leaves(self, fqns: Mapping[str, str], slot: Slot) -> dict[str, Leaf] | str:
        leaves = {role: self._leaves[fqn] for role, fqn in fqns.items() if fqn in self._leaves}
        for role, fqn in fqns.items():
            leaf = leaves.get(role)
            if leaf is None:
                return f"the plan does not know {fqn!r}"
            if leaf.mutated:
                return f"the program changes {fqn!r}"
            if leaf.dtype != slot.dtype:  # one of the four of a batch norm
                return f"{fqn!r} is {leaf.dtype}{list(leaf.shape)}, unlike the slot"
        return leaves

    def _contradiction(self, entry: NameMapEntry, fqns: Mapping[str, str], slot: Slot) -> str:
        if entry.dtype != slot.dtype:
            return f"the cached map has it as {entry.dtype}, the engine as {slot.dtype}"
        for fqn in fqns.values():
            if not self._twins.get(fqn, frozenset((fqn,))) & set(entry.fqns):
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


def _is_inside(use: Use, kind: Kind, other: Kind) -> bool:
    """Whether another operand could have got this name: alike, and in a module inside."""
    inner = other[0]
    alike = (inner.op, inner.role, *other[1:]) == (use.op, use.role, *kind[1:])
    prefix = f"{use.module}." if use.module else ""
    return alike and inner.module != use.module and inner.module.startswith(prefix)


# MERGED entries: The cached map, read. It comes out of other people's files: nothing in it is
# taken on trust.

CONSTANTS = "constant_mapping"
"""Entry that holds old values by engine weight, not names; empty in 2.11 and 2.12."""
_DAMAGED = "its entry in the cached map is damaged"


@runtime_checkable
class HasNameMap(Protocol):
    """An engine that may have a cached map."""

    @property
    def name_map(self) -> Mapping[str, Any] | None:
        """The map as upstream stores it; None where there is none. Not to be changed."""


@dataclass(frozen=True)
class NameMapEntry:
    """What the map claims of one engine weight.

    Attributes:
        fqns: Names of its sources; four for a folded batch norm.
        dtype: torch's name of the engine weight's dtype, without the ``torch.``.
    """

    fqns: tuple[str, ...]
    dtype: str


def entry_of(name_map: Mapping[str, Any], slot: str) -> NameMapEntry | str:
    """The entry of one engine weight; or why there is none that could be used."""
    if slot not in name_map:
        constants = name_map.get(CONSTANTS)
        if isinstance(constants, Mapping) and slot in constants:
            return "the cached map has its old value, and not where that comes from"
        return "the cached map does not have it"
    found = name_map[slot]
    if not isinstance(found, list | tuple) or len(found) != 2:  # noqa: PLR2004 - name and dtype
        return _DAMAGED
    names, dtype = found
    return _entry((names,) if isinstance(names, str) else names, dtype)


def _entry(fqns: Any, dtype: Any) -> NameMapEntry | str:
    if fqns == ("",):
        return "upstream found nothing that it could come from"
    if isinstance(fqns, tuple) and len(fqns) == 3:  # noqa: PLR2004 - name, dimension, index
        return "the cached map takes it for a slice of a buffer, found by its value"
    if not isinstance(fqns, list | tuple) or not all(isinstance(fqn, str) for fqn in fqns):
        return _DAMAGED
    return NameMapEntry(tuple(fqns), _dtype_of(dtype))


def _dtype_of(dtype: Any) -> str:
    """Maps hold ``torch.float32``; as text where metadata was read without importing torch."""
    return str(dtype).removeprefix("torch.")
