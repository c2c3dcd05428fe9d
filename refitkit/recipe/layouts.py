"""Ops for which it matters how operands lie in memory, and operands whose elements lie in order."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from refitkit.recipe.origins import Call, facts_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.model import Leaf
    from refitkit.recipe.lineage import Lineage
    from refitkit.recipe.origins import Origin

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
