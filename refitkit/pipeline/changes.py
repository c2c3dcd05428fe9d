"""How far a refit moves each slot, measured while old and new values lie side by side.

Off unless ``Config.changes`` asks for it, because it costs a tenth to a quarter of a refit.
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
from refitkit.pipeline.stage import live_reader
from refitkit.program.bits import flat_pair
from refitkit.program.distance import distance
from refitkit.protocols import ShowsStaged

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from refitkit.config import Config
    from refitkit.model import SlotKey
    from refitkit.pipeline.stage import Staged
    from refitkit.program.distance import Distance
    from refitkit.protocols import Engine, OpenedModule, StagedRefit

_RUNS, _RUN = 32, 32
"""A sample is this many runs of this many elements; a run is two cache lines of float32."""

SAMPLE = _RUNS * _RUN
"""Elements of a sample: norms of weights drawn alike are then right to a few percent."""

_SHOWN = 5
"""Most slots that a note names; the rows of the report have all."""

_FAILED = "How far the weights move cannot be measured"
_HINT = 'Config.changes="off" leaves this measurement out.'


@dataclass(frozen=True)
class Changes:
    """How far slots move.

    Attributes:
        how: ``Config.changes``.
        limit: ``Config.change_limit``.
        moved: The distance of each measured slot, and its number of elements.
    """

    how: str = "off"
    limit: float | None = None
    moved: Mapping[SlotKey, tuple[Distance, int]] = field(default_factory=dict)

    @property
    def differ(self) -> bool:
        """Whether any measured element differs."""
        return any(one.largest for one, _ in self.moved.values())

    @cached_property
    def rows(self) -> tuple[ChangeRow, ...]:
        """A row of the report for each measured slot."""
        sampled = self.how == "sampled"
        return tuple(
            ChangeRow(
                engine=engine,
                slot=slot,
                relative=one.relative,
                largest=one.largest,
                # a sample of a small slot is the whole slot
                sampled=sampled and count > SAMPLE,
            )
            for (engine, slot), (one, count) in self.moved.items()
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """A note on the slots that move farther than the limit, if there are any."""
        return tuple(_notes(self.rows, self.limit)) if self.limit is not None else ()


def measured(
    config: Config, module: OpenedModule, staged: Staged, written: Collection[SlotKey]
) -> Changes:
    """Measure all written slots whose engines show both values.

    Args:
        config: ``changes`` says how to measure, ``change_limit`` which moves are noted.
        module: The opened module.
        staged: The values that are staged in its engines.
        written: Slots that have a new value.

    Raises:
        EngineError: An engine failed to show a value, or memory ran out; nothing is live yet.
    """
    how = config.changes
    if how == "off":
        return Changes()
    slots: dict[str, list[str]] = defaultdict(list)
    for name, slot in written:
        slots[name].append(slot)
    moved: dict[SlotKey, tuple[Distance, int]] = {}
    with torch.no_grad(), raised_as(EngineError, _FAILED, hint=_HINT):
        for name, one in staged.waiting():
            engine = module.engines[name]
            for slot, pair in _pairs(engine, one, slots[name]):
                # flattened as a pair, so that a run has the same elements of both values
                looked_at = tuple(map(sample, flat_pair(*pair))) if how == "sampled" else pair
                moved[name, slot] = distance(*looked_at), engine.slots[slot].count
    return Changes(how, config.change_limit, moved)


def sample(flat: torch.Tensor) -> torch.Tensor:
    """At most ``SAMPLE`` elements of a dense flat tensor, in runs spread evenly over it."""
    count = flat.numel()
    if count <= SAMPLE:
        return flat
    # the last run starts at ``count - _RUN`` or before, so no run leaves the tensor
    step = (count - _RUN) // (_RUNS - 1)
    return flat.as_strided((_RUNS, _RUN), (step, 1), flat.storage_offset())


def _pairs(
    engine: Engine, staged: StagedRefit, slots: Iterable[str]
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Each slot with its old and its new value, if the engine shows both."""
    live = live_reader(engine)
    if live is None or not isinstance(staged, ShowsStaged):
        return
    for slot in slots:
        old = live(slot)
        if old is not None:
            yield slot, (old, staged.staged(slot))


def _notes(rows: Iterable[ChangeRow], limit: float) -> Iterator[str]:
    # a slot of zeros alone, as new biases are, is infinitely far from any value
    beyond = [row for row in rows if row.relative > limit and not _from_zeros(row)]
    beyond.sort(key=lambda row: row.relative, reverse=True)
    if beyond:
        shown = [f"{row.engine}/{row.slot} {row.relative:.3g} times" for row in beyond[:_SHOWN]]
        more = f", and {len(beyond) - _SHOWN} more" if len(beyond) > _SHOWN else ""
        slots = "1 slot" if len(beyond) == 1 else f"{len(beyond)} slots"
        what = f"{slots} changed beyond reason, by more than {limit:g} times the old length"
        yield f"{what}: {', '.join(shown)}{more}"


def _from_zeros(row: ChangeRow) -> bool:
    return math.isinf(row.relative) and not math.isinf(row.largest)
