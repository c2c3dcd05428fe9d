"""Several sources as one: each tensor is made of theirs when it is read."""

from __future__ import annotations

from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from refitkit.builtin.merges.aligning import (
    all_misfits,
    infos_of,
    place_of,
    read_as,
    twins_where_needed,
)
from refitkit.builtin.merges.arithmetic import is_summed
from refitkit.builtin.merges.keeping import Made
from refitkit.errors import SourceError
from refitkit.program.bits import same_bits
from refitkit.protocols import HasNamings, KnowsRevisions, MayChange
from refitkit.recipe.sources import require_reread
from refitkit.recipe.ties import name_in

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterator, Sequence

    from refitkit.model import TensorInfo
    from refitkit.protocols import WeightSource


@dataclass(frozen=True)
class Formula:
    """How tensors of several parts become one.

    Attributes:
        kind: Its name, for revisions.
        numbers: One for each part.
        counts: Positions of the parts that have a say; the first of them gives the device.
        keeps_equal: Whether the result is what all parts that count have, where that is the same.
        make: Makes it of the numbers and tensors of the parts that count.
    """

    kind: str
    numbers: tuple[float, ...]
    counts: tuple[int, ...]
    keeps_equal: bool
    make: Callable[[Sequence[float], Iterator[torch.Tensor]], torch.Tensor]


class Merged:
    """Parts that have the same names, dtypes and shapes, as one source.

    Nothing is kept, but by what ``keeping`` gives: what is read twice is made twice. While a tensor
    is made, the tensor of one part at a time is read; its sum in float32 or float64, and a byte for
    each element, are held.
    """

    def __init__(self, parts: Sequence[WeightSource], formula: Formula, description: str) -> None:
        """Hold the parts against one another.

        Raises:
            SourceError: They do not fit together; lists all names.
        """
        self.description = description
        self._parts, self._formula = tuple(parts), formula
        self._infos, self._twins = _aligned(self._parts, description)
        self._verdicts: dict[str, str] = {}
        self._made = Made(0)

    def names(self) -> Collection[str]:
        """Names of the first part; what a state_dict would not hold only where all have it."""
        return self._infos.keys()

    def info(self, fqn: str) -> TensorInfo:
        """Dtype and shape, as in all parts.

        What cannot be calculated with has to be the same in all parts, or is unusable: so data of
        integers, bools and 8-bit floats is read, once. Of others headers are enough.
        """
        info = self._infos[fqn]
        if info.unusable or is_summed(info.dtype):
            return info
        if fqn not in self._verdicts:
            same = self._is_same(fqn, info)
            self._verdicts[fqn] = "" if same else f"{info.dtype} that is not the same in all parts"
        return info.model_copy(update={"unusable": self._verdicts[fqn]})

    def get(self, fqn: str) -> torch.Tensor:
        """The tensor, made now; that of a part where no other has a say."""
        info = self.info(fqn)
        if info.unusable:
            raise SourceError(f"{self.description}: {fqn!r} is unusable: {info.unusable}.")
        if not is_summed(info.dtype):
            return self._read(0, fqn, info)
        if self._is_one(fqn):
            return self._read(self._formula.counts[0], fqn, info)
        return self._made.get(fqn, lambda: self._make(fqn, info))

    def ties(self) -> Collection[tuple[str, ...]]:
        """Names that are one tensor in all parts; see ``refitkit.protocols.KnowsTies``."""
        own = {tie for tie in self._twins.values() if sum(name in self._infos for name in tie) > 1}
        return [tuple(name for name in tie if name in self._infos) for tie in own]

    def namings(self) -> Collection[WeightSource]:
        """By each set of names that parts have; see ``refitkit.protocols.HasNamings``."""
        sets = [one.namings() if isinstance(one, HasNamings) else () for one in self._parts]
        merges = []
        for number in range(max(map(len, sets))):
            parts = [
                list(names)[min(number, len(names) - 1)] if names else part
                for names, part in zip(sets, self._parts, strict=True)
            ]
            with suppress(SourceError):  # parts that fit together by other names only
                merges.append(Merged(parts, self._formula, self.description))
                merges[-1]._made = self._made.like()  # noqa: SLF001 - it is one of these
        return merges

    def keeping(self, limit: int | None) -> Merged:
        """The same, which keeps what it makes; see ``refitkit.protocols.KeepsMade``."""
        one = copy(self)
        one._made = Made(limit)  # noqa: SLF001 - it is one of these
        return one

    def _make(self, fqn: str, info: TensorInfo) -> torch.Tensor:
        counts, numbers = self._formula.counts, self._formula.numbers
        with torch.no_grad():
            values = (self._read(place, fqn, info) for place in counts)
            return self._formula.make([numbers[place] for place in counts], values)

    def revision(self, fqn: str) -> Hashable | None:
        """Made of the revisions of all parts that have a say, if each has one."""
        formula, summed = self._formula, is_summed(self._infos[fqn].dtype)
        places = formula.counts if summed else range(len(self._parts))
        revisions = tuple(self._revision(place, fqn) for place in places)
        if None in revisions:
            return None
        if self._is_one(fqn) if summed else len(set(revisions)) == 1:
            return revisions[0]
        numbers = tuple(formula.numbers[place] for place in places) if summed else ()
        return (formula.kind if summed else "the same", numbers, revisions)

    def require_unchanged(self) -> None:
        """Ask all parts; see ``refitkit.protocols.MayChange``."""
        for part in self._parts:
            if isinstance(part, MayChange):
                part.require_unchanged()

    def reread(self) -> None:
        """Ask all parts; see ``refitkit.protocols.SupportsReread``."""
        for part in self._parts:
            require_reread(part)

    def _is_one(self, fqn: str) -> bool:
        """Whether the result is the tensor of the first part that counts, untouched."""
        first, *others = self._formula.counts
        if not others:
            return self._formula.numbers[first] == 1
        return self._formula.keeps_equal and self._have_one_revision(fqn, self._formula.counts)

    def _is_same(self, fqn: str, info: TensorInfo) -> bool:
        """Whether all parts have the same bits."""
        others = range(1, len(self._parts))
        if self._have_one_revision(fqn, (0, *others)):
            return True
        first = self._read(0, fqn, info)
        return all(same_bits(first, self._read(place, fqn, info)) for place in others)

    def _have_one_revision(self, fqn: str, places: Sequence[int]) -> bool:
        first = self._revision(places[0], fqn)
        return first is not None and all(self._revision(p, fqn) == first for p in places[1:])

    def _revision(self, place: int, fqn: str) -> Hashable | None:
        part = self._parts[place]
        if not isinstance(part, KnowsRevisions):
            return None
        return part.revision(name_in(part.names(), fqn, self._twins) or fqn)

    def _read(self, place: int, fqn: str, info: TensorInfo) -> torch.Tensor:
        part = self._parts[place]
        return read_as(info, part, name_in(part.names(), fqn, self._twins) or fqn)


def _aligned(
    parts: Sequence[WeightSource], what: str
) -> tuple[dict[str, TensorInfo], dict[str, tuple[str, ...]]]:
    """Headers of what all parts have, and names that are one tensor, where some part lacks one.

    Raises:
        SourceError: They are not weights of one model.
    """
    problems = all_misfits(dict(enumerate(parts, 1)))
    if problems:
        raise SourceError(
            f"The parts of {what} do not fit together.",
            problems=problems,
            hint="All of them need the names, dtypes and shapes of the first.",
        )
    infos, *others = map(infos_of, parts)
    twins = twins_where_needed(parts, [infos, *others])
    for number, (other, part) in enumerate(zip(others, parts[1:], strict=True), 2):
        here = {name: name_in(other, name, twins) for name in infos}
        infos = {name: info for name, info in infos.items() if here[name] is not None}
        for name, info in infos.items():
            unusable = other[here[name] or name].unusable
            if unusable and not info.unusable:
                reason = f"{unusable}, in {place_of(number, part)}"
                infos[name] = info.model_copy(update={"unusable": reason})
    return infos, twins
