"""Missing and unexpected names, broken ties, wrong dtypes and shapes, unusable tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.builtin.checks.following import sources_of_guards
from refitkit.errors import Problem
from refitkit.model import SlotState
from refitkit.recipe.strangers import unexpected
from refitkit.recipe.ties import broken_ties

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from refitkit.model import Leaf, TensorInfo
    from refitkit.protocols import Plan, WeightSource


_SHOWN = 3


class Names:
    """A source held against what a plan's program reads."""

    def __init__(self, plan: Plan, source: WeightSource) -> None:
        """Look at every name of the source once, at headers only."""
        self._plan, self._source = plan, source
        self._leaves = {leaf.fqn: leaf for leaf in plan.data.leaves}
        self._infos = {name: source.info(name) for name in source.names()}
        self._twins = {name: tie for tie in plan.data.ties for name in tie}
        self._of_slots = {
            name
            for row in plan.data.ledger
            if row.state in {SlotState.RECIPE, SlotState.PINNED}
            for name in row.sources
        }
        self._guarded = sources_of_guards(plan.data)
        self._needed = self._of_slots | self._names_of(self._guarded)
        self._wholly = any(row.state is SlotState.UNMAPPED for row in plan.data.ledger)
        if self._wholly:  # nobody knows what such slots follow from: it may be anything
            self._of_slots |= {leaf.fqn for leaf in plan.data.leaves if leaf.used}
            self._needed |= self._of_slots
        self._bad = {p.subject for p in self._misfits()}

    def problems(self, *, partial: bool) -> Iterator[Problem]:
        """Everything that is wrong, missing names last."""
        yield from self._unexpected()
        yield from self._misfits()
        yield from self._broken_ties()
        if partial:
            yield from self._nothing_at_all()
        else:
            yield from self._missing()

    def usable(self) -> list[str]:
        """Names that slots will be filled from and whose headers are right."""
        return [n for n in self._infos if n in self._needed and n not in self._bad]

    def _unexpected(self) -> Iterator[Problem]:
        known = {leaf.fqn for leaf in self._plan.data.leaves} | self._needed
        strange = {n: i for n, i in self._infos.items() if n not in known and i.persistent}
        yield from unexpected(strange, known, "the model")

    def _misfits(self) -> Iterator[Problem]:
        """Entries that cannot become what the program reads under their names.

        What the program has but does not read must have the right shape all the same: otherwise
        the weights are those of another model.
        """
        for name, info in self._infos.items():
            leaf, needed = self._leaves.get(name), name in self._needed
            if info.unusable and needed:
                yield Problem(name, "unusable", info.unusable, _leaf_text(leaf))
            elif leaf and not info.unusable:
                yield from _differences(leaf, info, with_dtype=needed)

    def _broken_ties(self) -> Iterator[Problem]:
        """Names of one tensor for which the source has different tensors."""
        needed = [tie for tie in self._plan.data.ties if self._needed & set(tie)]
        return broken_ties(needed, self._infos.keys() - self._bad, self._source)

    def _missing(self) -> Iterator[Problem]:
        """What slots, then guards, then perhaps slots that nobody knows, follow from."""
        wanting = self._wanting()
        for name, needed_by in wanting.items():
            yield self._lack(name, needed_by)
        used = [leaf.fqn for leaf in self._plan.data.leaves if self._wholly and leaf.used]
        for name in dict.fromkeys(map(self._first, [*self._guarded, *used])):
            if name not in wanting and self._lacks(name):
                yield self._lack(name, [])

    def _wanting(self) -> dict[str, list[str]]:
        """Names that the source lacks, with the slots that need them, in the ledger's order."""
        found: dict[str, list[str]] = {}
        for row in self._plan.data.ledger:
            if row.state is SlotState.RECIPE:
                for name in dict.fromkeys(map(self._first, row.sources)):
                    if self._lacks(name):
                        found.setdefault(name, []).append(row.slot.name)
        return found

    def _lacks(self, name: str) -> bool:
        """Whether a source must have a tensor and has it under none of its names."""
        leaf = self._leaves.get(name)
        must = leaf is None or leaf.persistent
        return must and not self._infos.keys() & set(self._names_of([name]))

    def _lack(self, name: str, needed_by: list[str]) -> Problem:
        others = self._names_of([name]) - {name}
        also = f", or its other names {tuple(sorted(others))}" if others else ""
        hint = f"pass it{also}"
        if needed_by and needed_by != [name]:
            more = f" and {len(needed_by) - _SHOWN} more" if len(needed_by) > _SHOWN else ""
            hint += f"; needed by {', '.join(map(repr, needed_by[:_SHOWN]))}{more}"
        if needed_by:
            hint += "; to leave such slots as they are: partial=True"
        return Problem(name, "missing", wanted=_leaf_text(self._leaves.get(name)), hint=hint)

    def _first(self, name: str) -> str:
        """The first of a tensor's names."""
        return self._twins.get(name, (name,))[0]

    def _names_of(self, names: Iterable[str]) -> set[str]:
        """All names of the tensors of these names."""
        return {twin for name in names for twin in self._twins.get(name, (name,))}

    def _nothing_at_all(self) -> Iterator[Problem]:
        if not self._of_slots & self._infos.keys():
            found = f"{len(self._infos)} names, none of a slot"
            yield Problem(self._source.description, "nothing to refit", found)


def _differences(leaf: Leaf, info: TensorInfo, *, with_dtype: bool) -> Iterator[Problem]:
    if with_dtype and info.dtype != leaf.dtype:
        hint = "convert it yourself: refitkit never casts weights silently"
        yield Problem(leaf.fqn, "dtype", info.dtype, leaf.dtype, hint)
    if info.shape != leaf.shape:
        hint = "the transposed shape" if info.shape == leaf.shape[::-1] else ""
        yield Problem(leaf.fqn, "shape", str(info.shape), str(leaf.shape), hint)


def _leaf_text(leaf: Leaf | None) -> str:
    return f"{leaf.dtype} {leaf.shape}" if leaf else ""
