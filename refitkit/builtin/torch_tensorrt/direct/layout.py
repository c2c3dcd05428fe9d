"""Where an engine keeps its weights: a few integers for each.

TensorRT puts all weights of an engine into one piece of memory. The place of an element is an
affine function of its index: a start, and a stride for each digit of the index. A linear weight may
lie transposed, a convolution's kernel with its channels last, two weights side by side.

A batch norm is folded: a scale and a shift for each channel lie where its weight and bias would be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from refitkit.errors import Problem, UnsupportedTargetError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

MAX_DIGITS = 8


@dataclass(frozen=True)
class Place:
    """Where the elements of one weight lie, in elements of its dtype from the start of the piece.

    Attributes:
        start: Where its first element lies.
        digits: Count and stride of each digit of an element's index, the fastest digit first.
    """

    start: int
    digits: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, where: torch.Tensor) -> Place | None:
        """Return the place of a weight whose elements were found; None if it is not affine.

        Args:
            where: Where each element lies, in the order of their indices; at least one.
        """
        digits: list[tuple[int, int]] = []
        rest = where
        while rest.numel() > 1:
            stride = rest[1] - rest[0]
            breaks = (rest.diff() != stride).nonzero()
            count = int(breaks[0]) + 1 if len(breaks) else rest.numel()
            if rest.numel() % count or len(digits) == MAX_DIGITS:
                return None
            rows = rest.view(-1, count)
            if not torch.equal(rows, rows[:, :1] + stride * torch.arange(count).to(rows)):
                return None
            digits.append((count, int(stride)))
            rest = rows[:, 0]
        found = cls(int(where[0]), tuple(digits))
        return found if found.is_injective() else None

    @property
    def count(self) -> int:
        """Number of elements."""
        count = 1
        for size, _ in self.digits:
            count *= size
        return count

    @property
    def end(self) -> int:
        """Where the last element ends."""
        return self.start + sum((size - 1) * stride for size, stride in self.digits) + 1

    def is_injective(self) -> bool:
        """Return whether no two elements lie at one place. Strides have to be positive."""
        reach = 0  # of the digits with smaller strides
        for size, stride in sorted(self.digits, key=lambda digit: digit[1]):
            if stride <= reach or size <= 1:
                return False
            reach += (size - 1) * stride
        return True

    def of_piece(self, words: torch.Tensor) -> torch.Tensor:
        """Return the elements as a view of the piece, with the slowest digit first.

        Args:
            words: The whole piece as elements of the weight's dtype.
        """
        sizes = [size for size, _ in reversed(self.digits)]
        strides = [stride for _, stride in reversed(self.digits)]
        return words.as_strided(sizes, strides, words.storage_offset() + self.start)


@dataclass(frozen=True)
class Fold:
    """A batch norm that TensorRT folds: names of its weights in the engine.

    In memory, ``weight`` is ``weight / sqrt(var + eps)``, each step rounded to the norm's dtype,
    and ``bias`` is ``bias - mean * scale`` with that scale, computed in float64 and rounded once.
    Measured with TensorRT-RTX 1.4, in float32 and float16.
    """

    weight: str
    bias: str
    mean: str
    var: str
    eps: str

    def scale(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return what lies where the weight would be, flat."""
        weight, var, eps = (values[n].reshape(-1) for n in (self.weight, self.var, self.eps))
        # by float64: a root of float32 is not rounded correctly everywhere
        return weight / (var + eps).double().sqrt().to(weight.dtype)

    def shift(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return what lies where the bias would be, flat."""
        bias, mean = (values[n].reshape(-1) for n in (self.bias, self.mean))
        wide = bias.double() - mean.double() * self.scale(values).double()
        return wide.to(bias.dtype)

    @property
    def unplaced(self) -> tuple[str, str, str]:
        """The weights that have no place of their own."""
        return self.mean, self.var, self.eps


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

    @property
    def span(self) -> tuple[int, int]:
        """First byte of all weights in the piece, and the end."""
        sizes = {name: dtype.itemsize for name, dtype in self.dtypes.items()}
        first = min(place.start * sizes[name] for name, place in self.places.items())
        last = max(place.end * sizes[name] for name, place in self.places.items())
        return first, last

    def check(self, counts: Mapping[str, int]) -> None:
        """Check that writing by this layout changes nothing but the weights of an engine.

        Args:
            counts: Number of elements of each weight of the engine, by name.

        Raises:
            UnsupportedTargetError: It would; lists all problems.
        """
        problems = list(self._problems(counts))
        if not problems and self._overlaps():
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

    def _overlaps(self) -> bool:
        return bool((self._owners(torch.device("cpu")) > 1).any())

    def gaps(self, device: torch.device) -> list[tuple[int, int]]:
        """Return the bytes of the piece between weights that are no weight's: starts and ends.

        Args:
            device: Where to compute them.
        """
        first, _ = self.span
        free = self._owners(device) == 0
        edges = (free[1:] != free[:-1]).nonzero().flatten() + 1 + first
        return [(start, end) for start, end in edges.view(-1, 2).tolist()]

    def _owners(self, device: torch.device) -> torch.Tensor:
        """Return how many weights each byte of the span is of."""
        first, last = self.span
        taken = torch.zeros(last - first, dtype=torch.uint8, device=device)
        for name, place in self.places.items():
            size = self.dtypes[name].itemsize
            # the bytes of an element are one more digit, with stride 1
            digits = ((size, 1), *((count, stride * size) for count, stride in place.digits))
            one = Place(place.start * size - first, digits if size > 1 else place.digits)
            one.of_piece(taken).add_(1)
        return taken

    def views(self, piece: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return each placed weight as a view of a piece, by name; see ``Place.of_piece``.

        Args:
            piece: The piece, or a copy of it, as ``uint8``.
        """
        words = {dtype: _as(piece, dtype) for dtype in set(self.dtypes.values())}
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


def _as(piece: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    size = dtype.itemsize
    return piece[: piece.numel() // size * size].view(dtype)


_ENDS = ("weight", "bias", "running_mean", "running_var", "eps")
"""What the names of a norm's weights end with, in the order of ``Fold``."""


def folds_among(names: Iterable[str]) -> tuple[Fold, ...]:
    """Return the batch norms that names of weights tell of; a proof shows if they are folded.

    Torch-TensorRT calls the weights of a norm ``..._weight``, ``..._bias``, ``..._running_mean``,
    ``..._running_var`` and ``..._eps``, each with something behind it.
    """
    names, found = sorted(names), []
    for mean in names:
        stem, is_mean, _ = mean.partition("_running_mean")
        alike = {end: [n for n in names if n.startswith(f"{stem}_{end}")] for end in _ENDS}
        if is_mean and all(len(some) == 1 for some in alike.values()):
            found.append(Fold(*(alike[end][0] for end in _ENDS)))
    return tuple(found)
