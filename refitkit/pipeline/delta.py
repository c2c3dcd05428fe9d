"""What of a module is live, by digest, so that the next refit writes only what changed.

A slot is unchanged where everything that its value follows from has the same bits as when the slot
was last written, by the same plan.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
import xxhash

from refitkit.protocols import KnowsRevisions, SupportsPartial
from refitkit.recipe.plan import STRATEGY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from refitkit.model import LedgerRow, SlotKey
    from refitkit.protocols import OpenedModule, SlotValue, WeightSource
    from refitkit.recipe import RefitPlan

Origin: TypeAlias = frozenset[tuple[str, Hashable]]
"""What a value was computed from: names of tensors, and digests or revisions of what they were."""


@dataclass(frozen=True)
class Live:
    """What the slots of a module were computed from when they were last written.

    Attributes:
        plan: The plan that was followed.
        version: Number of the weights of which this is true.
        origins: By slot; slots of which it is not known are not in it.
    """

    plan: RefitPlan
    version: int
    origins: Mapping[SlotKey, Origin]

    def holds_for(self, plan: RefitPlan, version: int) -> bool:
        """Whether this is of the present weights, and of what a plan would compute."""
        return version == self.version and (plan is self.plan or plan.data == self.plan.data)


class Delta:
    """A source held against what is live.

    Attributes:
        unchanged: Slots that hold already what the source has for them, in engines that can be
            refitted in part; none where a guard of the plan is broken.
        same: Names of entries with the bits that all slots that follow from them were computed of.
    """

    def __init__(
        self,
        plan: RefitPlan,
        module: OpenedModule,
        source: WeightSource,
        live: Live | None,
        version: int,
    ) -> None:
        """Read the source once, all that slots follow from and that has no revision.

        Args:
            plan: The plan that will be followed.
            module: The opened target.
            source: The new weights.
            live: What is known of the live ones.
            version: Number of the live ones.

        Raises:
            SourceError: An entry cannot be read.
        """
        self._plan = plan
        known = live is not None and live.holds_for(plan, version)
        self._before = dict(live.origins) if live is not None and known else {}
        digests = _Digests(plan, source)
        self._origins = {row.slot.key: digests.origin(row) for row in _followed(plan)}
        whole = {n for n, e in module.engines.items() if not isinstance(e, SupportsPartial)}
        broken = bool(plan.data.guards) and bool(plan.broken_guards(source))
        self.unchanged = frozenset(
            key
            for key, origin in self._origins.items()
            if key[0] not in whole and not broken and self._before.get(key) == origin
        )
        self.same = frozenset(digests.names_of(self._same(digests)))

    def _same(self, digests: _Digests) -> set[tuple[str, Hashable]]:
        """Origins, by name and digest, of which every slot that follows from them was computed."""
        held = {one for origin in self._origins.values() for one in origin}
        for row in self._plan.data.ledger:
            held -= digests.origin(row) - self._before.get(row.slot.key, frozenset())
        return held

    def after(self, values: Mapping[SlotKey, SlotValue], version: int) -> Live:
        """What is live once these values are.

        Args:
            values: What is written; slots that are not among them stay as they are.
            version: Number of the weights then.
        """
        kept = {key: origin for key, origin in self._before.items() if key not in values}
        new = {
            key: self._origins[key]
            for key, value in values.items()
            if value.strategy == STRATEGY and key in self._origins
        }
        return Live(self._plan, version, {**kept, **new})


class _Digests:
    """Digests of what slots follow from, each taken once, of tied names under the first."""

    def __init__(self, plan: RefitPlan, source: WeightSource) -> None:
        """Read all of it."""
        self._twins = {name: tie for tie in plan.data.ties for name in tie}
        names = source.names()
        firsts = dict.fromkeys(self.first(name) for row in _followed(plan) for name in row.sources)
        given = {
            first: next((n for n in self._twins.get(first, (first,)) if n in names), None)
            for first in firsts
        }
        self._given = {first: name for first, name in given.items() if name is not None}
        self._digests = {first: known_by(name, source) for first, name in self._given.items()}

    def first(self, name: str) -> str:
        """The first of a tensor's names."""
        return self._twins.get(name, (name,))[0]

    def origin(self, row: LedgerRow) -> Origin:
        """What a value is computed from."""
        firsts = {self.first(name) for name in row.sources}
        return frozenset((n, self._digests[n]) for n in firsts if n in self._digests)

    def names_of(self, origins: Iterable[tuple[str, Hashable]]) -> Iterator[str]:
        """The names under which the source has them."""
        return (self._given[first] for first, _ in origins)


def _followed(plan: RefitPlan) -> Iterator[LedgerRow]:
    """Rows of which a plan knows what they follow from.

    Slots that calls of the module change are not among them: what was written is not what is live.
    """
    mutated = {leaf.fqn for leaf in plan.data.leaves if leaf.mutated}
    for row in plan.data.ledger:
        if row.value is not None and not row.slot.mutable and mutated.isdisjoint(row.sources):
            yield row


def known_by(name: str, source: WeightSource) -> Hashable:
    """What tells an entry of a source from all others: its revision, or else its digest.

    Raises:
        SourceError: It cannot be read.
    """
    revision = source.revision(name) if isinstance(source, KnowsRevisions) else None
    return digest_of(name, source) if revision is None else ("revision", revision)


def digest_of(name: str, source: WeightSource) -> str:
    """What an entry of a source is: dtype, shape and 128 bits over its bytes in logical order.

    XXH3 is no cryptographic hash; whoever can choose weights need not deceive it to choose slots.

    Raises:
        SourceError: It cannot be read.
    """
    info = source.info(name)
    if info.unusable:
        return f"unusable: {info.unusable}"
    value = source.get(name).detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    raw = value.view(torch.uint8).numpy().data if value.numel() else b""
    return f"{info.dtype} {info.shape} {xxhash.xxh3_128_hexdigest(raw)}"
