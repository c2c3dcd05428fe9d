"""Find out where an engine keeps its weights.

Each element of each weight gets a number of its own. The engine is refitted to these numbers, by
TensorRT, and then its memory is searched for them. A number is written in digits, one refit for
each, because TensorRT must see only finite values. Then all is done again with the numbers in
reverse order: a word that holds a number by chance does not hold its opposite, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from refitkit.builtin.torch_tensorrt.direct.folds import Fold, folds_among
from refitkit.builtin.torch_tensorrt.direct.layout import EngineLayout
from refitkit.builtin.torch_tensorrt.direct.places import Place

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Refittable(Protocol):
    """An engine that TensorRT can refit, and whose memory is known."""

    def refit(self, values: Mapping[str, torch.Tensor]) -> None:
        """Have TensorRT refit it to values of all weights, flat, and wait for that."""

    def pieces(self) -> Sequence[torch.Tensor]:
        """Return all memory that TensorRT has asked for, as ``uint8``: aliases, in that order."""


class UnknownLayoutError(Exception):
    """Where the weights lie could not be found out; says why."""


@dataclass(frozen=True)
class Code:
    """How digits are written: as bits of finite numbers, none of them zero or denormal.

    Attributes:
        word: Integers as large as an element.
        first: Bits that stand for the digit 0.
        base: How many digits there are.
    """

    word: torch.dtype
    first: int
    base: int


_CODES = {4: Code(torch.int32, 0x2F800000, 1 << 28), 2: Code(torch.int16, 0x1000, 1 << 14)}
"""By size of an element in bytes: finite in float32, and in both float16 and bfloat16."""
_CODED = (torch.float32, torch.float16, torch.bfloat16)


def learn(engine: Refittable, values: Mapping[str, torch.Tensor]) -> EngineLayout:
    """Return where the weights of an engine lie. It holds other weights afterwards.

    Args:
        engine: The engine.
        values: Any values of its weights, flat, on its device.

    Returns:
        The layout. Integers, and single numbers that were not found, are ``fixed``.

    Raises:
        UnknownLayoutError: It could not be found out.
    """
    dtypes = {name: value.dtype for name, value in values.items()}
    # others were never measured
    folds = [fold for fold in folds_among(dtypes) if len({dtypes[n] for n in fold.names}) == 1]
    unplaced = {name for fold in folds for name in fold.unplaced}
    # changed integers could make a call read outside of a table
    fixed = {n for n, v in values.items() if not v.is_floating_point() or not v.numel()}
    coded = [name for name in values if name not in unplaced | fixed]
    odd = sorted(str(dtypes[n])[6:] for n in coded if dtypes[n] not in _CODED)
    if odd:
        raise UnknownLayoutError(f"it has weights of {odd[0]}")
    if not coded:
        raise UnknownLayoutError("it has no weights")
    search = _Search(engine, {**values, **_neutral(folds, values)}, coded)
    layout = search.layout(folds)
    # single numbers that TensorRT has put into its code, such as an eps
    lost = set(coded) - layout.places.keys()
    return replace(layout, fixed=frozenset(fixed | lost))


def _neutral(folds: Sequence[Fold], values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return means and variances with which a folded norm is its weight and its bias."""
    found = {}
    for fold in folds:
        found[fold.mean] = torch.zeros_like(values[fold.mean])
        eps = values[fold.eps].reshape(-1)[:1]
        var = 1 - eps
        # the neighbour with which the sum is exactly 1, if rounding does not make it so
        near = [torch.nextafter(var, var * 0), var, torch.nextafter(var, var * 0 + 2)]
        found[fold.var] = min(near, key=lambda v: float((v + eps - 1).abs())).expand_as(
            values[fold.var]
        )
    return found


class _Search:
    """Finds elements in an engine's memory."""

    def __init__(
        self, engine: Refittable, values: Mapping[str, torch.Tensor], coded: Sequence[str]
    ) -> None:
        self._engine, self._values = engine, values
        self._by_size = {
            size: [n for n in coded if values[n].dtype.itemsize == size] for size in _CODES
        }
        self._totals = {
            size: sum(values[n].numel() for n in names) for size, names in self._by_size.items()
        }

    def layout(self, folds: Sequence[Fold]) -> EngineLayout:
        found = self._places()
        coded = [name for names in self._by_size.values() for name in names]
        missing = [n for n in coded if n not in found and self._values[n].numel() > 1]
        if missing or not found:
            more = f", and those of {len(missing) - 1} more" if len(missing) > 1 else ""
            first = (missing or coded)[0]
            raise UnknownLayoutError(f"the elements of {first}{more} were not found")
        pieces = {piece for piece, _ in found.values()}
        if len(pieces) > 1:
            raise UnknownLayoutError("its weights lie in several pieces of memory")
        (piece,) = pieces
        return EngineLayout(
            piece=piece,
            nbytes=self._engine.pieces()[piece].numel(),
            places={name: place for name, (_, place) in found.items()},
            dtypes={name: self._values[name].dtype for name in found},
            folds=tuple(folds),
        )

    def _places(self) -> dict[str, tuple[int, Place]]:
        up, down = self._read(reverse=False), self._read(reverse=True)
        found: dict[str, tuple[int, Place]] = {}
        for size, names in self._by_size.items():
            total = self._totals[size]
            pairs = zip(up.get(size, []), down.get(size, []), strict=True)
            for piece, (one, other) in enumerate(pairs):
                where = ((one >= 0) & (one + other == total - 1)).nonzero().flatten()
                found |= self._in_piece(piece, names, one[where], where, total)
        return found

    def _in_piece(
        self,
        piece: int,
        names: Sequence[str],
        element: torch.Tensor,
        where: torch.Tensor,
        total: int,
    ) -> dict[str, tuple[int, Place]]:
        """Return the weights that lie whole and once in a piece, and at places that are affine."""
        at = torch.full((total,), -1, device=where.device)
        times = torch.zeros(total, dtype=torch.int32, device=where.device)
        at[element] = where
        times.index_add_(0, element, torch.ones_like(element, dtype=torch.int32))
        counts = [self._values[name].numel() for name in names]
        cut = at.split_with_sizes(counts), times.split_with_sizes(counts)
        parts = zip(names, *cut, strict=True)
        return {
            name: (piece, place)
            for name, part, often in parts
            if bool((often == 1).all()) and (place := Place.of(part)) is not None
        }

    def _read(self, *, reverse: bool) -> dict[int, list[torch.Tensor]]:
        """Return the number in each word of each piece, by size of words; -1: none."""
        found: dict[int, list[torch.Tensor]] = {}
        rounds = max(
            _digits(total, _CODES[size].base) for size, total in self._totals.items() if total
        )
        for place in range(rounds):
            self._engine.refit(self._numbered(place, reverse=reverse))
            for size in (size for size, total in self._totals.items() if total):
                code = _CODES[size]
                read = [self._digits_in(piece, code) for piece in self._engine.pieces()]
                before = found.setdefault(size, [])
                for number, digits in enumerate(read):
                    if place == 0:
                        before.append(digits)
                        continue
                    lost = (digits < 0) | (before[number] < 0)
                    before[number] += digits * code.base**place
                    before[number][lost] = -1
        return found

    @staticmethod
    def _digits_in(piece: torch.Tensor, code: Code) -> torch.Tensor:
        size = code.word.itemsize
        digits = piece[: piece.numel() // size * size].view(code.word).long() - code.first
        digits[(digits < 0) | (digits >= code.base)] = -1
        return digits

    def _numbered(self, place: int, *, reverse: bool) -> dict[str, torch.Tensor]:
        values = dict(self._values)
        for size, names in self._by_size.items():
            code, total, first = _CODES[size], self._totals[size], 0
            for name in names:
                value = values[name]
                numbers = torch.arange(first, first + value.numel(), device=value.device)
                first += value.numel()
                if reverse:
                    numbers = total - 1 - numbers
                bits = code.first + numbers // code.base**place % code.base
                values[name] = bits.to(code.word).view(value.dtype).view(value.shape)
        return values


def _digits(total: int, base: int) -> int:
    """Return how many digits the numbers up to a total have."""
    count = 1
    while base**count < total:
        count += 1
    return count
