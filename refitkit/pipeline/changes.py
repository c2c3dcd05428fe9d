"""How far a refit moves each slot, measured while old and new values lie side by side.

A look at everything would cost more than the refit. So at most ``SAMPLE`` elements of each slot are
looked at, in runs that are spread evenly over it: single elements would each cost a cache line.
Samples of one dtype, size and device are rows of one matrix, and what comes out is fetched once for
each device: the time goes by slots, not by bytes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from refitkit.errors import EngineError, raised_as
from refitkit.model import ChangeRow, SlotKey
from refitkit.program.bits import flat_pair
from refitkit.program.distance import (
    Distance,
    distance,
    from_norms,
    looked_through,
    norms_of_rows,
)
from refitkit.protocols import RemembersWeights, ShowsStaged, SupportsReadback

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from refitkit.config import Config
    from refitkit.pipeline.stage import Staged
    from refitkit.protocols import Engine, OpenedModule

Pair: TypeAlias = tuple[SlotKey, torch.Tensor, torch.Tensor]
"""A slot with its old and its new value."""

_RUNS, _RUN = 32, 32
"""A sample is so many runs of so many elements, of float32 two cache lines each."""

SAMPLE = _RUNS * _RUN
"""Elements of a sample: of weights that are drawn alike, norms are then right to a few percent."""

_TOGETHER = 31
"""Samples that are put into one matrix. From 32,768 elements on (``at::internal::GRAIN_SIZE``)
torch would call other threads, which on a busy CPU costs more than it saves."""

_SHOWN = 5
"""So many slots are named in a note; the report's rows have all."""

_FAILED = "How far the weights move cannot be measured"
_HINT = 'Config.changes="off" leaves this measurement out.'


@dataclass(frozen=True)
class Changes:
    """What a report says of how far slots move.

    Attributes:
        rows: One for each slot that could be measured.
        notes: Which of them changed beyond reason.
    """

    rows: tuple[ChangeRow, ...] = ()
    notes: tuple[str, ...] = ()


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
    if config.changes == "off":
        return Changes()
    measure = _exact if config.changes == "exact" else _sampled
    with torch.no_grad(), raised_as(EngineError, _FAILED, hint=_HINT):
        pairs = list(_pairs(module, staged, written))
        rows = tuple(map(_row, pairs, measure(pairs), [config.changes] * len(pairs)))
    return Changes(rows, tuple(_notes(rows, config.change_limit)))


def live_value(engine: Engine) -> Callable[[str], torch.Tensor | None] | None:
    """What tells the live value of a slot, read or remembered; None where nothing does."""
    if isinstance(engine, SupportsReadback):
        return engine.read
    return engine.remembered if isinstance(engine, RemembersWeights) else None


def _pairs(module: OpenedModule, staged: Staged, written: Collection[SlotKey]) -> Iterator[Pair]:
    by_engine: dict[str, list[SlotKey]] = defaultdict(list)
    for key in written:
        by_engine[key[0]].append(key)
    for name, one in staged.waiting():
        live = live_value(module.engines[name])
        if live is None or not isinstance(one, ShowsStaged):
            continue
        for key in by_engine[name]:
            old = live(key[1])
            if old is not None:
                yield key, old, one.staged(key[1])


def _row(pair: Pair, found: Distance, how: str) -> ChangeRow:
    (engine, slot), old, _ = pair
    return ChangeRow(
        engine=engine,
        slot=slot,
        relative=found.relative,
        largest=found.largest,
        sampled=how == "sampled" and old.numel() > SAMPLE,
    )


def _notes(rows: Iterable[ChangeRow], limit: float | None) -> Iterator[str]:
    """Which slots changed beyond reason, the farthest first."""
    if limit is None:
        return
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


def _exact(pairs: Sequence[Pair]) -> list[Distance]:
    """The distance of each slot, from all its elements."""
    return [distance(old, new) for _, old, new in pairs]


# -- samples ------------------------------------------------------------------------------------


def _sampled(pairs: Sequence[Pair]) -> list[Distance]:
    """The distance of each slot, from at most ``SAMPLE`` of its elements."""
    samples = [_samples(old, new) for _, old, new in pairs]
    groups: dict[object, list[int]] = defaultdict(list)
    for n, (x, y) in enumerate(samples):
        if x.numel():
            groups[x.dtype, x.shape, x.device, y.device].append(n)
    batches = [
        some[start : start + _TOGETHER]
        for some in groups.values()
        for start in range(0, len(some), _TOGETHER)
    ]
    sums = [_of_batch([samples[n] for n in batch]) for batch in batches]
    found = [Distance() for _ in pairs]
    for batch, columns in zip(batches, _fetched(sums), strict=True):
        for n, some in zip(batch, columns, strict=True):
            x, y = samples[n]
            found[n] = from_norms(some, x.dtype, x.numel()) or looked_through(x, y)
    return found


def _samples(old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the same elements of both: all, or runs that are spread evenly."""
    if not (old.is_contiguous() and new.is_contiguous()):
        old, new = flat_pair(old, new)
    return _sample(old), _sample(new)


def _sample(dense: torch.Tensor) -> torch.Tensor:
    count = dense.numel()
    if count <= SAMPLE:
        return dense.as_strided((count,), (1,))
    return dense.as_strided((_RUNS, _RUN), ((count - _RUN) // (_RUNS - 1), 1))


def _of_batch(samples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Norms of samples of one dtype, shape and device, each one row."""
    x, y = (_matrix(side) for side in zip(*samples, strict=True))
    return norms_of_rows(x.to(y.device), y, count=False)


def _matrix(samples: Sequence[torch.Tensor]) -> torch.Tensor:
    dtype = samples[0].dtype
    if dtype.itemsize == 1:  # the 8-bit floats have few operations
        return torch.stack([s.view(torch.uint8) for s in samples]).flatten(1).view(dtype)
    return torch.stack(list(samples)).flatten(1)


def _fetched(sums: Sequence[torch.Tensor]) -> list[list[list[float]]]:
    """Matrices as lists of their columns, fetched once from each device."""
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for n, one in enumerate(sums):
        by_device[one.device].append(n)
    found: list[list[list[float]]] = [[] for _ in sums]
    for numbers in by_device.values():
        columns = iter(torch.cat([sums[n] for n in numbers], dim=1).T.tolist())
        for n in numbers:
            found[n] = [next(columns) for _ in range(sums[n].shape[1])]
    return found
