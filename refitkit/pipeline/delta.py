"""Delta: the slots that a new source would leave unchanged, so that a refit need not write them.

A slot is unchanged if everything that its value follows from has the same bits as when the slot was
last written, and if the plan is the same. ``LiveSources`` remembers digests of the sources of each
live slot, and ``Delta`` compares a new source with them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
import xxhash

from refitkit.program.dtypes import dtype_name
from refitkit.protocols import KnowsRevisions, SupportsPartial
from refitkit.recipe.foreign import info_of
from refitkit.recipe.plan import STRATEGY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from refitkit.model import LedgerRow, SlotKey
    from refitkit.protocols import OpenedModule, SlotValue, WeightSource
    from refitkit.recipe import RefitPlan

SourceDigests: TypeAlias = frozenset[tuple[str, Hashable]]
"""Names of the tensors that a value was computed from, each with its digest or revision.

If a strategy gave a formula, it is there, too, under an empty name.
"""


@dataclass(frozen=True)
class LiveSources:
    """The sources of the live slots of a module, as they were when each slot was last written.

    Attributes:
        plan: The plan that was followed.
        version: Version of the weights that this describes.
        digests: Digests of the sources by slot. Slots with unknown sources are left out.
    """

    plan: RefitPlan
    version: int
    digests: Mapping[SlotKey, SourceDigests]

    def holds_for(self, plan: RefitPlan, version: int) -> bool:
        """Whether this describes these weights, and an equal plan computed them."""
        return version == self.version and (plan is self.plan or plan.data == self.plan.data)


class Delta:
    """A new source, compared with the live weights.

    Attributes:
        unchanged: Slots that already hold the source's value by the plan's recipes, in engines that
            support partial refits. Empty if a guard of the plan is broken.
        same: Names of the source's entries with the same bits as in all live slots that follow
            from them.
    """

    def __init__(
        self,
        plan: RefitPlan,
        module: OpenedModule,
        source: WeightSource,
        live: LiveSources | None,
        version: int,
    ) -> None:
        """Compare. Entries that slots follow from and that have no revision are read once.

        Args:
            plan: The plan that the refit follows.
            module: The opened target.
            source: The new weights.
            live: The sources of the live slots; None if they are unknown.
            version: Version of the live weights.

        Raises:
            SourceError: An entry cannot be read.
        """
        self._plan = plan
        # Digests of another plan or version say nothing about the present values.
        known = live is not None and live.holds_for(plan, version)
        self._before = dict(live.digests) if live is not None and known else {}
        self._digests = digests = _Digests(plan, source)
        self._by_formula: dict[SlotKey, SourceDigests] = {}
        self._now = {row.slot.key: digests.of_row(row) for row in _comparable_rows(plan)}
        # An engine without partial refits needs all its values anyway.
        whole = {n for n, e in module.engines.items() if not isinstance(e, SupportsPartial)}
        self._whole = whole
        broken = bool(plan.data.guards) and bool(plan.broken_guards(source))
        self.unchanged = frozenset(
            key
            for key, now in self._now.items()
            if key[0] not in whole and not broken and self._before.get(key) == now
        )
        self.same = frozenset(digests.names_of(self._same(digests)))

    def _same(self, digests: _Digests) -> set[tuple[str, Hashable]]:
        """Names and digests that every slot that follows from them was computed from."""
        same = {one for now in self._now.values() for one in now}
        for row in self._plan.data.ledger:
            same -= digests.of_row(row) - self._before.get(row.slot.key, frozenset())
        return same

    def settled(self, values: Iterable[SlotValue]) -> frozenset[SlotKey]:
        """Slots that already hold their values by formulas of strategies.

        Args:
            values: Values of all strategies. Entries that values with a formula follow from are
                read once, unless they have a revision.

        Raises:
            SourceError: An entry cannot be read.
        """
        found = {value.slot.key: self._of_formula(value) for value in values}
        self._by_formula = {key: now for key, now in found.items() if now is not None}
        return frozenset(
            key
            for key, now in self._by_formula.items()
            if key[0] not in self._whole and self._before.get(key) == now
        )

    def _of_formula(self, value: SlotValue) -> SourceDigests | None:
        """Digests of what a strategy computes a value from; None if they say not enough."""
        # a value without sources may follow from all weights
        if value.strategy == STRATEGY or value.formula is None or not value.sources:
            return None
        if value.slot.mutable or not _mutated(self._plan).isdisjoint(value.sources):
            return None
        digests = self._digests.of_names(value.sources)
        # with the text, because 1 == True and 0.0 == -0.0
        formula = (value.strategy, value.formula, repr(value.formula))
        return None if digests is None else digests | {("", formula)}

    def after(self, values: Mapping[SlotKey, SlotValue], version: int) -> LiveSources:
        """The sources of the live slots once a refit is committed.

        Args:
            values: The written values. Other slots keep their sources.
            version: Version of the weights after the refit.
        """
        kept = {key: digests for key, digests in self._before.items() if key not in values}
        # The plan's recipes compute a value from exactly the sources of its row, and formulas from
        # those of the value. Slots of other strategies are written again by the next refit.
        new = {
            key: known[key]
            for key, value in values.items()
            if key in (known := self._now if value.strategy == STRATEGY else self._by_formula)
        }
        return LiveSources(self._plan, version, {**kept, **new})


def _mutated(plan: RefitPlan) -> set[str]:
    """FQNs of leaves that calls of the module write."""
    return {leaf.fqn for leaf in plan.data.leaves if leaf.mutated}


def _comparable_rows(plan: RefitPlan) -> Iterator[LedgerRow]:
    """Rows with a recipe whose slots calls of the module do not write.

    A slot that calls write no longer holds the value that the last refit wrote.
    """
    mutated = _mutated(plan)
    for row in plan.data.ledger:
        if row.value is not None and not row.slot.mutable and mutated.isdisjoint(row.sources):
            yield row


class _Digests:
    """Digests of the entries that slots follow from. Each tensor has one, under its first name."""

    def __init__(self, plan: RefitPlan, source: WeightSource) -> None:
        """Read the entries."""
        self._twins = {name: tie for tie in plan.data.ties for name in tie}
        self._source, self._names = source, source.names()
        firsts = dict.fromkeys(
            self._first(name) for row in _comparable_rows(plan) for name in row.sources
        )
        given = {first: self._named(first) for first in firsts}
        self._given = {first: name for first, name in given.items() if name is not None}
        self._digests = {
            first: revision_or_digest(name, source) for first, name in self._given.items()
        }

    def _first(self, name: str) -> str:
        """The first of all names of a tensor."""
        return self._twins.get(name, (name,))[0]

    def _named(self, first: str) -> str | None:
        """The name that the source has for a tensor; None if it lacks it."""
        # A source may have a tied weight under any of its names.
        return next((n for n in self._twins.get(first, (first,)) if n in self._names), None)

    def of_row(self, row: LedgerRow) -> SourceDigests:
        """Digests of the sources of a row, as far as the source has them."""
        firsts = {self._first(name) for name in row.sources}
        return frozenset((n, self._digests[n]) for n in firsts if n in self._digests)

    def of_names(self, names: Iterable[str]) -> SourceDigests | None:
        """Digests of entries, read now if they were not; None if the source lacks one."""
        firsts = {self._first(name) for name in names}
        for first in firsts:
            if first not in self._digests:
                given = self._named(first)
                if given is None:
                    return None
                self._given[first] = given
                self._digests[first] = revision_or_digest(given, self._source)
        return frozenset((first, self._digests[first]) for first in firsts)

    def names_of(self, digests: Iterable[tuple[str, Hashable]]) -> Iterator[str]:
        """The names of these tensors in the source."""
        return (self._given[first] for first, _ in digests)


def revision_or_digest(name: str, source: WeightSource) -> Hashable:
    """The revision of an entry; its digest if the source knows no revision.

    A revision (``KnowsRevisions``) identifies the bits without reading them.

    Raises:
        SourceError: The entry cannot be read.
    """
    revision = source.revision(name) if isinstance(source, KnowsRevisions) else None
    return digest_of(name, source) if revision is None else ("revision", revision)


def digest_of(name: str, source: WeightSource) -> str:
    """Dtype, shape and a 128-bit hash of an entry's bytes in logical order, as one text.

    The hash is XXH3, which is not cryptographic. It need not be: a user who can forge a
    collision can choose the weights, too.

    Raises:
        SourceError: The entry cannot be read.
    """
    info = info_of(source, name)
    if info.unusable:
        return f"unusable: {info.unusable}"
    return digest_of_tensor(source.get(name))


def digest_of_tensor(tensor: torch.Tensor) -> str:
    """Dtype, shape and a 128-bit hash of a tensor's bytes in logical order, as one text."""
    # Two views with equal elements must have equal digests for all layouts and lazy bits.
    value = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    raw = value.view(torch.uint8).numpy().data if value.numel() else b""
    kind, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
    return f"{kind} {shape} {xxhash.xxh3_128_hexdigest(raw)}"
