"""Where all weights of an engine lie, and how they are written there.

TensorRT puts all of them into one piece of memory. A batch norm is folded: a scale and a shift for
each channel lie where its weight and bias would be; see ``folds``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from refitkit.builtin.torch_tensorrt.direct.places import Place, words_of
from refitkit.errors import Problem, UnsupportedTargetError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from refitkit.builtin.torch_tensorrt.direct.folds import Fold


class Parts(NamedTuple):
    """All bytes of weights in a piece: what a commit copies.

    Attributes:
        ranges: First byte and end of ranges that are full of weights.
        scattered: Place and dtype of weights with gaps between their elements, as where channels
            are padded. Such a weight can have 100,000 ranges of a few bytes.
    """

    ranges: list[tuple[int, int]]
    scattered: list[tuple[Place, torch.dtype]]


_FEW = 256
"""So many ranges are copied as fast as one."""
_SHORT = 1 << 10
"""Bytes of a range below which the gaps cost more than the copy."""


@dataclass(frozen=True)
class EngineLayout:
    """Where all weights of an engine lie.

    Attributes:
        piece: Number of the piece of memory, in the order in which TensorRT asked for them.
        nbytes: Size of that piece.
        places: Place of each weight, by name.
        dtypes: Dtype of each of them, by name.
        folds: Folded batch norms.
        fixed: Weights that keep their values. If one of them changes, TensorRT has to refit.
    """

    piece: int
    nbytes: int
    places: Mapping[str, Place]
    dtypes: Mapping[str, torch.dtype]
    folds: tuple[Fold, ...] = ()
    fixed: frozenset[str] = frozenset()

    @cached_property
    def span(self) -> tuple[int, int]:
        """First byte of all weights in the piece, and the end."""
        sizes = {name: dtype.itemsize for name, dtype in self.dtypes.items()}
        first = min(place.start * sizes[name] for name, place in self.places.items())
        last = max(place.end * sizes[name] for name, place in self.places.items())
        return first, last

    def check(self, counts: Mapping[str, int], device: torch.device) -> None:
        """Check that writing by this layout changes nothing but the weights of an engine.

        Args:
            counts: Number of elements of each weight of the engine, by name.
            device: Where to look for overlaps.

        Raises:
            UnsupportedTargetError: It would; lists all problems.
        """
        problems = list(self._problems(counts))
        if not problems and bool((self._owners(self.places, device) > 1).any()):
            problems = [Problem("places", "overlap")]
        if problems:
            raise UnsupportedTargetError(
                "The layout of the engine's weights is not that of this engine.", problems=problems
            )

    def _problems(self, counts: Mapping[str, int]) -> Iterator[Problem]:
        unplaced = {name for fold in self.folds for name in fold.unplaced} | self.fixed
        for name in sorted(counts.keys() ^ (self.places.keys() | unplaced)):
            yield Problem(name, "no place" if name in counts else "no such weight")
        for name, place in self.places.items():
            if not place.is_injective():
                yield Problem(name, "two elements at one place")
            if name in counts and place.count != counts[name]:
                yield Problem(name, "elements", str(place.count), str(counts[name]))
            end = place.end * self.dtypes[name].itemsize
            if place.start < 0 or end > self.nbytes:
                yield Problem(name, "outside the memory of the weights")

    def parts(self, device: torch.device) -> Parts:
        """Return what there is to copy of a piece.

        Args:
            device: Where to compute it.
        """
        ranges = self._ranges(self.places, device)
        scattered = self._scattered(ranges) if len(ranges) > _FEW else set()
        if scattered:
            ranges = self._ranges(self.places.keys() - scattered, device)
        return Parts(
            [(start, end) for start, end in ranges.tolist()],
            [(self.places[name], self.dtypes[name]) for name in sorted(scattered)],
        )

    def _scattered(self, ranges: torch.Tensor) -> set[str]:
        """Names of weights with bytes in short ranges, and gaps inside.

        Neighbours that fill each other's gaps have none.
        """
        short = ranges[(ranges.diff(dim=1) < _SHORT).flatten()] - self.span[0]
        steps = torch.zeros(self.span[1] - self.span[0] + 1, dtype=torch.int8, device=ranges.device)
        steps[short[:, 0]] = 1
        steps[short[:, 1]] = -1  # no range begins where another one ends
        is_short = steps.cumsum(0, dtype=torch.int8)
        return {
            name
            for name, place in self.places.items()
            if place.run * self.dtypes[name].itemsize < _SHORT < place.count
            and bool(self._bytes_of(name, is_short).any())
        }

    def _ranges(self, names: Collection[str], device: torch.device) -> torch.Tensor:
        """First byte and end, as rows, of the ranges of the piece that are full of weights."""
        taken = torch.nn.functional.pad((self._owners(names, device) > 0).to(torch.int8), (1, 1))
        return taken.diff().nonzero().view(-1, 2) + self.span[0]

    def _owners(self, names: Collection[str], device: torch.device) -> torch.Tensor:
        """Return how many of these weights each byte of the span is of."""
        first, last = self.span
        taken = torch.zeros(last - first, dtype=torch.uint8, device=device)
        for name in names:
            self._bytes_of(name, taken).add_(1)
        return taken

    def _bytes_of(self, name: str, span: torch.Tensor) -> torch.Tensor:
        """The bytes of a weight as a view of those of the span."""
        place, size = self.places[name], self.dtypes[name].itemsize
        # the bytes of an element are one more digit, with stride 1
        digits = ((size, 1), *((count, stride * size) for count, stride in place.digits))
        one = Place(place.start * size - self.span[0], digits if size > 1 else place.digits)
        return one.of_piece(span)

    def views(self, piece: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return each placed weight as a view of a piece, by name; see ``Place.of_piece``.

        Args:
            piece: The piece, or a copy of it, as ``uint8``.
        """
        words = {dtype: words_of(piece, dtype) for dtype in set(self.dtypes.values())}
        return {n: place.of_piece(words[self.dtypes[n]]) for n, place in self.places.items()}

    def folded(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what lies in memory for each placed weight, of given values of all weights."""
        found = {name: values[name] for name in self.places}
        for fold in self.folds:
            found[fold.weight], found[fold.bias] = fold.scale(values), fold.shift(values)
        return found

    def write(self, piece: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """Write values of all weights to where they lie.

        Args:
            piece: The piece, or a copy of it, as ``uint8``.
            values: Value of each weight, in any shape.
        """
        found = self.folded(values)
        for name, view in self.views(piece).items():
            view.copy_(found[name].reshape(view.shape))

    def written(self, piece: torch.Tensor, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return a copy of a piece that holds other values; see ``write``."""
        whole = piece.clone()
        self.write(whole, values)
        return whole
