"""How far a refit moves each slot, measured while old and new values lie side by side.

A look at everything would cost more than the refit, so mostly samples are looked at; see
``samples.py``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from refitkit.errors import EngineError, raised_as
from refitkit.model import ChangeRow
from refitkit.pipeline import samples
from refitkit.pipeline.samples import SAMPLE
from refitkit.program.distance import distance
from refitkit.protocols import RemembersWeights, ShowsMemory, ShowsStaged, SupportsReadback

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from refitkit.config import Config
    from refitkit.model import SlotKey
    from refitkit.pipeline.stage import Staged
    from refitkit.protocols import Engine, OpenedModule, StagedRefit

_SHOWN = 5
"""So many slots are named in a note; the report's rows have all."""

_FAILED = "How far the weights move cannot be measured"
_HINT = 'Config.changes="off" leaves this measurement out.'


@dataclass(frozen=True)
class Changes:
    """How far slots move.

    Attributes:
        how: ``Config.changes``.
        limit: ``Config.change_limit``.
        moved: By slot, ``relative`` and ``largest`` of :class:`ChangeRow`, and the number of
            elements.
    """

    how: str = "off"
    limit: float | None = None
    moved: Mapping[SlotKey, tuple[float, float, int]] = field(default_factory=dict)

    @property
    def seen(self) -> bool:
        """Whether any element that was looked at differs."""
        return any(largest for _, largest, _ in self.moved.values())

    @cached_property
    def rows(self) -> tuple[ChangeRow, ...]:
        """A row of the report for each slot."""
        sampled = self.how == "sampled"
        return tuple(
            ChangeRow(
                engine=engine,
                slot=slot,
                relative=relative,
                largest=largest,
                sampled=sampled and count > SAMPLE,
            )
            for (engine, slot), (relative, largest, count) in self.moved.items()
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Which slots changed beyond reason."""
        return tuple(_notes(self.rows, self.limit)) if self.limit is not None else ()


def measured(
    config: Config, module: OpenedModule, staged: Staged, written: Collection[SlotKey]
) -> Changes:
    """Measure all slots whose engines show both values.

    Args:
        config: ``changes`` says how, ``change_limit`` what is beyond reason.
        module: The opened module.
        staged: What is staged in its engines.
        written: Slots that have a new value.

    Raises:
        EngineError: An engine failed to show a value, or there is no memory; nothing is live yet.
    """
    how = config.changes
    if how == "off":
        return Changes()
    wanted: dict[str, list[str]] = defaultdict(list)
    for name, slot in written:
        wanted[name].append(slot)
    moved: dict[SlotKey, tuple[float, float, int]] = {}
    with torch.no_grad(), raised_as(EngineError, _FAILED, hint=_HINT):
        for name, one in staged.waiting():
            engine = module.engines[name]
            slots = engine.slots
            for slot, told in _of_engine(engine, one, wanted[name], how).items():
                moved[name, slot] = (*told, slots[slot].count)
    return Changes(how, config.change_limit, moved)


def _of_engine(
    engine: Engine, staged: StagedRefit, wanted: Sequence[str], how: str
) -> dict[str, tuple[float, float]]:
    """``relative`` and ``largest`` of slots of one engine, of those that can be measured."""
    both = staged.side_by_side() if how == "sampled" and isinstance(staged, ShowsMemory) else None
    if both is not None:
        found = samples.of_memory(both)
        return {slot: found[slot] for slot in wanted}
    pairs = dict(_pairs(engine, staged, wanted))
    if how == "sampled":
        return dict(zip(pairs, samples.of_pairs(list(pairs.values())), strict=True))
    told = {slot: distance(old, new) for slot, (old, new) in pairs.items()}
    return {slot: (one.relative, one.largest) for slot, one in told.items()}


def live_value(engine: Engine) -> Callable[[str], torch.Tensor | None] | None:
    """What tells the live value of a slot, read or remembered; None where nothing does."""
    if isinstance(engine, SupportsReadback):
        return engine.read
    return engine.remembered if isinstance(engine, RemembersWeights) else None


def _pairs(
    engine: Engine, staged: StagedRefit, wanted: Iterable[str]
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Slots with their old and their new values, as far as both are shown."""
    live = live_value(engine)
    if live is None or not isinstance(staged, ShowsStaged):
        return
    for slot in wanted:
        old = live(slot)
        if old is not None:
            yield slot, (old, staged.staged(slot))


def _notes(rows: Iterable[ChangeRow], limit: float) -> Iterator[str]:
    """Which slots changed beyond reason, the farthest first."""
    beyond = [row for row in rows if row.relative > limit and not _from_zeros(row)]
    beyond.sort(key=lambda row: row.relative, reverse=True)
    if beyond:
        shown = [f"{row.engine}/{row.slot} {row.relative:.3g} times" for row in beyond[:_SHOWN]]
        more = f", and {len(beyond) - _SHOWN} more" if len(beyond) > _SHOWN else ""
        slots = "1 slot" if len(beyond) == 1 else f"{len(beyond)} slots"
        what = f"{slots} changed beyond reason, by more than {limit:g} times the old length"
        yield f"{what}: {', '.join(shown)}{more}"


def _from_zeros(row: ChangeRow) -> bool:
    """Whether a slot held zeros alone, as new biases do: any value is infinitely far from them."""
    return math.isinf(row.relative) and not math.isinf(row.largest)
