"""What of a module is live, by digest, so that the next refit writes only what changed.

A slot is unchanged where everything that its value follows from has the same bits as when the slot
was last written, by the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
import xxhash

from refitkit.protocols import SupportsPartial
from refitkit.recipe.plan import STRATEGY

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from refitkit.model import LedgerRow
    from refitkit.protocols import OpenedModule, SlotValue, WeightSource
    from refitkit.recipe import RefitPlan

Key: TypeAlias = tuple[str, str]
"""``(engine, slot)``."""

Origin: TypeAlias = frozenset[tuple[str, str]]
"""What a value was computed from: names of tensors, and digests of what they were."""


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
    origins: Mapping[Key, Origin]

    def holds_for(self, plan: RefitPlan, version: int) -> bool:
        """Whether this is of the present weights, and of what a plan would compute."""
        return version == self.version and (plan is self.plan or plan.data == self.plan.data)


class Delta:
    """A source held against what is live.

    Attributes:
        unchanged: Slots that hold already what the source has for them, in engines that can be
            refitted in part; none where a guard of the plan is broken.
    """

    def __init__(
        self,
        plan: RefitPlan,
        module: OpenedModule,
        source: WeightSource,
        live: Live | None,
        version: int,
    ) -> None:
        """Read the source once, all that slots follow from.

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
        self._origins = dict(_origins(plan, source))
        whole = {n for n, e in module.engines.items() if not isinstance(e, SupportsPartial)}
        broken = bool(plan.data.guards) and bool(plan.broken_guards(source))
        self.unchanged = frozenset(
            key
            for key, origin in self._origins.items()
            if key[0] not in whole and not broken and self._before.get(key) == origin
        )

    def after(self, values: Mapping[Key, SlotValue], version: int) -> Live:
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


def _origins(plan: RefitPlan, source: WeightSource) -> Iterable[tuple[Key, Origin]]:
    """Of every slot of which a plan knows what it follows from.

    Slots that calls of the module change are not among them: what was written is not what is live.
    """
    names, twins = source.names(), {name: tie for tie in plan.data.ties for name in tie}
    mutated = {leaf.fqn for leaf in plan.data.leaves if leaf.mutated}
    digests: dict[str, str] = {}

    def digest(first: str) -> str | None:
        given = next((name for name in twins.get(first, (first,)) if name in names), None)
        if given is not None and first not in digests:
            digests[first] = digest_of(given, source)
        return digests.get(first)

    for row in plan.data.ledger:
        if not _is_followed(row) or not mutated.isdisjoint(row.sources):
            continue
        followed = {twins.get(name, (name,))[0] for name in row.sources}
        found = {name: digest(name) for name in followed}
        yield row.slot.key, frozenset((n, d) for n, d in found.items() if d is not None)


def _is_followed(row: LedgerRow) -> bool:
    return row.value is not None and not row.slot.mutable


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
