"""Ops for which it matters how operands lie in memory, and operands whose elements lie in order."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from refitkit.recipe.origins import Call, Origin, facts_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.model import Leaf as LeafFacts
    from refitkit.recipe.lineage import Lineage

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
ORDERED = "in order"
"""What stands for the op of a call that puts elements one after another."""


def is_laid_out(op: Any) -> bool:
    """Whether what an op gives depends on how its first argument lies in memory."""
    return op in _LAID_OUT


def needs_contiguous(op: Any) -> bool:
    """Whether such an op takes its first argument only with one element after another."""
    return op not in _ANY_LAYOUT


def plainly_laid_out(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with one element after another in memory, and no signs that torch has put off."""
    return tensor.resolve_conj().resolve_neg().contiguous()


def on_ordered(origin: Origin, lineage: Lineage, leaves: Mapping[str, LeafFacts]) -> Origin:
    """The same view of memory whose elements lie one after another, if they did so.

    Args:
        origin: A value that was recorded.
        lineage: Knows what values follow from.
        leaves: All leaves of the program, by FQN.

    Raises:
        UnwritableError: Nobody knows what it follows from.
    """
    node = origin.node
    if origin.contiguous and lineage.follows(origin):
        device = node.device if isinstance(node, Call) else "cpu"
        ordered = Call(ORDERED, (origin,), {}, (facts_of(origin, leaves),), device, (origin,))
        return Origin(ordered, 0, contiguous=True)
    if not isinstance(node, Call) or not _is_view(node.op):
        return origin
    below = on_ordered(node.args[0], lineage, leaves)
    moved = replace(node, args=(below, *node.args[1:]), inputs=(below, *node.inputs[1:]))
    return origin._replace(node=moved)


def _is_view(op: Any) -> bool:
    """Whether it gives a part of the memory of its first argument, and writes nothing."""
    first, *_ = op._schema.arguments  # noqa: SLF001 - there is no other way
    return first.alias_info is not None and not first.alias_info.is_write
