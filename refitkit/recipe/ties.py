"""Names of one tensor, and names of one memory, for which a source may have several values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import Problem
from refitkit.program.bits import same_bits
from refitkit.program.views import derived_value
from refitkit.protocols import KnowsTies
from refitkit.recipe.once import once_for_each

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    import torch

    from refitkit.model import Leaf
    from refitkit.protocols import Plan, WeightSource


@once_for_each
def kept_leaves(plan: Plan) -> Mapping[str, Leaf]:
    """Leaves that no state_dict holds: under none of their names, and not as a view of a weight."""
    weights = {leaf.fqn for leaf in plan.data.leaves if leaf.persistent}
    tied = {name for tie in plan.data.ties if not weights.isdisjoint(tie) for name in tie}
    return {leaf.fqn: leaf for leaf in plan.data.leaves if leaf.kept and leaf.fqn not in tied}


def twins_of(
    sources: Iterable[WeightSource], more: Iterable[Iterable[str]] = ()
) -> dict[str, tuple[str, ...]]:
    """All names of the tensor of each name, as far as one of some sources shows it.

    Args:
        sources: Sources of one model.
        more: Classes of names that are known to be one tensor.
    """
    found: dict[str, tuple[str, ...]] = {}
    known = (tie for one in sources if isinstance(one, KnowsTies) for tie in one.ties())
    for tie in (*more, *known):
        names = dict.fromkeys(twin for name in tie for twin in found.get(name, (name,)))
        found |= dict.fromkeys(names, tuple(names))
    return found


def name_in(names: Collection[str], name: str, twins: Mapping[str, tuple[str, ...]]) -> str | None:
    """The name under which some names have a tensor: its own, or one that it is tied to."""
    if name in names:
        return name
    return next((twin for twin in twins.get(name, ()) if twin in names), None)


def broken_ties(
    ties: Iterable[Iterable[str]], names: Collection[str], source: WeightSource
) -> Iterator[Problem]:
    """Names of one tensor for which a source has different tensors.

    Args:
        ties: Classes of names that are one tensor.
        names: Entries of the source that are usable; others are not read.
        source: The source.
    """
    for tie in ties:
        present = [name for name in tie if name in names]
        if len(present) < 2:  # noqa: PLR2004 - one name is never at odds with itself
            continue
        first = source.get(present[0])
        for other in present[1:]:
            if not _are_one(first, source.get(other)):
                yield Problem(
                    other,
                    "tie broken",
                    f"values other than those of {present[0]!r}",
                    "the same: the model has one weight for both names",
                )


def broken_views(
    leaves: Mapping[str, Leaf], names: Collection[str], source: WeightSource
) -> Iterator[Problem]:
    """Views of other entries for which a source has values of their own.

    Args:
        leaves: All leaves of the program, by FQN.
        names: Entries of the source that are usable; others are not read.
        source: The source.
    """
    for leaf in leaves.values():
        if leaf.view is None or not leaf.persistent or leaf.fqn not in names:
            continue
        base = leaf.view.fqn
        if base not in names:
            wanted = f"with {base!r}: it is a view of that"
            yield Problem(leaf.fqn, "given alone", wanted=wanted)
        elif not same_bits(
            derived_value(leaf, leaves, source.get, source.get), source.get(leaf.fqn)
        ):
            wanted = f"the values of {base!r}, which it is a view of"
            yield Problem(leaf.fqn, "view broken", "other values", wanted)


def _are_one(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two entries are one weight: the same memory, which needs no look, or equal bits."""
    if a.device == b.device and a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return same_bits(a, b)
