"""The calls of a plan, made ready to be made many times."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch

from refitkit.model import CallRef, PinnedRef, SourceRef
from refitkit.recipe import ops
from refitkit.recipe.ops import (
    Followed,
    aligned,
    decode_literal,
    is_reference,
    operands_of,
    same_settings,
)
from refitkit.recipe.origins import RESHAPES, is_view

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from refitkit.model import OpCall, PlanData, Value


_CONTIGUOUS = torch.ops.aten.contiguous.default
_FROM_STORAGE = ("aten.as_strided", "aten._reshape_alias")
Results: TypeAlias = tuple[torch.Tensor, ...]
"""What a call gives."""


def call(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Results:
    """Call an op without changing any operand.

    An op that writes does so to a copy, which is the result.

    Args:
        op: An overload of an aten op.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    writes = _writes(op)
    if writes:
        return _on_copies(op, args, kwargs, writes)
    result = op(*args, **kwargs)
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def _writes(op: Any) -> int:
    """How many of its first arguments an op writes to."""
    return sum(bool(a.alias_info and a.alias_info.is_write) for a in op._schema.arguments)  # noqa: SLF001


def _on_copies(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], writes: int) -> Results:
    copies = [a.clone(memory_format=torch.contiguous_format) for a in args[:writes]]
    op(*copies, *args[writes:], **kwargs)
    return tuple(copies)


@dataclass(frozen=True)
class Ready:
    """A call that can be made.

    Attributes:
        op: The overload.
        args: Arguments, decoded; what stands for operands is replaced.
        kwargs: Keyword arguments, likewise.
        operands: The tensors among them.
        places: Where each operand goes: a position or a name, and for a list a position in it.
        writes: How many of its first arguments it writes to.
        results: How many tensors it gives.
        alone: Whether it counts from the start of its first operand's storage, which therefore has
            to be that operand alone.
        whole: Which operands are all of their memory, so that they can be put where recordings have
            them: contiguous and aligned. Others are views of what recipes have put there.
        sensitive: Whether its bits depend on that, on threads and on settings.
        anywhere: Whether it is exact on every device.
        device: Kind of device that it was recorded on.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[Value, ...]
    places: tuple[tuple[int | str, int | None], ...]
    writes: int
    results: int
    alone: bool
    whole: tuple[bool, ...]
    sensitive: bool
    anywhere: bool
    device: str

    @property
    def is_simple(self) -> bool:
        """Whether it gives one tensor, writes nothing, and has all operands as arguments."""
        plain = all(isinstance(where, int) and inner is None for where, inner in self.places)
        kinds = [str(one.type) for one in self.op._schema.returns]  # noqa: SLF001
        direct = not (self.writes or self.alone or self.sensitive or self.is_ordering)
        return plain and direct and kinds == ["Tensor"]

    @property
    def is_ordering(self) -> bool:
        """Whether it only puts elements one after another."""
        return self.op is _CONTIGUOUS

    def made_on(self, device: torch.device) -> torch.device:
        """Where it is made if its operands are here: elsewhere, if it is exact only there."""
        return device if self.is_exact_on(device.type) else torch.device(self.device)

    def is_exact_on(self, kind: str) -> bool:
        """Whether it is exact on a kind of device."""
        return self.anywhere or kind == self.device

    def __call__(self, operands: Sequence[torch.Tensor]) -> Results:
        """Make it with these operands."""
        if self.is_ordering:
            return (aligned(operands[0]),)
        if not self.sensitive:
            return self._made(operands)
        there = [aligned(t) if at else t for t, at in zip(operands, self.whole, strict=True)]
        with same_settings():
            return self._made(there)

    def _made(self, operands: Sequence[torch.Tensor]) -> Results:
        args, kwargs = list(self.args), dict(self.kwargs)
        for (where, inner), operand in zip(self.places, operands, strict=True):
            given: Any = kwargs if isinstance(where, str) else args
            if inner is None:
                given[where] = operand
            else:
                given[where] = [*given[where][:inner], operand, *given[where][inner + 1 :]]
        if self.alone:
            args[0] = _alone(args[0])
        if self.writes:
            return _on_copies(self.op, args, kwargs, self.writes)
        result = self.op(*args, **kwargs)
        return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is all of its storage, in logical order."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


class Calls:
    """All calls of a plan, made ready once.

    Attributes:
        followed: Knows the leaves that values follow from.
    """

    def __init__(self, data: PlanData) -> None:
        """Decode them.

        Raises:
            KeyError: An op is none that plans may hold.
            ValueError: A literal cannot be read.
        """
        self._data = data
        self._leaves = {leaf.fqn: leaf for leaf in data.leaves}
        self.followed = Followed(data.calls)

    @cached_property
    def ready(self) -> tuple[Ready, ...]:
        """The calls."""
        return tuple(map(self._ready, self._data.calls))

    @cached_property
    def steady(self) -> frozenset[int]:
        """Calls whose result seldom changes: they follow from no floating-point weight.

        Tables of indices and masks, and what is made of them, are the same in every checkpoint.
        """
        found: set[int] = set()
        for number, one in enumerate(self.ready):
            if all(self._is_steady(value, found) for value in one.operands):
                found.add(number)
        return frozenset(found)

    @cached_property
    def frontier(self) -> frozenset[int]:
        """Steady calls whose results go into a slot or into a call that is not steady."""
        used = [row.value for row in self._data.ledger]
        for number, one in enumerate(self.ready):
            if number not in self.steady:
                used += one.operands
        found = {value.call for value in used if isinstance(value, CallRef)}
        return frozenset(found & self.steady)

    def _is_steady(self, value: Value, found: set[int]) -> bool:
        if isinstance(value, CallRef):
            return value.call in found
        if isinstance(value, PinnedRef):
            return True
        leaf = self._leaves[value.fqn]
        return not leaf.persistent or not _is_float(leaf.dtype)

    def _ready(self, one: OpCall) -> Ready:
        op = ops.overload(one.op)
        operands = operands_of(one)
        anywhere = ops.is_exact_anywhere(one, [self._dtype(value) for value in operands])
        return Ready(
            op=op,
            args=tuple(map(decode_literal, one.args)),
            kwargs={name: decode_literal(value) for name, value in one.kwargs.items()},
            operands=operands,
            places=tuple(_places(one)),
            writes=_writes(op),
            results=len(one.results),
            alone=one.op.startswith(_FROM_STORAGE),
            whole=tuple(map(self._is_whole, operands)),
            sensitive=ops.is_sensitive(
                one.op, [self._dtype(value) for value in operands], one.kwargs.get("alpha", 1)
            ),
            anywhere=anywhere,
            device=one.device,
        )

    def _is_whole(self, value: Value) -> bool:
        """Whether a value is all of its memory: no view but for its shape."""
        while isinstance(value, CallRef):
            one = self._data.calls[value.call]
            op = ops.overload(one.op)
            if op is _CONTIGUOUS or not is_view(op):
                return True
            if op not in RESHAPES:
                return False
            (value,) = operands_of(one)
        return True

    def _dtype(self, value: Value) -> str:
        return self.facts(value)[0]

    def facts(self, value: Value) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a value."""
        if isinstance(value, CallRef):
            result = self._data.calls[value.call].results[value.output]
            return result.dtype, result.shape
        found = (
            self._leaves[value.fqn]
            if isinstance(value, SourceRef)
            else self._data.pinned[value.name]
        )
        return found.dtype, found.shape

    @cached_property
    def batches(self) -> Mapping[int, Batch]:
        """Batches, by the calls in them."""
        found = batched(self._data.calls, [one.operands for one in self.ready], self)
        return {number: batch for batch in found for number in batch.members}


def _places(one: OpCall) -> Iterator[tuple[int | str, int | None]]:
    """Where they stand, in the same order."""
    given: list[tuple[int | str, Any]] = [*enumerate(one.args), *one.kwargs.items()]
    for where, argument in given:
        if is_reference(argument):
            yield where, None
        elif isinstance(argument, tuple):
            yield from ((where, i) for i, a in enumerate(argument) if is_reference(a))


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat", "complex"))


# MERGED batches: Calls of one kind on many small tensors, made as one.
#
# A network folds each of its BatchNorms with the same few ops. Their operands, laid end to end,
# need each op once. The results are the same bits: the ops below compute every element on its
# own, and in the same way wherever it lies (a test holds that).

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
