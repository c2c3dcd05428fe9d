"""Values that follow from no leaf: they are computed while planning, and a plan keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map, tree_map_only

from refitkit.errors import raise_if_resource
from refitkit.program.dtypes import dtype_of
from refitkit.recipe import ops
from refitkit.recipe.calls import call
from refitkit.recipe.conditions import aligned, same_settings
from refitkit.recipe.layouts import is_laid_out, plainly_laid_out
from refitkit.recipe.lineage import UnwritableError, reads_first
from refitkit.recipe.origins import Call, Literal, Origin, facts_of, facts_of_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.model import Leaf
    from refitkit.model import Tensor

_UNSET = ("aten.empty", "aten.new_empty")
"""How names of ops begin that leave memory as it is."""


class Folding:
    """Such values of one recording."""

    def __init__(self, leaves: Mapping[str, Leaf]) -> None:
        """Compute nothing yet.

        Args:
            leaves: All leaves of the program, by FQN.
        """
        self._leaves = leaves
        self._computed: dict[Call, tuple[torch.Tensor, ...]] = {}

    def value(self, origin: Origin) -> torch.Tensor:
        """A value that follows from no leaf.

        Raises:
            UnwritableError: It cannot be computed again.
        """
        node = origin.node
        if isinstance(node, Literal):
            return node.value
        if not isinstance(node, Call):
            raise TypeError(type(node))
        if node not in self._computed:
            self._computed[node] = self._run(node)
        return self._computed[node][origin.output]

    def _run(self, node: Call) -> tuple[torch.Tensor, ...]:
        if str(node.op).startswith(_UNSET):  # whatever lay there then: now always the same
            return tuple(torch.zeros(r.shape, dtype=dtype_of(r.dtype)) for r in node.results)
        args: Any = node.args
        if not reads_first(node):
            args = (_stand_in(facts_of(node.args[0], self._leaves)), *node.args[1:])
        args, kwargs = tree_map(
            lambda one: self.value(one) if isinstance(one, Origin) else one,
            (args, dict(node.kwargs)),
            is_leaf=lambda one: isinstance(one, Origin),
        )
        if is_laid_out(node.op):
            args = (plainly_laid_out(args[0]), *args[1:])
        try:
            found = self._called(node, args, kwargs)
        except (RuntimeError, TypeError, ValueError) as exc:
            raise_if_resource(exc, f"{node.op} cannot be computed again")
            raise UnwritableError(f"{node.op} cannot be computed again: {exc}") from exc
        if tuple(map(facts_of_tensor, found)) != node.results:
            raise UnwritableError(f"{node.op} gives something else when it is computed again")
        return found

    def _called(self, node: Call, args: Any, kwargs: Any) -> tuple[torch.Tensor, ...]:
        dtypes = [facts_of(one, self._leaves).dtype for one in node.inputs]
        if not ops.is_sensitive(str(node.op), dtypes, kwargs.get("alpha", 1)):
            return call(node.op, args, kwargs)
        args, kwargs = tree_map_only(torch.Tensor, aligned, (args, kwargs))  # as recorded
        with same_settings():
            return call(node.op, args, kwargs)


def _stand_in(facts: Tensor) -> torch.Tensor:
    """A tensor of this dtype and shape, of whatever value, in no memory to speak of."""
    return torch.zeros((), dtype=dtype_of(facts.dtype)).expand(facts.shape)
