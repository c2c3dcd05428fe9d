"""The calls of a plan, decoded once so that they can be run in every refit.

This module hides how a stored call becomes a call of torch: decoded arguments, copies for ops that
write, the device that gives the recorded bits, and the memory layout that gives them. Read ``call``
first: it is how recordings run an op. ``PreparedCall`` runs a stored call, and ``Calls`` prepares
all calls of a plan.

The last section finds batches: calls of one kind on many small tensors that run as one call. A
network folds each of its BatchNorms with the same few ops. If their operands are concatenated, each
op runs once. The results have the same bits, because the batched ops compute every element on its
own, in the same way wherever it lies (``tests/unit/recipe/test_batches.py`` checks that).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from refitkit.model import CallRef, PinnedRef, SourceRef
from refitkit.recipe import ops
from refitkit.recipe.ops import (
    LeafDependencies,
    aligned,
    decode_literal,
    is_reference,
    operands_of,
    same_settings,
)
from refitkit.recipe.origins import RESHAPES, is_view

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from refitkit.model import OpCall, PlanData, Value


_CONTIGUOUS = torch.ops.aten.contiguous.default
_FROM_STORAGE = ("aten.as_strided", "aten._reshape_alias")
"""Starts of the names of ops whose offsets count from the start of the operand's storage."""

Results: TypeAlias = tuple[torch.Tensor, ...]
"""The tensors that a call returns."""


def call(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Results:
    """The results of an op. No operand is changed.

    An op that writes to an argument runs on a copy, and the copy is the result.

    Args:
        op: An overload of an aten op.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    written_args = _written_args(op)
    if written_args:
        return _call_on_copies(op, args, kwargs, written_args)
    result = op(*args, **kwargs)
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def _written_args(op: Any) -> int:
    """How many leading arguments an op writes to."""
    return sum(bool(a.alias_info and a.alias_info.is_write) for a in op._schema.arguments)  # noqa: SLF001


def _call_on_copies(
    op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], written_args: int
) -> Results:
    copies = [a.clone(memory_format=torch.contiguous_format) for a in args[:written_args]]
    op(*copies, *args[written_args:], **kwargs)
    return tuple(copies)


@dataclass(frozen=True)
class PreparedCall:
    """A stored call that can be run with given operands.

    Attributes:
        op: The overload.
        args: Decoded positional arguments. References to operands are placeholders.
        kwargs: Decoded keyword arguments, with the same placeholders.
        operands: References to the tensors among the arguments.
        operand_positions: Where each operand goes: position or name of the argument, and the
            position in it if the argument is a list.
        written_args: How many leading arguments the op writes to.
        result_count: How many tensors the op returns.
        needs_own_storage: Whether offsets count from the start of the first operand's storage. The
            operand must then be alone in its storage.
        owns_storage: For each operand, whether it is not a view. Such an operand is copied to where
            recordings have it: contiguous and aligned. A view lies in an operand of another call.
        is_sensitive: Whether the bits of results depend on memory layout, threads or settings.
        is_exact_anywhere: Whether every device gives the same bits.
        device: Kind of device that the call was recorded on: ``cpu``, ``cuda``.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[Value, ...]
    operand_positions: tuple[tuple[int | str, int | None], ...]
    written_args: int
    result_count: int
    needs_own_storage: bool
    owns_storage: tuple[bool, ...]
    is_sensitive: bool
    is_exact_anywhere: bool
    device: str

    @property
    def has_fast_path(self) -> bool:
        """Whether it returns one tensor, writes nothing, and takes all operands by position."""
        is_positional = all(
            isinstance(where, int) and inner is None for where, inner in self.operand_positions
        )
        kinds = [str(one.type) for one in self.op._schema.returns]  # noqa: SLF001
        is_special = (
            self.written_args or self.needs_own_storage or self.is_sensitive or self.is_contiguous
        )
        return is_positional and not is_special and kinds == ["Tensor"]

    @property
    def is_contiguous(self) -> bool:
        """Whether the op is ``aten.contiguous``, which only puts elements one after another."""
        return self.op is _CONTIGUOUS

    def device_for(self, device: torch.device) -> torch.device:
        """Device to run on if the operands are on ``device``.

        Another device than theirs is returned if only that one gives the recorded bits.
        """
        return device if self.is_exact_on(device.type) else torch.device(self.device)

    def is_exact_on(self, kind: str) -> bool:
        """Whether a kind of device, such as ``cuda``, gives the recorded bits."""
        return self.is_exact_anywhere or kind == self.device

    def __call__(self, operands: Sequence[torch.Tensor]) -> Results:
        """Run the op.

        Args:
            operands: A tensor for each of ``self.operands``, all on one device.
        """
        if self.is_contiguous:
            return (aligned(operands[0]),)
        if not self.is_sensitive:
            return self._run(operands)
        # views are not copied: a copy would change their strides, which kernels depend on
        placed = [
            aligned(tensor) if is_owner else tensor
            for tensor, is_owner in zip(operands, self.owns_storage, strict=True)
        ]
        with same_settings():
            return self._run(placed)

    def _run(self, operands: Sequence[torch.Tensor]) -> Results:
        args, kwargs = list(self.args), dict(self.kwargs)
        for (where, inner), operand in zip(self.operand_positions, operands, strict=True):
            arguments: Any = kwargs if isinstance(where, str) else args
            if inner is None:
                arguments[where] = operand
            else:  # a new list: the decoded one is shared by all runs
                before, after = arguments[where][:inner], arguments[where][inner + 1 :]
                arguments[where] = [*before, operand, *after]
        if self.needs_own_storage:
            args[0] = _alone_in_storage(args[0])
        if self.written_args:
            return _call_on_copies(self.op, args, kwargs, self.written_args)
        result = self.op(*args, **kwargs)
        return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def _alone_in_storage(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor that fills its storage: the given one, or a copy."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


class Calls:
    """All calls of a plan, prepared on first use.

    Attributes:
        dependencies: The leaves that each value depends on.
    """

    def __init__(self, data: PlanData) -> None:
        """Decode nothing yet.

        Args:
            data: A plan that was vetted, or that this process recorded.
        """
        self._data = data
        self._leaves = {leaf.fqn: leaf for leaf in data.leaves}
        self.dependencies = LeafDependencies(data.calls)

    @cached_property
    def prepared(self) -> tuple[PreparedCall, ...]:
        """The calls, by number.

        Raises:
            KeyError: Plans may not hold the op of a call.
            ValueError: A literal cannot be decoded.
        """
        return tuple(map(self._prepare, self._data.calls))

    @cached_property
    def steady(self) -> frozenset[int]:
        """Numbers of the calls that depend on no floating-point weight, so seldom change.

        Tables of indices and masks, and what is computed from them, are equal in all checkpoints.
        """
        # calls come after the calls that they depend on, so one pass is enough
        steady: set[int] = set()
        for number, one in enumerate(self.prepared):
            if all(self._is_steady(value, steady) for value in one.operands):
                steady.add(number)
        return frozenset(steady)

    @cached_property
    def frontier(self) -> frozenset[int]:
        """Steady calls whose results a slot or a call that is not steady uses.

        Their results are worth caching. Results of other steady calls are not needed again.
        """
        used = [row.value for row in self._data.ledger]
        for number, one in enumerate(self.prepared):
            if number not in self.steady:
                used += one.operands
        numbers = {value.call for value in used if isinstance(value, CallRef)}
        return frozenset(numbers & self.steady)

    def _is_steady(self, value: Value, steady: set[int]) -> bool:
        if isinstance(value, CallRef):
            return value.call in steady
        if isinstance(value, PinnedRef):
            return True
        leaf = self._leaves[value.fqn]
        # the plan keeps leaves that no state_dict holds; integer leaves are tables of indices
        return not leaf.persistent or not _is_float(leaf.dtype)

    def _prepare(self, one: OpCall) -> PreparedCall:
        op = ops.overload(one.op)
        operands = operands_of(one)
        dtypes = [self.dtype_and_shape(value)[0] for value in operands]
        return PreparedCall(
            op=op,
            args=tuple(map(decode_literal, one.args)),
            kwargs={name: decode_literal(value) for name, value in one.kwargs.items()},
            operands=operands,
            operand_positions=tuple(_operand_positions(one)),
            written_args=_written_args(op),
            result_count=len(one.results),
            needs_own_storage=one.op.startswith(_FROM_STORAGE),
            owns_storage=tuple(map(self._owns_storage, operands)),
            is_sensitive=ops.is_sensitive(one.op, dtypes, one.kwargs.get("alpha", 1)),
            is_exact_anywhere=ops.is_exact_anywhere(one, dtypes),
            device=one.device,
        )

    def _owns_storage(self, value: Value) -> bool:
        """Whether a value fills its storage. A reshape of one does, other views do not."""
        while isinstance(value, CallRef):
            one = self._data.calls[value.call]
            op = ops.overload(one.op)
            if op is _CONTIGUOUS or not is_view(op):
                return True
            if op not in RESHAPES:
                return False
            (value,) = operands_of(one)
        return True

    def dtype_and_shape(self, value: Value) -> tuple[str, tuple[int, ...]]:
        """Dtype, without the ``torch.``, and shape of a value."""
        if isinstance(value, CallRef):
            result = self._data.calls[value.call].results[value.output]
            return result.dtype, result.shape
        tensor = (
            self._leaves[value.fqn]
            if isinstance(value, SourceRef)
            else self._data.pinned[value.name]
        )
        return tensor.dtype, tensor.shape

    @cached_property
    def batches(self) -> Mapping[int, Batch]:
        """The batch of each call that is in one, by number of the call."""
        batches = _find_batches(self._data.calls, self)
        return {number: batch for batch in batches for number in batch.members}


def _operand_positions(one: OpCall) -> Iterator[tuple[int | str, int | None]]:
    """Positions of a call's operands among its arguments, in the order of ``operands_of``."""
    arguments: list[tuple[int | str, Any]] = [*enumerate(one.args), *one.kwargs.items()]
    for where, argument in arguments:
        if is_reference(argument):
            yield where, None
        elif isinstance(argument, tuple):
            yield from ((where, i) for i, a in enumerate(argument) if is_reference(a))


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat", "complex"))


# -- batches ----------------------------------------------------------------------------------

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
"""Ops whose calls can run as one. Each computes every element on its own."""
_SQUARE_ROOT = "aten.sqrt.default"
"""Sensitive (:func:`refitkit.recipe.ops.is_sensitive`) in general, but not of contiguous floats."""
_MIN_MEMBERS = 4
_MAX_OPERAND_ELEMENTS = 1 << 14
"""Concatenating larger operands costs more than their calls do."""
_MAX_RESULT_ELEMENTS = 1 << 16
"""All results of a batch are in memory at once, whichever of them is read."""


@dataclass(frozen=True)
class Batch:
    """Calls that run as one.

    Attributes:
        members: Numbers of the calls.
        operands: For each operand of the op, its value in every member.
        reuses_batch: For each operand, whether its values are all results of one batch, in order.
        sizes: Number of elements of each result.
        shapes: Shape of each result.
    """

    members: tuple[int, ...]
    operands: tuple[tuple[Value, ...], ...]
    reuses_batch: tuple[bool, ...]
    sizes: list[int]
    shapes: tuple[tuple[int, ...], ...]


def _find_batches(calls: Sequence[OpCall], prepared: Calls) -> list[Batch]:
    """All batches among the calls of a plan. Steady calls are in none."""
    kinds: dict[int, Any] = {}
    levels: list[int] = []
    members: dict[Any, list[int]] = defaultdict(list)
    for number, one in enumerate(calls):
        operands = prepared.prepared[number].operands
        below = [levels[value.call] for value in operands if isinstance(value, CallRef)]
        levels.append(max(below, default=0))
        if number in prepared.steady or not _can_batch(one, operands, prepared):
            continue
        # calls of one kind are on one level, so that none depends on another one of its batch
        levels[number] += 1
        literals = [a for a in (*one.args, *one.kwargs.items()) if not is_reference(a)]
        # calls whose operands come from one batch take its flat result without concatenating
        operand_kinds = tuple(
            kinds.get(value.call) if isinstance(value, CallRef) else None for value in operands
        )
        dtypes = tuple(prepared.dtype_and_shape(value)[0] for value in operands)
        # everything that must be equal for calls to run as one
        kind = one.op, one.device, repr(literals), dtypes, operand_kinds, levels[number]
        kinds[number] = kind
        members[kind].append(number)
    parts = [part for numbers in members.values() for part in _split(numbers, calls)]
    part_of = {number: part for part in parts for number in part}
    return [_batch(part, calls, prepared, part_of) for part in parts]


def _can_batch(one: OpCall, operands: Sequence[Value], prepared: Calls) -> bool:
    """Whether the op can be batched, and all operands are small and have the result's shape."""
    if one.op not in BATCHED or len(one.results) != 1:
        return False
    dtypes = [prepared.dtype_and_shape(value)[0] for value in operands]
    if one.op == _SQUARE_ROOT:
        if any(dtype.startswith("complex") for dtype in dtypes):
            return False
    # a batch has other addresses and sizes than its members had in the recording
    elif ops.is_sensitive(one.op, dtypes, one.kwargs.get("alpha", 1)):
        return False
    shape = one.results[0].shape
    return 0 < prod(shape) <= _MAX_OPERAND_ELEMENTS and all(
        prepared.dtype_and_shape(value)[1] == shape for value in operands
    )


def _split(numbers: Sequence[int], calls: Sequence[OpCall]) -> Iterator[list[int]]:
    """Calls of one kind in parts that fit ``_MAX_RESULT_ELEMENTS``. Small parts are left out."""
    part, size = list[int](), 0
    for number in numbers:
        count = prod(calls[number].results[0].shape)
        if part and size + count > _MAX_RESULT_ELEMENTS:
            yield from [part] if len(part) >= _MIN_MEMBERS else []
            part, size = [], 0
        part.append(number)
        size += count
    yield from [part] if len(part) >= _MIN_MEMBERS else []


def _batch(
    numbers: list[int],
    calls: Sequence[OpCall],
    prepared: Calls,
    part_of: Mapping[int, list[int]],
) -> Batch:
    operands = [prepared.prepared[number].operands for number in numbers]
    # one column for each operand of the op, with one value for each member
    columns = tuple(zip(*operands, strict=True))
    shapes = tuple(calls[number].results[0].shape for number in numbers)
    return Batch(
        members=tuple(numbers),
        operands=columns,
        reuses_batch=tuple(_is_one_batch(column, part_of) for column in columns),
        sizes=[prod(shape) for shape in shapes],
        shapes=shapes,
    )


def _is_one_batch(column: Sequence[Value], part_of: Mapping[int, list[int]]) -> bool:
    first = column[0]
    if not isinstance(first, CallRef):
        return False
    return part_of.get(first.call) == [v.call for v in column if isinstance(v, CallRef)]
