"""Values that plans keep and that sources have overridden: a refit in part has to know of them.

Of what no state_dict holds (a mask, a constant) the plan keeps a value, for sources that have none.
A slot that follows from such a value and from weights would get the plan's value in a refit in part
that gives the weights only, while what is live came from another one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from refitkit.errors import PlanMismatchError
from refitkit.program.bits import same_bits
from refitkit.program.views import derived_value
from refitkit.protocols import LeavesOut
from refitkit.recipe import unusable_reason
from refitkit.recipe.reads import kept_leaves
from refitkit.recipe.weak_cache import once_for_each

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch

    from refitkit.model import Leaf
    from refitkit.protocols import WeightSource
    from refitkit.recipe import RefitPlan


def overrides(plan: RefitPlan, source: WeightSource) -> frozenset[str]:
    """What a source has other values of than the plan, among what slots mix with weights.

    Raises:
        SourceError: An entry cannot be read.
    """
    names, leaves = source.names(), {leaf.fqn: leaf for leaf in plan.data.leaves}
    return frozenset(
        name
        for name in _mixed(plan)
        if name in names
        and name in plan.data.pinned
        and not same_bits(
            _own_elements(leaves, name, plan.pinned(name)),
            _own_elements(leaves, name, source.get(name)),
        )
    )


def _own_elements(leaves: Mapping[str, Leaf], name: str, value: torch.Tensor) -> torch.Tensor:
    """A value without what follows from weights that are parts of it."""
    leaf = leaves.get(name)
    if leaf is None or not leaf.parts:
        return value
    zeros = {part.fqn: value.new_zeros(leaves[part.fqn].shape) for part in leaf.parts}
    return derived_value(leaf, leaves, zeros.__getitem__, lambda _: value)


def left(before: frozenset[str], plan: RefitPlan, source: WeightSource) -> frozenset[str]:
    """What is overridden after a refit in part: what it gives is as it gives it."""
    return before.difference(source.names()) | overrides(plan, source)


def differing(plan: RefitPlan, source: WeightSource, wrappers: Collection[str]) -> tuple[str, ...]:
    """Tensors that a source leaves out and that are not what the plan keeps.

    A value that is the plan's in another dtype is the plan's. State that calls write is no value
    to compare, and neither is what follows from weights.

    Args:
        plan: The plan.
        source: The weights, as they were given.
        wrappers: Parts of names that wrappers of a module put there.
    """
    if not isinstance(source, LeavesOut):
        return ()
    leaves = {
        name
        for name, leaf in kept_leaves(plan).items()
        if leaf.used and not (leaf.mutated or leaf.parts)
    }
    found: dict[str, None] = {}
    for given, value in source.left_out.items():
        unwrapped = ".".join(part for part in given.split(".") if part not in wrappers)
        name = given if given in leaves else unwrapped
        if name in leaves and name in plan.data.pinned and not _is_planned(plan, name, value):
            found[name] = None
    return tuple(found)


def _is_planned(plan: RefitPlan, name: str, value: torch.Tensor) -> bool:
    return not unusable_reason(value) and same_bits(plan.pinned(name).to(value.dtype), value)


def overridden_as(names: frozenset[str]) -> bytes:
    """Names as a saved module holds them: its values are not those of its plan either."""
    return json.dumps(sorted(names)).encode()


def overridden_in(content: bytes) -> frozenset[str]:
    """Names that a saved module holds.

    Raises:
        PlanMismatchError: They are no JSON list of names.
    """
    try:
        names = json.loads(content)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PlanMismatchError("What this module has overridden of its plan cannot be read.")
    return frozenset(names)


@once_for_each
def _mixed(plan: RefitPlan) -> frozenset[str]:
    kept = {leaf.fqn for leaf in plan.data.leaves if not leaf.persistent}
    found: set[str] = set()
    for row in plan.data.ledger if kept else ():
        mine = kept.intersection(row.sources)
        if 0 < len(mine) < len(row.sources):
            found |= mine
    return frozenset(found)
