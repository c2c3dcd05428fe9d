"""What a plan reads of a source: found out once for each plan, as plans never change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refitkit.errors import Problem
from refitkit.model import CallRef, PinnedRef, SlotState, SourceRef
from refitkit.program.bits import same_bits
from refitkit.program.dtypes import are_alike, dtype_of
from refitkit.program.views import derived_value
from refitkit.protocols import KnowsTies
from refitkit.recipe.weak_cache import once_for_each

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from refitkit.model import Leaf, LedgerRow, OpCall, PlanData, SlotKey
    from refitkit.protocols import Plan, WeightSource


class Reads:
    """What a plan reads, however many sources are held against it.

    Attributes:
        data: The plan's data.
        leaves: What the program has, by FQN.
        wanted: Dtype and shape of each that this torch knows, by FQN.
        of_slots: Names that slots are filled from.
        needed: Those, and names that guards follow from.
        known: Those, and names of all leaves.
        sources: Names that some row gives as its source.
        guarded: Names that guards follow from, as recipes have them.
        wholly: Whether there are slots of which nobody knows what they follow from.
        used: Names of tensors that the graph reads under one of their names.
        ties: Names of one tensor, where one of them is needed.
        views: Whether state_dicts have entries that are views of others.
        demands: For each tensor that a source has to have, all of its names.
    """

    def __init__(self, data: PlanData) -> None:
        """Look at every row and leaf once."""
        self.data = data
        self.leaves = {leaf.fqn: leaf for leaf in data.leaves}
        self.wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            leaf.fqn: (getattr(torch, leaf.dtype), leaf.shape)
            for leaf in data.leaves
            if hasattr(torch, leaf.dtype)
        }
        self._twins = {name: tie for tie in data.ties for name in tie}
        served = {SlotState.RECIPE, SlotState.PINNED}
        self.of_slots = {n for row in data.ledger if row.state in served for n in row.sources}
        self.guarded = sources_of_guards(data)
        self.needed = self.of_slots | self.names_of(self.guarded)
        self.wholly = any(row.state is SlotState.UNMAPPED for row in data.ledger)
        used = [leaf.fqn for leaf in data.leaves if leaf.used]
        self.used = self.names_of(used)
        self._used = used if self.wholly else []
        if self.wholly:  # nobody knows what such slots follow from: it may be anything
            self.of_slots |= set(self._used)
            self.needed |= self.of_slots
        self.known = self.leaves.keys() | self.needed
        self.sources = {name for row in data.ledger for name in row.sources}
        self.ties = [tie for tie in data.ties if self.needed & set(tie)]
        self.views = any(leaf.view is not None and leaf.persistent for leaf in data.leaves)
        self.demands = {first: self.names_of([first]) for first in self._must_be_there()}
        self._alone = {first for first, names in self.demands.items() if len(names) == 1}
        self._tied = [names for names in self.demands.values() if len(names) > 1]

    def names_of(self, names: Iterable[str]) -> set[str]:
        """All names of the tensors of these names."""
        return {twin for name in names for twin in self._twins.get(name, (name,))}

    def lacking(self, names: Collection[str]) -> dict[str, list[str]]:
        """What a source of these names lacks, with the slots that need it, in the ledger's order.

        What slots follow from comes first, then what guards do, then perhaps what slots may follow
        from that nobody knows.
        """
        if self._alone.issubset(names) and all(map(set(names).intersection, self._tied)):
            return {}
        given = set(names)
        gone = {first for first, others in self.demands.items() if not given & others}
        found: dict[str, list[str]] = {first: [] for first in self.demands if first in gone}
        for row in self.data.ledger:
            if row.state is SlotState.RECIPE:
                for first in dict.fromkeys(map(self._first, row.sources)):
                    if first in gone:
                        found[first].append(row.slot.name)
        return found

    def fitting(self, source: WeightSource) -> tuple[int, int]:
        """Tensors that a source has for the program: with their dtypes, and with like ones.

        Those are like ones that a cast would make fit: floats of floats, integers of integers. Of
        tied names one is enough. Only headers are read.
        """
        given, fit, like = source.names(), 0, 0
        for names in self.demands.values():
            infos = [(name, source.info(name)) for name in names if name in given]
            kinds = [
                (info.dtype, self.leaves[name].dtype)
                for name, info in infos
                if name in self.leaves
                and not info.unusable
                and info.shape == self.leaves[name].shape
            ]
            fit += any(found == wanted for found, wanted in kinds)
            like += any(are_alike(dtype_of(found), dtype_of(wanted)) for found, wanted in kinds)
        return fit, like

    def _must_be_there(self) -> Iterator[str]:
        """First names of all tensors that a source has to have under one of their names."""
        recipes = (row for row in self.data.ledger if row.state is SlotState.RECIPE)
        of_recipes = (name for row in recipes for name in row.sources)
        for first in dict.fromkeys(map(self._first, [*of_recipes, *self.guarded, *self._used])):
            leaf = self.leaves.get(first)
            if leaf is None or leaf.persistent:
                yield first

    def _first(self, name: str) -> str:
        """The first of a tensor's names."""
        return self._twins.get(name, (name,))[0]


@once_for_each
def reads_of(plan: Plan) -> Reads:
    """What a plan reads."""
    return Reads(plan.data)


# MERGED following: Which sources the guards of a plan follow from.


def sources_of_guards(data: PlanData) -> tuple[str, ...]:
    """FQNs that the values of guards follow from, each once, as the recipe names them."""
    found: dict[str, None] = {}
    seen: set[int] = set()
    waiting: list[object] = [guard.value for guard in data.guards]
    while waiting:
        value = waiting.pop()
        if isinstance(value, SourceRef):
            found[value.fqn] = None
        elif isinstance(value, CallRef) and value.call not in seen:
            seen.add(value.call)
            waiting.extend(_arguments(data.calls[value.call]))
    return tuple(found)


def _arguments(call: OpCall) -> Iterator[object]:
    for argument in (*call.args, *call.kwargs.values()):
        yield from argument if isinstance(argument, tuple) else (argument,)


# MERGED state: State: the slots that calls of a module write, such as KV caches and counters.


@once_for_each
def state_slots(plan: Plan) -> tuple[SlotKey, ...]:
    """Keys of all slots that calls write, in the ledger's order.

    The engine says so of its slot, or the program writes the leaf that the slot holds. An engine
    that somebody else compiled may not know.
    """
    written = frozenset(leaf.fqn for leaf in plan.data.leaves if leaf.mutated)
    return tuple(row.slot.key for row in plan.data.ledger if _is_state(row, written))


def _is_state(row: LedgerRow, written: frozenset[str]) -> bool:
    match row.value:
        case SourceRef(fqn=name) | PinnedRef(name=name):
            return row.slot.mutable or name in written
    return row.slot.mutable


# MERGED ties: Names of one tensor, and names of one memory, for which a source may have several
# values.


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
