"""Where a recorded value comes from: a graph of ops over leaves, literals and unknowns.

This module hides the data structure that a recording builds. A tape creates the nodes
(:mod:`refitkit.recipe.tape`), and a writer turns them into recipes (:mod:`refitkit.recipe.writer`).

Read it in this order: the nodes and :class:`Origin`; then the walks over the graph; then
:class:`Lineage`, which knows the leaves that a value depends on; then the questions about how a
value lay in memory.

A leaf is a parameter, buffer or constant of the program.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch

from refitkit.model import Tensor
from refitkit.program.dtypes import dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from refitkit.model import Leaf


# -- nodes ------------------------------------------------------------------------------------


# Nodes compare by identity: two calls of one op on the same operands are two nodes.
@dataclass(eq=False)
class LeafOrigin:
    """A parameter, buffer or constant of the program.

    Attributes:
        fqn: Fully qualified name of the leaf.
    """

    fqn: str


@dataclass(eq=False)
class Literal:
    """A tensor built from Python or NumPy numbers, by the graph or by a converter.

    Attributes:
        value: A copy of the tensor.
        exports: NumPy arrays on tensors' memory that the numbers may have been read from.
        seen: Whether the numbers are no values of a weight: a random op made them, or a formula
            that a converter declares has them. Of others nobody knows where they were before.
    """

    value: torch.Tensor
    exports: tuple[ArrayExport, ...] = ()
    seen: bool = False

    @property
    def may_hold_weights(self) -> bool:
        """Whether the numbers may be values of a weight that code read unseen.

        One distinct number is an epsilon or a mask, and integers are indices, in almost all models.
        """
        value = self.value
        if self.seen or not value.is_floating_point() or value.numel() < _FEW:
            return False
        flat = value.reshape(-1).double()
        return bool((flat[0] != flat).any())


@dataclass(eq=False)
class Unknown:
    """A value that the recording did not see being computed.

    Attributes:
        reason: Why the origin is unknown, as a clause for error messages.
        declared: FQNs of the leaves that a converter declares the value to be made of.
    """

    reason: str
    declared: frozenset[str] = frozenset()


@dataclass(eq=False)
class Call:
    """One recorded call of an op.

    Attributes:
        op: Overload that was called, or :data:`ORDERED`.
        args: Arguments of the op. Each tensor is replaced by its :class:`Origin`.
        kwargs: Keyword arguments of the op, with the same replacement.
        results: Dtype and shape of each result. If the op writes in place: of each written operand.
        device: Device type that the op ran on, such as ``cuda``.
        inputs: Origins of all tensors among the arguments, then ``numbers``.
        numbers: Origins that the Python numbers among the arguments may have been read from.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[Tensor, ...]
    device: str
    inputs: tuple[Origin, ...] = field(default=())
    numbers: tuple[Origin, ...] = field(default=())


class Origin(NamedTuple):
    """Where one tensor comes from.

    Attributes:
        node: Node that produced the tensor.
        output: Index of the tensor among the node's results.
        contiguous: Whether the elements lay one after another in memory, in logical order.
        order: Dimensions in their order in memory, slowest first. None if that is the logical order
            or if the elements had gaps between them.
    """

    node: LeafOrigin | Literal | Unknown | Call
    output: int
    contiguous: bool
    order: tuple[int, ...] | None = None


_FEW = 2
"""Smallest number of elements of a literal that may hold a weight."""


# -- values that left the recording -----------------------------------------------------------


@dataclass(frozen=True)
class HostRead:
    """A tensor value that code outside torch's ops read or could read. It becomes a guard.

    Attributes:
        origin: Where the value came from.
        reason: How the value was used, such as ``converted to a list``.
        sha256: sha256 of the value's bytes.
        metadata: Dtype and shape of the value.
        shown: Value as text. Empty if the value is too large to show.
    """

    origin: Origin
    reason: str
    sha256: str
    metadata: Tensor
    shown: str


@dataclass
class ArrayExport:
    """A NumPy array on a tensor's memory that the recorded code received.

    Attributes:
        read: Value of the array, as the guard to write if the array was read.
        returned: Whether the array came back, as a tensor or as the weight of a layer.
        possibly_read: Whether the array may have been read before it came back.
        elements: Fractions in the array. Empty if only trusted code received it.
    """

    read: HostRead
    returned: bool = False
    possibly_read: bool = False
    elements: frozenset[float] = frozenset()

    @property
    def only_passed_on(self) -> bool:
        """Whether the array counts as passed on and not as read, so that it needs no guard."""
        return self.returned and not self.possibly_read


# -- walks over the graph ---------------------------------------------------------------------


def depends_on_leaf(origin: Origin) -> bool:
    """Return whether a value depends on a leaf or on an unknown value."""
    return bool(leaves_below(origin))


def leaves_below(origin: Origin) -> frozenset[str | None]:
    """Return the FQNs of all leaves that a value is computed from; None stands for an unknown."""
    names: set[str | None] = set()
    stack, seen = [origin.node], set[int]()
    while stack:
        node = stack.pop()
        if isinstance(node, LeafOrigin):
            names.add(node.fqn)
        elif isinstance(node, Unknown):
            names |= node.declared or {None}
        elif isinstance(node, Call) and id(node) not in seen:  # operands are often shared
            seen.add(id(node))
            stack += [below.node for below in node.inputs]
    return frozenset(names)


def postorder(origin: Origin, is_known: Callable[[Origin], bool]) -> Iterator[Origin]:
    """Yield the call results that a value is computed from, operands first, without the value.

    Args:
        origin: Value to start from.
        is_known: Returns whether to skip a call result and everything below it.
    """
    # Chains of thousands of ops are common, so this walk must not recurse.
    stack, seen = [(origin, False)], set[tuple[int, int]]()
    while stack:
        one, ready = stack.pop()
        key = id(one.node), one.output
        if ready:
            yield one
        elif isinstance(one.node, Call) and key not in seen and not is_known(one):
            seen.add(key)
            if one is not origin:
                stack.append((one, True))
            stack += [(below, False) for below in one.node.inputs]


def metadata_of(origin: Origin, leaves: Mapping[str, Leaf]) -> Tensor:
    """Return the dtype and shape of a recorded value.

    Args:
        origin: Where the value comes from.
        leaves: All leaves of the program, by FQN.

    Raises:
        TypeError: The origin is :class:`Unknown`.
    """
    node = origin.node
    if isinstance(node, Call):
        return node.results[origin.output]
    if isinstance(node, LeafOrigin):
        leaf = leaves[node.fqn]
        return Tensor(dtype=leaf.dtype, shape=leaf.shape)
    if isinstance(node, Literal):
        return metadata_of_tensor(node.value)
    raise TypeError(type(node))


def metadata_of_tensor(tensor: torch.Tensor) -> Tensor:
    """Return the dtype and shape of a tensor."""
    return Tensor(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))


# -- leaves that a value depends on -----------------------------------------------------------

_METADATA_ONLY = frozenset(
    f"aten.{name}"
    for name in (
        "empty_like.default",
        "full_like.default",
        "new_empty.default",
        "new_empty_strided.default",
        "new_full.default",
        "new_ones.default",
        "new_zeros.default",
        "ones_like.default",
        "zeros_like.default",
    )
)
"""Ops that use the dtype and shape of their operand and ignore its values."""


_MAY_BE_READ = (
    "its numbers also occur in a NumPy array of a weight that third-party code received, and that "
    "code may have read them there"
)


class UnwritableError(Exception):
    """Raised if no recipe for a value can be written; the message is the reason."""


class Lineage:
    """The leaves that the values of one recording depend on."""

    def __init__(self) -> None:
        """Start without results; each value is looked up once."""
        self._leaves: dict[Call, frozenset[str]] = {}

    def leaves_of(self, origin: Origin) -> frozenset[str]:
        """Return the FQNs of the leaves whose values decide a value.

        Raises:
            UnwritableError: The value depends on an unknown value, or on a literal whose numbers
                may have been read from a weight.
        """
        # Results below are cached first, so that the recursion in _find is one level deep. An
        # unknown below is not an error here: its values may not matter for any op that uses it.
        for below in postorder(origin, lambda one: one.node in self._leaves):
            with suppress(UnwritableError):
                self._find(below)
        return self._find(origin)

    def _find(self, origin: Origin) -> frozenset[str]:
        node = origin.node
        if isinstance(node, Unknown):
            what = "" if node.declared else "its source weights are unknown: "
            raise UnwritableError(what + node.reason)
        if isinstance(node, LeafOrigin):
            return frozenset({node.fqn})
        if isinstance(node, Literal):
            if any(export.only_passed_on for export in node.exports):
                raise UnwritableError(_MAY_BE_READ)
            return frozenset()
        names = self._leaves.get(node)
        if names is None:
            names = frozenset[str]().union(*map(self._find, _value_operands(node)))
            self._leaves[node] = names
        return names


def unseen_literals(origin: Origin) -> Iterator[Literal]:
    """Yield the literals that a value is computed from and that may hold values of a weight."""
    stack, seen = [origin.node], set[int]()
    while stack:
        node = stack.pop()
        if id(node) in seen:  # operands are often shared
            continue
        seen.add(id(node))
        if isinstance(node, Literal) and node.may_hold_weights:
            yield node
        elif isinstance(node, Call):
            stack += [below.node for below in _value_operands(node)]


def reads_first_operand(call: Call) -> bool:
    """Return whether a call uses the values of its first operand, not only dtype and shape."""
    # copy_ overwrites its first operand.
    return call.op is not _aten.copy_.default and str(call.op) not in _METADATA_ONLY


def _value_operands(call: Call) -> Sequence[Origin]:
    """Return the operands whose values decide the result."""
    if reads_first_operand(call):
        return call.inputs
    return [one for one in (*call.args[1:2], *call.numbers) if isinstance(one, Origin)]


# -- how values lie in memory -----------------------------------------------------------------

_aten = torch.ops.aten
_STRIDE_DEPENDENT = {
    _aten.as_strided.default,
    _aten.as_strided_scatter.default,
    _aten.view.dtype,
    _aten.view_as_complex.default,
    _aten.view_as_real.default,
}
"""Ops whose result depends on the strides of their first argument."""
_ANY_STRIDES = {_aten.view_as_real.default}
"""Stride-dependent ops that accept all strides but no lazy conjugate or negative bit."""
RESHAPES = {
    _aten.view.default,
    _aten._unsafe_view.default,  # noqa: SLF001 - the op's name
    _aten.reshape.default,
    _aten._reshape_alias.default,  # noqa: SLF001 - the op's name
}
"""Ops that return their first argument in another shape."""
ORDERED = "in order"
"""Op of a :class:`Call` that no recording contains. It makes its first argument contiguous in the
order of dimensions that is its second argument; None is the logical order."""


def is_stride_dependent(op: Any) -> bool:
    """Return whether the result of an op depends on the strides of its first argument."""
    return op in _STRIDE_DEPENDENT


def needs_contiguous(op: Any) -> bool:
    """Return whether a stride-dependent op needs a contiguous first argument in a recipe."""
    return op not in _ANY_STRIDES


def resolved_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as contiguous memory without lazy conjugate or negative bits."""
    return tensor.resolve_conj().resolve_neg().contiguous()


def on_ordered_base(origin: Origin, lineage: Lineage, leaves: Mapping[str, Leaf]) -> Origin:
    """Return the same view, of a base that is contiguous in its recorded order of dimensions.

    A value that depends on no leaf is returned unchanged, as plans store it.

    Args:
        origin: Recorded value.
        lineage: Lineage of the recording.
        leaves: All leaves of the program, by FQN.

    Raises:
        UnwritableError: The leaves that the value depends on are unknown.
    """
    node = origin.node
    if not lineage.leaves_of(origin):
        return origin
    if _is_view_call(node):
        below = on_ordered_base(node.args[0], lineage, leaves)
        view = replace(node, args=(below, *node.args[1:]), inputs=(below, *node.inputs[1:]))
        return origin._replace(node=view)
    device = node.device if isinstance(node, Call) else "cpu"
    metadata = (metadata_of(origin, leaves),)
    ordered = Call(ORDERED, (origin, origin.order), {}, metadata, device, (origin,))
    return origin._replace(node=ordered, output=0)


def has_dense_base(origin: Origin) -> bool:
    """Return whether a value is a view of memory without gaps, which a recipe can rebuild.

    Recordings and recipes make all other operands contiguous.
    """
    # Views of the base are taken again in a replay, so only the base must be free of gaps.
    while _is_view_call(origin.node):
        origin = origin.node.args[0]
    return origin.contiguous or origin.order is not None


def is_whole(origin: Origin) -> bool:
    """Return whether a value is contiguous and covers all of its memory."""
    if not origin.contiguous:
        return False
    while _is_view_call(origin.node) and origin.node.op in RESHAPES:
        origin = origin.node.args[0]
    return origin.contiguous and not _is_view_call(origin.node)


def _is_view_call(node: object) -> TypeGuard[Call]:
    return isinstance(node, Call) and node.op is not ORDERED and is_view(node.op)


def is_view(op: Any) -> bool:
    """Return whether an op returns a view of its first argument and writes nothing."""
    # A view op declares an alias of its first argument, and an in-place op a written alias.
    first, *_ = op._schema.arguments  # noqa: SLF001 - there is no public name
    return first.alias_info is not None and not first.alias_info.is_write
