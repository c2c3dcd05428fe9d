"""What two sets of weights differ in: of sources, of modules, or one of each.

Everything is read once, tensor by tensor, and all elements count. No more than one pair of tensors
is in memory at a time, but for what a source or the replay of recipes keeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch

from refitkit.errors import Problem, SourceError, raised_as
from refitkit.model import DiffReport, DiffRow
from refitkit.program.distance import Distance, chunks, distance, is_whole
from refitkit.program.dtypes import dtype_of
from refitkit.recipe.reads import name_in, twins_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from refitkit.model import TensorInfo
    from refitkit.protocols import WeightSource

_Entry: TypeAlias = "tuple[WeightSource, str]"
"""A source, and the name of an entry in it."""


def compared(a: WeightSource, b: WeightSource, ties: Iterable[tuple[str, ...]] = ()) -> DiffReport:
    """What two sources differ in, name by name.

    Of tied weights a source may have all names or one: a name that only one source has is compared
    with a name of the other one that is the same tensor.

    Args:
        a: A source.
        b: Another one.
        ties: Names that are known to be one tensor, beside those that the sources show.

    Raises:
        SourceError: Entries cannot be read, or are not what the source said; lists all of them.
    """
    names, problems, rows = dict.fromkeys([*a.names(), *b.names()]), list[Problem](), []
    alike = len(names) == len(a.names()) == len(b.names())
    twins = {} if alike else twins_of((a, b), ties)
    for name in names:
        try:
            with raised_as(SourceError, f"{name!r} cannot be read"):
                rows.append(_row(name, a, b, twins))
        except SourceError as exc:
            problems += exc.problems or [Problem(name, "cannot be read", exc.message)]
    if problems:
        message = f"{a.description} and {b.description} cannot be compared."
        raise SourceError(message, problems=problems)
    return DiffReport(a=a.description, b=b.description, rows=tuple(sorted(rows, key=_place)))


def _place(row: DiffRow) -> tuple[int, float, float, str]:
    """Where a row stands: without a number, then by relative change, then the same."""
    rank = 2 if row.state == "same" else 0 if row.relative is None else 1
    return rank, -(row.relative or 0.0), -(row.largest or 0.0), row.name


def _row(
    name: str, a: WeightSource, b: WeightSource, twins: Mapping[str, tuple[str, ...]]
) -> DiffRow:
    in_a, in_b = name_in(a.names(), name, twins), name_in(b.names(), name, twins)
    if in_b is None:
        return _described(name, "only in A", a.info(name))
    if in_a is None:
        return _described(name, "only in B", b.info(name))
    row = _of_both(name, (a, in_a), (b, in_b))
    tied = [f"{which} has it as {n!r}" for which, n in (("A", in_a), ("B", in_b)) if n != name]
    return row.model_copy(update={"note": "; ".join(filter(None, (*tied, row.note)))})


def _of_both(name: str, a: _Entry, b: _Entry) -> DiffRow:
    one, other = (source.info(there) for source, there in (a, b))
    unusable = [f"{which}: {i.unusable}" for which, i in (("A", one), ("B", other)) if i.unusable]
    if unusable:
        return _described(name, "not usable", one, other, note="; ".join(unusable))
    if one.shape != other.shape:
        return _described(name, "other shape", one, other)
    return _subtracted(name, a, b, one, other)


def _subtracted(name: str, a: _Entry, b: _Entry, one: TensorInfo, other: TensorInfo) -> DiffRow:
    """A row of two tensors of one shape."""
    if one.dtype == other.dtype:
        found = distance(_read(*a, one), _read(*b, other))
        state = "changed" if found.differing else "same"
        return _measured(_described(name, state, one), found)
    row, wider = _described(name, "other dtype", one, other), _wider(one, other)
    if wider is None:
        return row
    pieces = chunks(_read(*a, one), _read(*b, other))
    parts = (distance(x.to(wider), y.to(wider)) for x, y in pieces)
    return _measured(row, sum(parts, start=Distance()))


def _described(
    name: str, state: str, info: TensorInfo, other: TensorInfo | None = None, note: str = ""
) -> DiffRow:
    return DiffRow.model_validate(
        {
            "name": name,
            "state": state,
            "dtype": info.dtype,
            "shape": info.shape,
            "other_dtype": other.dtype if other and other.dtype != info.dtype else "",
            "other_shape": other.shape if other and other.shape != info.shape else None,
            "note": note,
        }
    )


def _measured(row: DiffRow, found: Distance) -> DiffRow:
    numbers = {"relative": found.relative, "largest": found.largest, "share": found.share}
    return row.model_copy(update=numbers)


def _wider(one: TensorInfo, other: TensorInfo) -> torch.dtype | None:
    """What two types can be converted to and subtracted in; None where that means nothing."""
    kinds = dtype_of(one.dtype), dtype_of(other.dtype)
    if any(map(is_whole, kinds)):
        return None
    if any(kind.is_complex for kind in kinds):
        return torch.complex128
    return torch.float64 if torch.float64 in kinds else torch.float32


def _read(source: WeightSource, name: str, info: TensorInfo) -> torch.Tensor:
    """A tensor, if it is what was said of it."""
    value = source.get(name)
    if value.dtype is not dtype_of(info.dtype) or tuple(value.shape) != info.shape:
        found = f"{value.dtype} {tuple(value.shape)}"
        problem = Problem(name, "not what was announced", found, f"{info.dtype} {info.shape}")
        raise SourceError(f"{source.description} is not what it says.", problems=[problem])
    return value
