"""Calls of one kind on many small tensors, made as one.

A network folds each of its BatchNorms with the same few ops. Their operands, laid end to end, need
each op once. The results are the same bits: the ops below compute every element on its own, and in
the same way wherever it lies (a test holds that).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from refitkit.model import CallRef
from refitkit.recipe import ops
from refitkit.recipe.operands import is_reference

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from refitkit.model import OpCall, Value

BATCHED = frozenset(
    {
        "aten.add.Tensor",
        "aten.div.Tensor",
        "aten.mul.Tensor",
        "aten.neg.default",
        "aten.sqrt.default",
        "aten.sub.Tensor",
    }
)
_SQUARE_ROOT = "aten.sqrt.default"
"""Sensitive (:func:`refitkit.recipe.ops.is_sensitive`) in general, but not of contiguous floats."""
_FEWEST = 4
_LARGEST = 1 << 14
"""Most elements of one operand: to lay large ones end to end costs more than calls do."""
_MOST = 1 << 16
"""Most elements of all results of a batch: they lie in memory at once, whatever reads them."""


@dataclass(frozen=True)
class Batch:
    """Calls that are made as one.

    Attributes:
        members: Their numbers.
        operands: For each operand of the op, its value in every member.
        aligned: For each operand, whether these are the results of one batch, in its order.
        sizes: Number of elements of each result.
        shapes: Shape of each result.
    """

    members: tuple[int, ...]
    operands: tuple[tuple[Value, ...], ...]
    aligned: tuple[bool, ...]
    sizes: list[int]
    shapes: tuple[tuple[int, ...], ...]


class Facts(Protocol):
    """What has to be known of values."""

    @property
    def steady(self) -> Collection[int]:
        """Calls that are made otherwise."""

    def facts(self, value: Value) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a value."""


def batched(
    calls: Sequence[OpCall], operands: Sequence[Sequence[Value]], facts: Facts
) -> list[Batch]:
    """Batches among calls.

    Args:
        calls: All calls of a plan.
        operands: The tensors among the arguments of each call.
        facts: Knows values.
    """
    kinds: dict[int, Any] = {}
    levels: list[int] = []
    members: dict[Any, list[int]] = defaultdict(list)
    for number, one in enumerate(calls):
        above = [levels[value.call] for value in operands[number] if isinstance(value, CallRef)]
        levels.append(max(above, default=0))
        if number in facts.steady or not _fits(one, operands[number], facts):
            continue
        levels[number] += 1  # none follows from another one of its own batch
        literals = [a for a in (*one.args, *one.kwargs.items()) if not is_reference(a)]
        below = tuple(
            kinds.get(value.call) if isinstance(value, CallRef) else None
            for value in operands[number]
        )
        dtypes = tuple(facts.facts(value)[0] for value in operands[number])
        kind = one.op, one.device, repr(literals), dtypes, below, levels[number]
        kinds[number] = kind
        members[kind].append(number)
    parts = [part for numbers in members.values() for part in _parts(numbers, calls)]
    found = {number: part for part in parts for number in part}
    return [_batch(part, calls, operands, found) for part in parts]


def _parts(numbers: Sequence[int], calls: Sequence[OpCall]) -> Iterator[list[int]]:
    """Calls of one kind, as many at once as their results may take; too few are none."""
    part, size = list[int](), 0
    for number in numbers:
        more = prod(calls[number].results[0].shape)
        if part and size + more > _MOST:
            yield from [part] if len(part) >= _FEWEST else []
            part, size = [], 0
        part.append(number)
        size += more
    yield from [part] if len(part) >= _FEWEST else []


def _batch(
    numbers: list[int],
    calls: Sequence[OpCall],
    operands: Sequence[Sequence[Value]],
    found: Mapping[int, list[int]],
) -> Batch:
    columns = tuple(zip(*(operands[number] for number in numbers), strict=True))
    shapes = tuple(calls[number].results[0].shape for number in numbers)
    return Batch(
        members=tuple(numbers),
        operands=columns,
        aligned=tuple(_is_aligned(column, found) for column in columns),
        sizes=[prod(shape) for shape in shapes],
        shapes=shapes,
    )


def _is_aligned(column: Sequence[Value], found: Mapping[int, list[int]]) -> bool:
    first = column[0]
    if not isinstance(first, CallRef):
        return False
    return found.get(first.call) == [v.call for v in column if isinstance(v, CallRef)]


def _fits(one: OpCall, operands: Sequence[Value], facts: Facts) -> bool:
    """Whether every operand is a small tensor of the result's shape, and the op one of ours."""
    if one.op not in BATCHED or len(one.results) != 1:
        return False
    dtypes = [facts.facts(value)[0] for value in operands]
    if one.op == _SQUARE_ROOT:
        if any(dtype.startswith("complex") for dtype in dtypes):
            return False
    elif ops.is_sensitive(one.op, dtypes, one.kwargs.get("alpha", 1)):
        return False
    shape = one.results[0].shape
    return 0 < prod(shape) <= _LARGEST and all(facts.facts(v)[1] == shape for v in operands)
