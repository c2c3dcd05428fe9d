"""A merge as a weight source: each tensor is computed from those of the parts when it is read.

The module hides how parts are compared and how their tensors are summed. Read from top to bottom:

1. ``open_average`` and ``open_task_vectors`` open all parts, and turn a description into a formula.
2. ``Merged`` is the source: it applies a ``Formula`` to the tensors of the parts.
3. The comparison of parts reports every name, dtype and shape that differs.
4. The arithmetic sums tensors in float32 or float64, in the order given, and rounds once.
5. ``TensorCache`` keeps results for one refit, which reads each tensor several times.
"""

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

    Infos = dict[str, TensorInfo]
    """Header of each entry of a source, by name."""
    TiedNames = Mapping[str, tuple[str, ...]]
    """All names of a tensor, by each of them."""

_SHOWN_TERMS = 3


# -- opening the parts ------------------------------------------------------------------------


def open_average(
    given: Sequence[tuple[object, float]],
    open_weights: Callable[[object], WeightSource],
    *,
    normalize: bool,
) -> WeightSource:
    """Return a source of ``sum(share x part)``.

    Args:
        given: Parts and their shares, already divided by their sum if they are normalized.
        open_weights: Opens any weights that refitkit accepts.
        normalize: Whether an element that is equal in all parts keeps its bits.

    Raises:
        SourceError: See ``Merge.open``.
    """
    shares = tuple(share for _, share in given)
    parts = _open_all([part for part, _ in given], open_weights)
    formula = Formula(
        kind="average" if normalize else "sum",
        numbers=shares,
        contributing=tuple(index for index, share in enumerate(shares) if share),
        keeps_equal=normalize,
        compute=partial(_average, keep_equal=normalize),
    )
    return Merged(parts, formula, "an average of " + _terms(shares, parts))


def open_task_vectors(
    base: object,
    tasks: Sequence[tuple[object, float]],
    open_weights: Callable[[object], WeightSource],
) -> WeightSource:
    """Return a source of ``base + sum(scale x (task - base))``.

    Args:
        base: Any weights that refitkit accepts.
        tasks: Fine-tuned weights and their scales.
        open_weights: Opens any weights that refitkit accepts.

    Raises:
        SourceError: See ``Merge.open``.
    """
    scales = tuple(scale for _, scale in tasks)
    parts = _open_all([base, *(task for task, _ in tasks)], open_weights)
    description = parts[0].description
    if scales:
        description += " with tasks of " + _terms(scales, parts[1:])
    formula = Formula(
        kind="task-vectors",
        numbers=(1.0, *scales),
        contributing=(0, *(index for index, scale in enumerate(scales, 1) if scale)),
        keeps_equal=True,
        compute=lambda numbers, values: _task_sum(numbers[1:], values),
    )
    return Merged(parts, formula, description)


def _open_all(
    weights: Sequence[object], open_weights: Callable[[object], WeightSource]
) -> tuple[WeightSource, ...]:
    """Open all parts.

    Raises:
        SourceError: Some parts cannot be read. The error lists their problems, and the differences
            between the parts that can be read.
    """
    sources: dict[int, WeightSource] = {}
    problems: list[Problem] = []
    for number, part in enumerate(weights, 1):
        try:
            sources[number] = open_weights(part)
        except SourceError as exc:
            problems += [Problem(f"part {number}", "unreadable", hint=exc.message), *exc.problems]
    if problems:
        problems += _differences(sources) if sources else []
        raise SourceError("Parts of a merge cannot be read.", problems=problems)
    return tuple(sources.values())


def _terms(numbers: Sequence[float], parts: Sequence[WeightSource]) -> str:
    """Return the first terms of a sum: ``(0.3 x 'a.safetensors', 0.7 x 'b.safetensors')``."""
    terms = [f"{n:.4g} x {part.description}" for n, part in zip(numbers, parts, strict=True)]
    more = f" and {len(terms) - _SHOWN_TERMS} more" if len(terms) > _SHOWN_TERMS else ""
    return f"({', '.join(terms[:_SHOWN_TERMS])}{more})"


# -- the source -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Formula:
    """How to compute one tensor from those of several parts.

    Attributes:
        kind: Name of the formula. Revisions contain it.
        numbers: A share or scale for each part.
        contributing: Indices of the parts whose number is not 0. The first of them gives the device
            of the result.
        keeps_equal: Whether an element that is equal in all contributing parts keeps its bits.
        compute: Computes the result from the numbers and the tensors of the contributing parts.
    """

    kind: str
    numbers: tuple[float, ...]
    contributing: tuple[int, ...]
    keeps_equal: bool
    compute: Callable[[Sequence[float], Iterator[torch.Tensor]], torch.Tensor]


class Merged:
    """A source of tensors that a formula computes from parts with equal names, dtypes and shapes.

    It computes a tensor each time it is read, unless ``keeping`` has returned a copy that keeps
    tensors. Computing one tensor reads the tensor of one part at a time. In memory are that tensor,
    the first one, the sum in float32 or float64, and one byte for each element.
    """

    def __init__(
        self,
        parts: Sequence[WeightSource],
        formula: Formula,
        description: str,
        keep_limit: int | None = 0,
    ) -> None:
        """Compare the headers of all parts.

        Args:
            parts: Opened weights, at least one.
            formula: Formula with a number for each part.
            description: Label of this source for reports and messages.
            keep_limit: Most bytes of computed tensors to keep; None: no limit.

        Raises:
            SourceError: The parts differ in names, dtypes or shapes. The error lists all of them.
        """
        self.description = description
        self._parts, self._formula = tuple(parts), formula
        self._infos, self._tied = _align(self._parts, description)
        self._reasons: dict[str, str] = {}
        self._keep_limit, self._kept = keep_limit, TensorCache(keep_limit)

    def names(self) -> Collection[str]:
        """Return the names of the first part, without non-persistent ones that a part lacks."""
        return self._infos.keys()

    def info(self, fqn: str) -> TensorInfo:
        """Return the dtype and shape that all parts have.

        Headers suffice for dtypes that can be summed. Entries of other dtypes (integers, bools,
        8-bit floats) are unusable unless they are the same in all parts, so their data is read,
        once.
        """
        info = self._infos[fqn]
        if info.unusable or _is_summed(info.dtype):
            return info
        if fqn not in self._reasons:
            same = self._is_same(fqn, info)
            self._reasons[fqn] = "" if same else f"{info.dtype} that is not the same in all parts"
        return info.model_copy(update={"unusable": self._reasons[fqn]})

    def get(self, fqn: str) -> torch.Tensor:
        """Return the merged tensor: computed, kept, or that of the only part that contributes.

        Raises:
            KeyError: The source has no such name.
            SourceError: The entry is unusable, or a part cannot be read.
        """
        info = self.info(fqn)
        if info.unusable:
            raise SourceError(f"{self.description}: {fqn!r} is unusable: {info.unusable}.")
        if not _is_summed(info.dtype):
            return self._read(0, fqn, info)
        if self._is_first(fqn):
            return self._read(self._formula.contributing[0], fqn, info)
        return self._kept.get(fqn, lambda: self._compute(fqn, info))

    def ties(self) -> Collection[tuple[str, ...]]:
        """Return names that are one tensor in all parts; see ``refitkit.protocols.KnowsTies``."""
        known = {tie for tie in self._tied.values() if sum(name in self._infos for name in tie) > 1}
        return [tuple(name for name in tie if name in self._infos) for tie in known]

    def namings(self) -> Collection[WeightSource]:
        """Return a merge for each set of names of the parts.

        See ``refitkit.protocols.HasNamings``. A part that has fewer sets than another is used with
        its last set.
        """
        choices = [part.namings() if isinstance(part, HasNamings) else () for part in self._parts]
        merges = []
        for index in range(max(map(len, choices))):
            parts = [
                list(namings)[min(index, len(namings) - 1)] if namings else part
                for namings, part in zip(choices, self._parts, strict=True)
            ]
            # Parts may agree on one set of names only: all may have the FQNs, but hooks of one
            # module rename its state_dict.
            with suppress(SourceError):
                merges.append(Merged(parts, self._formula, self.description, self._keep_limit))
        return merges

    def keeping(self, limit: int | None) -> Merged:
        """Return this source with a new cache; see ``refitkit.protocols.KeepsMade``."""
        copied = copy(self)
        copied._keep_limit, copied._kept = limit, TensorCache(limit)  # noqa: SLF001 - own class
        return copied

    def revision(self, fqn: str) -> Hashable | None:
        """Return a revision built from those of the parts; None if one of them has none.

        See ``refitkit.protocols.KnowsRevisions``.

        Raises:
            KeyError: The source has no such name.
        """
        formula, summed = self._formula, _is_summed(self._infos[fqn].dtype)
        # A part with share 0 does not change a sum, but it decides whether an integer is usable.
        indices = formula.contributing if summed else range(len(self._parts))
        revisions = tuple(self._part_revision(index, fqn) for index in indices)
        if None in revisions:
            return None
        # The entry of a part keeps its revision, so that a refit with ``delta`` recognizes it.
        if self._is_first(fqn) if summed else len(set(revisions)) == 1:
            return revisions[0]
        numbers = tuple(formula.numbers[index] for index in indices) if summed else ()
        return (formula.kind if summed else "the same", numbers, revisions)

    def require_unchanged(self) -> None:
        """Call ``require_unchanged`` of all parts; see ``refitkit.protocols.MayChange``."""
        for part in self._parts:
            if isinstance(part, MayChange):
                part.require_unchanged()

    def reread(self) -> None:
        """Call ``reread`` of all parts; see ``refitkit.protocols.SupportsReread``."""
        for part in self._parts:
            require_reread(part)

    def _compute(self, fqn: str, info: TensorInfo) -> torch.Tensor:
        indices, numbers = self._formula.contributing, self._formula.numbers
        with torch.no_grad():
            # A generator, so that the tensor of one part at a time is in memory.
            values = (self._read(index, fqn, info) for index in indices)
            return self._formula.compute([numbers[index] for index in indices], values)

    def _is_first(self, fqn: str) -> bool:
        """Return whether the result is, bit for bit, the tensor of the first contributing part."""
        first, *others = self._formula.contributing
        if not others:
            return self._formula.numbers[first] == 1
        return self._formula.keeps_equal and self._have_one_revision(
            fqn, self._formula.contributing
        )

    def _is_same(self, fqn: str, info: TensorInfo) -> bool:
        """Return whether an entry has the same bits in all parts."""
        others = range(1, len(self._parts))
        if self._have_one_revision(fqn, (0, *others)):
            return True
        first = self._read(0, fqn, info)
        return all(same_bits(first, self._read(index, fqn, info)) for index in others)

    def _have_one_revision(self, fqn: str, indices: Sequence[int]) -> bool:
        first = self._part_revision(indices[0], fqn)
        return first is not None and all(self._part_revision(i, fqn) == first for i in indices[1:])

    def _part_revision(self, index: int, fqn: str) -> Hashable | None:
        part = self._parts[index]
        if not isinstance(part, KnowsRevisions):
            return None
        return part.revision(name_in(part.names(), fqn, self._tied) or fqn)

    def _read(self, index: int, fqn: str, info: TensorInfo) -> torch.Tensor:
        """Return the tensor of a part, which may have it under another of its tied names.

        Raises:
            SourceError: The tensor cannot be read, or its dtype or shape has changed.
        """
        part = self._parts[index]
        name = name_in(part.names(), fqn, self._tied) or fqn
        value = part.get(name)
        found = describe_tensor(value)
        # A live state_dict may change after it was opened. Torch would broadcast another shape.
        if (found.dtype, found.shape) != (info.dtype, info.shape):
            change = f"{found.dtype} {found.shape}, no longer {info.dtype} {info.shape}"
            raise SourceError(f"{part.description}: {name!r} is {change}.")
        return value


# -- comparing the parts ----------------------------------------------------------------------


def _align(parts: Sequence[WeightSource], description: str) -> tuple[Infos, TiedNames]:
    """Return headers of the entries that all parts have, and their tied names.

    An entry is unusable if it is unusable in one of the parts.

    Raises:
        SourceError: The parts are not weights of one model. The error lists all differences.
    """
    problems = _differences(dict(enumerate(parts, 1)))
    if problems:
        raise SourceError(
            f"The parts of {description} do not fit together.",
            problems=problems,
            hint="All parts need the names, dtypes and shapes of the first.",
        )
    infos, *others = map(_infos_of, parts)
    tied = _tied_names(parts, [infos, *others])
    for number, (other, part) in enumerate(zip(others, parts[1:], strict=True), 2):
        names = {name: name_in(other, name, tied) for name in infos}
        # Only non-persistent entries can be missing here: ``_differences`` reports all others.
        infos = {name: info for name, info in infos.items() if names[name] is not None}
        for name, info in infos.items():
            unusable = other[names[name] or name].unusable
            if unusable and not info.unusable:
                reason = f"{unusable}, in {_label(number, part)}"
                infos[name] = info.model_copy(update={"unusable": reason})
    return infos, tied


def _infos_of(source: WeightSource) -> Infos:
    """Return the header of every entry, without reading data."""
    return {name: source.info(name) for name in source.names()}


def _label(number: int, part: WeightSource) -> str:
    """Return a part's label for error messages."""
    return f"part {number} ({part.description})"


def _differences(parts: Mapping[int, WeightSource]) -> list[Problem]:
    """Return everything in which the other parts differ from the first, and broken ties.

    Ties are checked only if all headers agree, because that check reads data.

    Args:
        parts: Opened parts, by the number that users count them with.
    """
    (number, first), *others = parts.items()
    expected, infos = _infos_of(first), {other: _infos_of(part) for other, part in others}
    tied = _tied_names(parts.values(), [expected, *infos.values()])
    problems = [
        problem
        for other, part in others
        for problem in _header_differences(
            expected, infos[other], f"part {number}", _label(other, part), tied
        )
    ]
    if problems:
        return problems
    ties = set(tied.values())
    return [problem for part in parts.values() for problem in _broken_ties_in(part, ties)]


def _tied_names(parts: Iterable[WeightSource], infos: Sequence[Infos]) -> TiedNames:
    """Return tied names if a part lacks one of them and another part shows the tie.

    Args:
        parts: Sources of one model.
        infos: Headers of each of them.
    """
    first, *others = infos
    # Nearly always all parts have equal names. Then no name has to be replaced by a tied one.
    if all(first.keys() == other.keys() for other in others):
        return {}
    return {
        name: tie
        for name, tie in twins_of(parts).items()
        if any(not other.keys() >= {*tie} for other in infos)
    }


def _broken_ties_in(part: WeightSource, ties: Iterable[tuple[str, ...]]) -> Iterator[Problem]:
    """Yield names that are one tensor in another part, but several tensors in this one."""
    present = {name for tie in ties for name in tie if name in part.names()}
    usable = {name for name in present if not part.info(name).unusable}
    yield from broken_ties(ties, usable, part)


def _header_differences(
    expected: Infos, found: Infos, owner: str, place: str, tied: TiedNames
) -> Iterator[Problem]:
    """Yield everything in which the headers of a part differ from those of the first part.

    Non-persistent entries may be missing or superfluous: a live module has them, and a file of its
    weights does not.

    Args:
        expected: Headers of the first part.
        found: Headers of the other part.
        owner: Label of the first part.
        place: Label of the other part.
        tied: Tied names. A part needs only one name of a tied tensor.
    """
    more = {
        name: info
        for name, info in found.items()
        if name_in(expected, name, tied) is None and info.persistent
    }
    yield from unexpected(more, expected.keys(), owner, more.__getitem__, place, given=found)
    for name, wanted in expected.items():
        present = name_in(found, name, tied)
        if present is None:
            if wanted.persistent:
                text = f"{wanted.dtype} {wanted.shape}"
                yield Problem(name, "missing", f"nothing in {place}", text)
            continue
        info = found[present]
        if info.unusable or wanted.unusable:  # has no dtype and shape to compare
            continue
        if info.dtype != wanted.dtype:
            yield Problem(present, "dtype", f"{info.dtype} in {place}", wanted.dtype)
        if info.shape != wanted.shape:
            yield Problem(present, "shape", f"{info.shape} in {place}", str(wanted.shape))


# -- arithmetic -------------------------------------------------------------------------------
#
# Products are rounded before they are added, so results do not depend on whether a kernel fuses the
# two operations: they are the same for every memory layout and kind of device. All sums are
# computed piece by piece, so temporaries stay small for a large embedding table, too.

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
_SUMMED = frozenset(dtype_name(dtype) for dtype in (*_FLOATS, *_COMPLEX))
_PIECE = 1 << 20  # elements


def _is_summed(dtype: str) -> bool:
    """Return whether values of the dtype of this name can be summed."""
    # Integers are counters, indices or codes. 8-bit floats are quantized values: a sum of them
    # ignores their scales.
    return dtype in _SUMMED


def _average(
    shares: Sequence[float], values: Iterator[torch.Tensor], *, keep_equal: bool
) -> torch.Tensor:
    """Return ``sum(share x value)``.

    Args:
        shares: Numbers, at least one.
        values: As many tensors of one dtype and shape. Each but the first is freed before the next
            is taken.
        keep_equal: Whether an element that is equal in all tensors keeps the bits of the first.

    Returns:
        A new tensor of that dtype and shape, on the device of the first.
    """
    given = next(values)
    first = _as_real(given)
    total = torch.empty_like(first, dtype=_sum_dtype(first.dtype))
    equal = torch.full_like(first, keep_equal, dtype=torch.bool)
    for summed, value in _pieces(total, first):
        torch.mul(value.to(summed.dtype), shares[0], out=summed)
    for share in shares[1:]:
        # The value has no name here: a name would keep it in memory while the next one is read.
        _add(total, equal, first, share, _as_real(next(values)).to(first.device))
    # float32 and float64 are their own sum dtype: the sum becomes the result without a copy.
    result = total if total.dtype is first.dtype else torch.empty_like(first)
    for into, summed, value, same in _pieces(result, total, first, equal):
        into.copy_(torch.where(same, value.to(summed.dtype), summed))
    return _as_dtype(result, given.dtype)


def _add(
    total: torch.Tensor,
    equal: torch.Tensor,
    first: torch.Tensor,
    share: float,
    value: torch.Tensor,
) -> None:
    """Add ``share x value`` to ``total``, and clear ``equal`` where ``value`` is not ``first``."""
    for summed, same, one, other in _pieces(total, equal, first, value):
        same.logical_and_(other == one)
        summed.add_(other.to(summed.dtype) * share)


def _task_sum(scales: Sequence[float], values: Iterator[torch.Tensor]) -> torch.Tensor:
    """Return ``base + sum(scale x (value - base))``. Elements without a change keep their bits.

    Args:
        scales: A number for each value after the base.
        values: The base, then as many tensors of its dtype and shape. Each is freed before the next
            is taken.

    Returns:
        A new tensor with the dtype, shape and device of the base.
    """
    given = next(values)
    base = _as_real(given)
    total = torch.zeros_like(base, dtype=_sum_dtype(base.dtype))
    for scale in scales:
        _add_difference(total, base, scale, _as_real(next(values)).to(base.device))
    result = total if total.dtype is base.dtype else torch.empty_like(base)
    for into, change, value in _pieces(result, total, base):
        wide = value.to(change.dtype)
        # Without the condition -0.0 + 0.0 would become 0.0.
        into.copy_(torch.where(change == 0, wide, wide + change))
    return _as_dtype(result, given.dtype)


def _add_difference(
    total: torch.Tensor, base: torch.Tensor, scale: float, value: torch.Tensor
) -> None:
    """Add ``scale x (value - base)`` to ``total``, and 0 where the two are equal."""
    for change, one, other in _pieces(total, base, value):
        difference = other.to(change.dtype) - one.to(change.dtype)
        # Infinity minus itself is NaN, so equal elements need the mask.
        change.add_(difference.masked_fill_(other == one, 0).mul_(scale))


def _as_real(value: torch.Tensor) -> torch.Tensor:
    """Return a view without gradient. Complex numbers become a last dimension of size 2."""
    value = value.detach()
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _as_dtype(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to a dtype and undo ``_as_real``.

    Rounding is to nearest, ties to even; values beyond the range become infinite.
    """
    value = value.to(dtype.to_real())
    return torch.view_as_complex(value) if dtype.is_complex else value


def _pieces(*tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Return views of at most ``_PIECE`` elements, cut from each tensor at the same places.

    Args:
        tensors: Tensors of one shape. They are cut along their longest dimension, so a piece may be
            larger if one index of it has more than ``_PIECE`` elements.
    """
    shape, count = tensors[0].shape, tensors[0].numel()
    if count <= _PIECE:
        return [tensors]
    dim = max(range(len(shape)), key=shape.__getitem__)
    step = max(_PIECE * shape[dim] // count, 1)
    return zip(*(torch.split(tensor, step, dim) for tensor in tensors), strict=True)


# -- keeping results --------------------------------------------------------------------------


class TensorCache:
    """Computed tensors by name, up to a number of bytes. Tensors are never evicted.

    A refit reads all names in turn, several times. Eviction by age would always remove the tensor
    that the next turn needs first, so the tensors that came first stay.
    """

    def __init__(self, limit: int | None) -> None:
        """Create an empty cache.

        Args:
            limit: Most bytes to keep; None: no limit.
        """
        self._limit = limit
        self._tensors: dict[str, torch.Tensor] = {}
        self._nbytes = 0

    def get(self, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the tensor of this name. If the cache does not hold it, call ``compute``."""
        found = self._tensors.get(name)
        if found is None:
            found = compute()
            nbytes = self._nbytes + found.nbytes
            # GPU memory is scarce, and sums are fast there.
            if found.is_cpu and (self._limit is None or nbytes <= self._limit):
                self._tensors[name] = found
                self._nbytes = nbytes
        return found
