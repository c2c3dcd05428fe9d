"""Several sources as one: each tensor is made of theirs when it is read."""

from __future__ import annotations

from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from refitkit.errors import Problem, SourceError
from refitkit.program.bits import same_bits
from refitkit.program.dtypes import dtype_name
from refitkit.protocols import HasNamings, KnowsRevisions, MayChange
from refitkit.recipe.name_suggestions import unexpected
from refitkit.recipe.reads import broken_ties, name_in, twins_of
from refitkit.recipe.sources import describe_tensor, require_reread

if TYPE_CHECKING:
    from collections.abc import (
        Callable,
        Collection,
        Hashable,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

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


# MERGED opening: Descriptions of merges as sources: all parts opened, and every problem of all
# told at once.

_SHOWN = 3


def open_average(
    given: Sequence[tuple[object, float]],
    open_weights: Callable[[object], WeightSource],
    *,
    normalize: bool,
) -> WeightSource:
    """An average of any weights, each with its share."""
    shares = tuple(share for _, share in given)
    parts = _opened([part for part, _ in given], open_weights)
    what = "an average of " + _terms(shares, parts)
    formula = Formula(
        kind="average" if normalize else "sum",
        numbers=shares,
        counts=tuple(place for place, share in enumerate(shares) if share),
        keeps_equal=normalize,
        make=partial(average, keep_equal=normalize),
    )
    return Merged(parts, formula, what)


def open_task_vectors(
    base: object,
    tasks: Sequence[tuple[object, float]],
    open_weights: Callable[[object], WeightSource],
) -> WeightSource:
    """A base and task vectors of any weights, each with its scale."""
    scales = tuple(scale for _, scale in tasks)
    parts = _opened([base, *(task for task, _ in tasks)], open_weights)
    what = parts[0].description
    if scales:
        what += " with tasks of " + _terms(scales, parts[1:])
    formula = Formula(
        kind="task-vectors",
        numbers=(1.0, *scales),
        counts=(0, *(place for place, scale in enumerate(scales, 1) if scale)),
        keeps_equal=True,
        make=_with_tasks,
    )
    return Merged(parts, formula, what)


def _with_tasks(numbers: Sequence[float], values: Iterator[torch.Tensor]) -> torch.Tensor:
    return task_sum(numbers[1:], values)


def _opened(
    things: Sequence[object], open_weights: Callable[[object], WeightSource]
) -> tuple[WeightSource, ...]:
    """All parts.

    Raises:
        SourceError: Some cannot be read; lists what is wrong with them, and with all others.
    """
    opened: dict[int, WeightSource] = {}
    problems: list[Problem] = []
    for number, thing in enumerate(things, 1):
        try:
            opened[number] = open_weights(thing)
        except SourceError as exc:
            problems += [Problem(f"part {number}", "unreadable", hint=exc.message), *exc.problems]
    if problems:
        problems += all_misfits(opened) if opened else []
        raise SourceError("Parts of a merge cannot be read.", problems=problems)
    return tuple(opened.values())


def _terms(numbers: Sequence[float], parts: Sequence[WeightSource]) -> str:
    """``0.3 x 'a.safetensors', 0.7 x 'b.safetensors'``; not all of many."""
    shown = [f"{n:.4g} x {part.description}" for n, part in zip(numbers, parts, strict=True)]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return f"({', '.join(shown[:_SHOWN])}{more})"


# MERGED aligning: Sources held against one another: do they have the same names, dtypes and
# shapes?

Infos = dict[str, "TensorInfo"]


def infos_of(source: WeightSource) -> Infos:
    """What a source has, without reading data."""
    return {name: source.info(name) for name in source.names()}


def all_misfits(parts: Mapping[int, WeightSource]) -> list[Problem]:
    """Everything in which the others are not like the first of some parts.

    Args:
        parts: Sources, by the number that they have for users.
    """
    (number, first), *others = parts.items()
    wanted, found = infos_of(first), {other: infos_of(part) for other, part in others}
    twins = twins_where_needed(parts.values(), [wanted, *found.values()])
    problems = [
        problem
        for other, part in others
        for problem in misfits(wanted, found[other], f"part {number}", place_of(other, part), twins)
    ]
    return problems or [
        problem for part in parts.values() for problem in broken(set(twins.values()), part)
    ]


def twins_where_needed(
    parts: Iterable[WeightSource], infos: Sequence[Infos], more: Iterable[tuple[str, ...]] = ()
) -> dict[str, tuple[str, ...]]:
    """Names of one tensor, where a part lacks one of them and another part shows that it is tied.

    Args:
        parts: Sources of one model.
        infos: Headers of all of them, and of others.
        more: Further classes of names that are known to be one tensor.
    """
    first, *others = infos
    if all(first.keys() == other.keys() for other in others):  # as nearly always
        return {}
    twins = twins_of(parts, more)
    return {
        name: tie
        for name, tie in twins.items()
        if any(not other.keys() >= {*tie} for other in infos)
    }


def broken(ties: Iterable[tuple[str, ...]], part: WeightSource) -> Iterator[Problem]:
    """Names that are one tensor elsewhere, and that this part has several tensors for."""
    mine = {name for tie in ties for name in tie if name in part.names()}
    usable = {name for name in mine if not part.info(name).unusable}
    yield from broken_ties(ties, usable, part)


def place_of(number: int, part: WeightSource) -> str:
    """A part, for messages."""
    return f"part {number} ({part.description})"


def misfits(
    first: Infos,
    other: Mapping[str, TensorInfo],
    whose: str,
    where: str,
    twins: Mapping[str, tuple[str, ...]],
) -> Iterator[Problem]:
    """Everything in which one source is not like the first.

    What a state_dict would not hold may be missing, and more of it may be there: a live module
    fits to a file. Entries that are unusable have no dtype and shape to compare.

    Args:
        first: What is wanted.
        other: What is there.
        whose: What the first is, and
        where: what the other is, for messages.
        twins: Names of one tensor: it is enough to have it under one of them.
    """
    more = {
        name: info
        for name, info in other.items()
        if name_in(first, name, twins) is None and info.persistent
    }
    yield from unexpected(more, first.keys(), whose, more.__getitem__, where, given=other)
    for name, wanted in first.items():
        here = name_in(other, name, twins)
        if here is not None:
            yield from _differences(here, other[here], wanted, where)
        elif wanted.persistent:
            yield Problem(name, "missing", f"nothing in {where}", f"{wanted.dtype} {wanted.shape}")


def _differences(name: str, found: TensorInfo, wanted: TensorInfo, where: str) -> Iterator[Problem]:
    if found.unusable or wanted.unusable:
        return
    if found.dtype != wanted.dtype:
        yield Problem(name, "dtype", f"{found.dtype} in {where}", wanted.dtype)
    if found.shape != wanted.shape:
        yield Problem(name, "shape", f"{found.shape} in {where}", str(wanted.shape))


def read_as(info: TensorInfo, source: WeightSource, fqn: str) -> torch.Tensor:
    """An entry of a source, which may no longer be what it was: others would be broadcast.

    Raises:
        SourceError: It cannot be read, or has another dtype or shape than is wanted.
    """
    value = source.get(fqn)
    found = describe_tensor(value)
    if (found.dtype, found.shape) != (info.dtype, info.shape):
        what = f"{found.dtype} {found.shape}, no longer {info.dtype} {info.shape}"
        raise SourceError(f"{source.description}: {fqn!r} is {what}.")
    return value


# MERGED arithmetic: Sums of tensors: in float32 or float64, in the order given, rounded once.
#
# Products are rounded before they are added, so that results do not depend on whether a kernel
# fuses the two: they are the same for every layout and on every kind of device. All is done piece
# by piece: what is made on the way is small, however large a table of embeddings is.

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
_SUMMED = frozenset(dtype_name(dtype) for dtype in (*_FLOATS, *_COMPLEX))
_PIECE = 1 << 20  # elements


def is_summed(dtype: str) -> bool:
    """Whether values of a dtype, by its name, are numbers to calculate with.

    Integers count, choose or stand for something else, and so do the 8-bit floats: they are half of
    a quantized weight, whose other half is a scale.
    """
    return dtype in _SUMMED


def average(
    shares: Sequence[float], values: Iterator[torch.Tensor], *, keep_equal: bool
) -> torch.Tensor:
    """``sum(share x value)``.

    Args:
        shares: At least one.
        values: As many tensors of one dtype and shape; but for the first, each is let go before the
            next is taken.
        keep_equal: Whether an element that is equal in all of them becomes that of the first.

    Returns:
        A new tensor of their dtype, on the device of the first.
    """
    given = next(values)
    first = _as_real(given)
    total = torch.empty_like(first, dtype=_wide(first.dtype))
    equal = torch.full_like(first, keep_equal, dtype=torch.bool)
    for summed, value in _pieces(total, first):
        torch.mul(value.to(summed.dtype), shares[0], out=summed)
    for share in shares[1:]:  # no name for what is read, which would keep it
        _add(total, equal, first, share, _as_real(next(values)).to(first.device))
    made = total if total.dtype is first.dtype else torch.empty_like(first)
    for into, summed, value, same in _pieces(made, total, first, equal):
        into.copy_(torch.where(same, value.to(summed.dtype), summed))
    return narrowed(made, given.dtype)


def _add(
    total: torch.Tensor,
    equal: torch.Tensor,
    first: torch.Tensor,
    share: float,
    value: torch.Tensor,
) -> None:
    """Add a share to a sum, and note where the value is no longer what the first is."""
    for summed, same, one, other in _pieces(total, equal, first, value):
        same.logical_and_(other == one)
        summed.add_(other.to(summed.dtype) * share)


def task_sum(scales: Sequence[float], values: Iterator[torch.Tensor]) -> torch.Tensor:
    """``base + sum(scale x (value - base))``; an element that none changes keeps its bits.

    Args:
        scales: One for each value after the base.
        values: The base, then as many tensors of its dtype and shape.

    Returns:
        A new tensor of the base's dtype, on its device.
    """
    given = next(values)
    base = _as_real(given)
    total = torch.zeros_like(base, dtype=_wide(base.dtype))
    for scale in scales:
        _add_difference(total, base, scale, _as_real(next(values)).to(base.device))
    made = total if total.dtype is base.dtype else torch.empty_like(base)
    for into, change, value in _pieces(made, total, base):
        wide = value.to(change.dtype)
        into.copy_(torch.where(change == 0, wide, wide + change))
    return narrowed(made, given.dtype)


def _add_difference(
    total: torch.Tensor, base: torch.Tensor, scale: float, value: torch.Tensor
) -> None:
    """Add a scaled difference; nothing where there is none: infinity less itself would be NaN."""
    for change, one, other in _pieces(total, base, value):
        difference = other.to(change.dtype) - one.to(change.dtype)
        change.add_(difference.masked_fill_(other == one, 0).mul_(scale))


def widened(value: torch.Tensor) -> torch.Tensor:
    """In the dtype that sums are made in; complex numbers with a last dimension of two parts.

    It may be the tensor itself: not to be written to.
    """
    value = _as_real(value)
    return value.to(_wide(value.dtype))


def narrowed(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The other way round: rounded to nearest, ties to even, beyond the range to infinity."""
    value = value.to(dtype.to_real())
    return torch.view_as_complex(value) if dtype.is_complex else value


def _as_real(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _pieces(*tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Views of the same parts of tensors of one shape, cut in their longest dimension."""
    shape, count = tensors[0].shape, tensors[0].numel()
    if count <= _PIECE:
        return [tensors]
    dim = max(range(len(shape)), key=shape.__getitem__)
    step = max(_PIECE * shape[dim] // count, 1)
    return zip(*(torch.split(tensor, step, dim) for tensor in tensors), strict=True)


# MERGED keeping: What a merge has made, kept for the time of one refit, which looks at it several
# times.


class Made:
    """Tensors that were made, up to a number of bytes.

    A refit looks at all of them in turn, several times over: those that came first are kept, as
    what came last would always be what the next look needs last.
    """

    def __init__(self, limit: int | None) -> None:
        """Keep nothing yet.

        Args:
            limit: Most bytes that are kept; None: no limit.
        """
        self._limit = limit
        self._tensors: dict[str, torch.Tensor] = {}
        self._nbytes = 0

    def get(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What was made under this name, or is made now.

        What lies on a GPU is not kept: memory is dear there, and sums are quick.
        """
        found = self._tensors.get(name)
        if found is None:
            found = make()
            whole = self._nbytes + found.nbytes
            if found.is_cpu and (self._limit is None or whole <= self._limit):
                self._tensors[name] = found
                self._nbytes = whole
        return found

    def like(self) -> Made:
        """Another one with the same limit, of other tensors."""
        return Made(self._limit)
