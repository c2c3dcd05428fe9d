"""Distances of slots from samples of their elements: the time goes by slots, not by bytes.

At most ``SAMPLE`` elements of each slot are looked at, in runs that are spread evenly over it:
single elements would each cost a cache line. Samples of one dtype are rows of one matrix, and what
comes out is fetched once for each device.

An engine whose values lie in one piece of memory is sampled by reading that piece at places that
are worked out once. Of all others each slot is looked at on its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from refitkit.program.bits import flat_pair
from refitkit.program.distance import (
    from_norms,
    is_whole,
    looked_through_rows,
    norms_of_rows,
)
from refitkit.recipe.weak_cache import once_for_each

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from refitkit.protocols import Place, Places, SideBySide

_RUNS, _RUN = 32, 32
"""A sample is so many runs of so many elements, of float32 two cache lines each."""

SAMPLE = _RUNS * _RUN
"""Elements of a sample: of weights that are drawn alike, norms are then right to a few percent."""

_FEW = 64
"""On a CPU slots of at most so many elements have a matrix of their own: filling up takes time."""

_TOGETHER = 31
"""Samples that are put into one matrix. From 32,768 elements on (``at::internal::GRAIN_SIZE``)
torch would call other threads, which on a busy CPU costs more than it saves."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Moved: TypeAlias = tuple[float, float]
"""``relative`` and ``largest`` of a :class:`~refitkit.program.distance.Distance`."""

_STAYED: Moved = (0.0, 0.0)


# -- values that lie anywhere -------------------------------------------------------------------


def of_pairs(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[Moved]:
    """How far each pair of an old and a new value of one dtype and shape is apart."""
    samples = [_both(old, new) for old, new in pairs]
    groups: dict[object, list[int]] = defaultdict(list)
    for n, (x, y) in enumerate(samples):
        if x.numel():
            groups[x.dtype, x.shape, x.device, y.device].append(n)
    batches = [
        some[start : start + _TOGETHER]
        for some in groups.values()
        for start in range(0, len(some), _TOGETHER)
    ]
    found = [_STAYED for _ in pairs]
    told = _measured([_rows_of([samples[n] for n in batch]) for batch in batches])
    for batch, rows in zip(batches, told, strict=True):
        for n, moved in zip(batch, rows, strict=True):
            found[n] = moved
    return found


def _both(old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the same elements of both: all, or runs that are spread evenly."""
    if not (old.is_contiguous() and new.is_contiguous()):
        old, new = flat_pair(old, new)
    return sample(old), sample(new)


def sample(dense: torch.Tensor) -> torch.Tensor:
    """The sample of a dense tensor, a view."""
    count = dense.numel()
    if count <= SAMPLE:
        return dense.as_strided((count,), (1,))
    return dense.as_strided((_RUNS, _RUN), (_step(count), 1))


def _step(count: int) -> int:
    """How far it is from the beginning of one run to that of the next."""
    return (count - _RUN) // (_RUNS - 1)


def _rows_of(samples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> _Rows:
    """Samples of one dtype, shape and device, each one row."""
    old, new = (_matrix(side) for side in zip(*samples, strict=True))
    return _Rows(old.to(new.device), new, [new.shape[1]] * len(samples))


def _matrix(samples: Sequence[torch.Tensor]) -> torch.Tensor:
    dtype = samples[0].dtype
    if dtype.itemsize == 1:  # the 8-bit floats have few operations
        return torch.stack([s.view(torch.uint8) for s in samples]).flatten(1).view(dtype)
    return torch.stack(list(samples)).flatten(1)


# -- values that lie in one piece of memory -----------------------------------------------------


def of_memory(both: SideBySide) -> dict[str, Moved]:
    """How far the live and the staged value of every slot are apart, by its name."""
    matrices = _matrices_of(both.places)[both.staged.is_cuda]
    found = dict.fromkeys((place.slot for place in both.places.all), _STAYED)
    for one, told in zip(matrices, _measured([one.of(both) for one in matrices]), strict=True):
        found.update(zip(one.slots, told, strict=True))
    return found


class _Matrix:
    """Where in memory the samples of slots of one dtype are, a row for each.

    Attributes:
        slots: Their names.
    """

    def __init__(self, dtype: torch.dtype, width: int, places: Sequence[Place]) -> None:
        self.slots = [place.slot for place in places]
        self._sizes = [min(place.count, SAMPLE) for place in places]
        self._dtype, self._kind = dtype, _BITS.get(dtype.itemsize, dtype)
        counts = _column([place.count for place in places])
        first = _column([place.offset // dtype.itemsize for place in places])
        steps = _column([_step(place.count) for place in places])
        column = torch.arange(width, device="cpu")[None]
        run, element = column // _RUN, column % _RUN
        spread = steps * run + element
        self._beyond = column >= counts
        self._indices = (first + torch.where(counts > SAMPLE, spread, column)).where(
            ~self._beyond, first
        )
        self._ready: dict[torch.device, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def of(self, both: SideBySide) -> _Rows:
        """Samples of the live and of the staged values, where the staged ones are."""
        live, staged = self._read(both.live), self._read(both.staged)
        return _Rows(live.to(staged.device), staged, self._sizes)

    def _read(self, memory: torch.Tensor) -> torch.Tensor:
        """Rows that are filled up with zeros, which change no norm."""
        if memory.device not in self._ready:
            beyond = self._beyond.to(memory.device) if self._beyond.any() else None
            self._ready[memory.device] = self._indices.to(memory.device), beyond
        indices, beyond = self._ready[memory.device]
        size = self._kind.itemsize
        found = memory[: memory.numel() // size * size].view(self._kind).take(indices)
        return (found if beyond is None else found.masked_fill_(beyond, 0)).view(self._dtype)


def _column(numbers: Sequence[int]) -> torch.Tensor:
    """A column on the CPU, whatever the default device is now: it is kept."""
    return torch.tensor(numbers, device="cpu")[:, None]


@once_for_each
def _matrices_of(places: Places) -> Mapping[bool, tuple[_Matrix, ...]]:
    """Matrices for a CPU and, as each takes many launches, few for a GPU."""
    return {
        cuda: tuple(_matrices(places.all, (SAMPLE,) if cuda else (_FEW, SAMPLE)))
        for cuda in (False, True)
    }


def _matrices(places: Iterable[Place], widths: Sequence[int]) -> Iterator[_Matrix]:
    groups: dict[tuple[torch.dtype, int], list[Place]] = defaultdict(list)
    for place in places:
        if place.count:
            fitting = (width for width in widths if place.count <= width)
            groups[place.dtype, next(fitting, widths[-1])].append(place)
    for (dtype, width), some in groups.items():
        yield _Matrix(dtype, width, some)


# -- both -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Rows:
    """Samples of one dtype: rows of two matrices of one device.

    Attributes:
        old: Those of old values.
        new: Those of new ones.
        sizes: How many elements of each row count; zeros fill it up.
    """

    old: torch.Tensor
    new: torch.Tensor
    sizes: Sequence[int]

    def told_by(self, norms: Sequence[Sequence[float]]) -> list[Moved]:
        """How far the two of each row are apart: mostly their norms tell, else their elements."""
        found, lost, dtype = list[Moved](), list[int](), self.new.dtype
        plain = not is_whole(dtype)
        for some, size in zip(norms, self.sizes, strict=True):
            apart, length, largest, _ = some
            moved = _STAYED
            if plain and length and apart and math.isfinite(apart + length + largest):
                moved = apart / length, largest
            elif plain and not apart and not largest:
                pass  # no element has moved, however large they are
            elif told := from_norms(some, dtype, size):
                moved = told.relative, told.largest
            else:
                lost.append(len(found))
            found.append(moved)
        if lost:
            rows = torch.tensor(lost, device=self.new.device)
            looked = looked_through_rows(self.old[rows], self.new[rows])
            for row, told in zip(lost, looked, strict=True):
                found[row] = told.relative, told.largest
        return found


def _measured(matrices: Sequence[_Rows]) -> Iterator[list[Moved]]:
    """How far the two of each row of each of them are apart."""
    sums = [norms_of_rows(one.old, one.new, count=False) for one in matrices]
    for one, norms in zip(matrices, _fetched(sums), strict=True):
        yield one.told_by(norms)


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
