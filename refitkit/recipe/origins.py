"""Where values come from, as a recording knows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from refitkit.model import Tensor


@dataclass(eq=False)
class Leaf:
    """A parameter, buffer or constant of the program."""

    fqn: str


@dataclass(eq=False)
class Literal:
    """A tensor made of what is no tensor: numbers of the graph, or of a converter.

    Attributes:
        value: It; a copy.
    """

    value: torch.Tensor


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
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[Tensor, ...]
    device: str
    inputs: tuple[Origin, ...] = field(default=())


class Origin(NamedTuple):
    """Where one tensor comes from.

    Attributes:
        node: What made it.
        output: Which of the node's results it is.
        geometry: How it lay in memory.
    """

    node: Leaf | Literal | Unknown | Call
    output: int
    contiguous: bool


def follows_from_leaf(origin: Origin) -> bool:
    """Whether a leaf, or nobody knows what, is among what a value is made of."""
    stack, seen = [origin.node], set[int]()
    while stack:
        node = stack.pop()
        if isinstance(node, Leaf | Unknown):
            return True
        if isinstance(node, Call) and id(node) not in seen:
            seen.add(id(node))
            stack += [below.node for below in node.inputs]
    return False


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
