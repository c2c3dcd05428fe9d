"""Where values come from, as a recording knows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from refitkit.model import Tensor
from refitkit.program.dtypes import dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

    from refitkit.model import Leaf


class Loan(Protocol):
    """An array on a tensor's memory that was given out; see :mod:`refitkit.recipe.loans`."""

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
