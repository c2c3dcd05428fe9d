"""What a plan reads of a source: found out once for each plan, as plans never change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refitkit.model import SlotState
from refitkit.program.dtypes import are_alike, dtype_of
from refitkit.recipe.following import sources_of_guards
from refitkit.recipe.once import once_for_each

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from refitkit.model import PlanData
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
