"""Where values come from, as a recording knows it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeGuard

import torch

from refitkit.model import Tensor
from refitkit.program.dtypes import dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from refitkit.model import Leaf


class Loan(Protocol):
    """An array on a tensor's memory that was given out; see :mod:`refitkit.recipe.memories`."""

    @property
    def only_passed_on(self) -> bool:
        """Whether it counts as passed on and not as read."""


@dataclass(eq=False)
class LeafOrigin:
    """A parameter, buffer or constant of the program."""

    fqn: str


@dataclass(eq=False)
class Literal:
    """A tensor made of what is no tensor: numbers of the graph, or of a converter.

    Attributes:
        value: It; a copy.
        loans: Arrays on tensors' memory that its numbers may have been read from.
    """

    value: torch.Tensor
    loans: tuple[Loan, ...] = ()


@dataclass(eq=False)
class Unknown:
    """Nobody saw where it came from.

    Attributes:
        reason: What is known.
    """

    reason: str


@dataclass(eq=False)
class Call:
    """A call of an op.

    Attributes:
        op: The overload that was called.
        args: Its arguments; tensors as ``Origin``.
        kwargs: Its keyword arguments, likewise.
        results: Dtype and shape of its results; of an op that writes, of what it has written.
        device: Kind of device that it ran on.
        inputs: The tensors among its arguments, and what its numbers may have been read from.
        numbers: The latter.
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
        node: What made it.
        output: Which of the node's results it is.
        contiguous: Whether its elements lay one after another in memory.
        order: Its dimensions in the order in which they lay in memory, slowest first, if that is
            not their own order and there were no gaps.
    """

    node: LeafOrigin | Literal | Unknown | Call
    output: int
    contiguous: bool
    order: tuple[int, ...] | None = None


def follows_from_leaf(origin: Origin) -> bool:
    """Whether a leaf, or nobody knows what, is among what a value is made of."""
    return bool(leaves_below(origin))


def leaves_below(origin: Origin) -> frozenset[str | None]:
    """Names of the leaves that are among what a value is made of; None stands for the unknown."""
    found: set[str | None] = set()
    stack, seen = [origin.node], set[int]()
    while stack:
        node = stack.pop()
        if isinstance(node, LeafOrigin):
            found.add(node.fqn)
        elif isinstance(node, Unknown):
            found.add(None)
        elif isinstance(node, Call) and id(node) not in seen:
            seen.add(id(node))
            stack += [below.node for below in node.inputs]
    return frozenset(found)


def bottom_up(origin: Origin, is_known: Callable[[Origin], bool]) -> Iterator[Origin]:
    """Everything that a value is made of, each before what is made of it; without recursion."""
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


def facts_of(origin: Origin, leaves: Mapping[str, Leaf]) -> Tensor:
    """Dtype and shape of a value.

    Args:
        origin: Where it comes from.
        leaves: All leaves of the program, by FQN.

    Raises:
        TypeError: Nobody knows where.
    """
    node = origin.node
    if isinstance(node, Call):
        return node.results[origin.output]
    if isinstance(node, LeafOrigin):
        leaf = leaves[node.fqn]
        return Tensor(dtype=leaf.dtype, shape=leaf.shape)
    if isinstance(node, Literal):
        return facts_of_tensor(node.value)
    raise TypeError(type(node))


def facts_of_tensor(tensor: torch.Tensor) -> Tensor:
    """Dtype and shape of a tensor."""
    return Tensor(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))


@dataclass(frozen=True)
class Escape:
    """A value that left a recording.

    Attributes:
        origin: Where it came from.
        how: How it left.
        sha256: Of its bytes.
        facts: Dtype and shape.
        shown: It as text, where it is small.
    """

    origin: Origin
    how: str
    sha256: str
    facts: Tensor
    shown: str


# MERGED lineage: Which leaves recorded values follow from, if anybody knows.

_SHAPES_ONLY = frozenset(
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
"""Ops whose result does not depend on the values of their operand."""


_IN_AN_ARRAY = (
    "its numbers are in an array of NumPy on a weight that was given to code of a third party: "
    "they may have been read there, unseen"
)


class UnwritableError(Exception):
    """A value whose way is not known, or cannot stand in a plan; says why."""


class Lineage:
    """What the values of one recording follow from."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._follows: dict[Call, frozenset[str]] = {}

    def follows(self, origin: Origin) -> frozenset[str]:
        """The leaves that a value follows from.

        Raises:
            UnwritableError: Nobody knows.
        """
        for below in bottom_up(origin, lambda one: one.node in self._follows):
            with suppress(UnwritableError):
                self._followed(below)
        return self._followed(origin)

    def _followed(self, origin: Origin) -> frozenset[str]:
        node = origin.node
        if isinstance(node, Unknown):
            raise UnwritableError(f"{node.reason}, so nobody knows what it follows from")
        if isinstance(node, LeafOrigin):
            return frozenset({node.fqn})
        if isinstance(node, Literal):
            if any(loan.only_passed_on for loan in node.loans):
                raise UnwritableError(_IN_AN_ARRAY)
            return frozenset()
        found = self._follows.get(node)
        if found is None:
            found = frozenset[str]().union(*map(self._followed, _read_by(node)))
            self._follows[node] = found
        return found


def reads_first(call: Call) -> bool:
    """Whether the values of a call's first operand matter, not only its dtype and shape."""
    return call.op is not _aten.copy_.default and str(call.op) not in _SHAPES_ONLY


def _read_by(call: Call) -> Sequence[Origin]:
    """The operands whose values matter."""
    if reads_first(call):
        return call.inputs
    return [one for one in (*call.args[1:2], *call.numbers) if isinstance(one, Origin)]


# MERGED layouts: Ops for which it matters how operands lie in memory, and operands whose elements
# lie in order.

_aten = torch.ops.aten
_LAID_OUT = {
    _aten.as_strided.default,
    _aten.as_strided_scatter.default,
    _aten.view.dtype,
    _aten.view_as_complex.default,
    _aten.view_as_real.default,
}
"""Ops whose result depends on how their first argument lies in memory."""
_ANY_LAYOUT = {_aten.view_as_real.default}
"""Those that only need it to be free of signs and conjugations that torch has put off."""
RESHAPES = {
    _aten.view.default,
    _aten._unsafe_view.default,  # noqa: SLF001 - the op's name
    _aten.reshape.default,
    _aten._reshape_alias.default,  # noqa: SLF001 - the op's name
}
"""Ops that give what they are given in another shape."""
ORDERED = "in order"
"""What stands for the op of a call that puts elements one after another, in an order of dimensions
that is its second argument; None is their own."""


def is_laid_out(op: Any) -> bool:
    """Whether what an op gives depends on how its first argument lies in memory."""
    return op in _LAID_OUT


def needs_contiguous(op: Any) -> bool:
    """Whether such an op takes its first argument only with one element after another."""
    return op not in _ANY_LAYOUT


def plainly_laid_out(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with one element after another in memory, and no signs that torch has put off."""
    return tensor.resolve_conj().resolve_neg().contiguous()


def on_ordered(origin: Origin, lineage: Lineage, leaves: Mapping[str, Leaf]) -> Origin:
    """The same view of memory whose elements lie one after another, as they did.

    Args:
        origin: A value that was recorded.
        lineage: Knows what values follow from.
        leaves: All leaves of the program, by FQN.

    Raises:
        UnwritableError: Nobody knows what it follows from.
    """
    node = origin.node
    if not lineage.follows(origin):
        return origin
    if _is_view_of_another(node):
        below = on_ordered(node.args[0], lineage, leaves)
        moved = replace(node, args=(below, *node.args[1:]), inputs=(below, *node.inputs[1:]))
        return origin._replace(node=moved)
    device = node.device if isinstance(node, Call) else "cpu"
    facts = (facts_of(origin, leaves),)
    ordered = Call(ORDERED, (origin, origin.order), {}, facts, device, (origin,))
    return origin._replace(node=ordered, output=0)


def is_anchored(origin: Origin) -> bool:
    """Whether a value is a view of memory without gaps, which a recipe can make again.

    Other operands have to be made contiguous, in a recording and in recipes.
    """
    while _is_view_of_another(origin.node):
        origin = origin.node.args[0]
    return origin.contiguous or origin.order is not None


def is_whole(origin: Origin) -> bool:
    """Whether a value is all of its memory, one element after another."""
    if not origin.contiguous:
        return False
    while _is_view_of_another(origin.node) and origin.node.op in RESHAPES:
        origin = origin.node.args[0]
    return origin.contiguous and not _is_view_of_another(origin.node)


def _is_view_of_another(node: object) -> TypeGuard[Call]:
    return isinstance(node, Call) and node.op is not ORDERED and is_view(node.op)


def is_view(op: Any) -> bool:
    """Whether it gives a part of the memory of its first argument, and writes nothing."""
    first, *_ = op._schema.arguments  # noqa: SLF001 - there is no other way
    return first.alias_info is not None and not first.alias_info.is_write
