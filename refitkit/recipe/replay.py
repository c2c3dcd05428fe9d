"""Computing values as recipes say.

Each call is made when its first result is needed and forgotten after the last use of it, so values
that are read one after another never lie in memory all at once.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from refitkit.errors import PlanMismatchError, Problem
from refitkit.model import CallRef, PinnedRef, SourceRef
from refitkit.program.bits import same_bits
from refitkit.recipe import ops
from refitkit.recipe.batches import batched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from refitkit.model import OpCall, PlanData, Value
    from refitkit.recipe.batches import Batch

_References = (SourceRef, PinnedRef, CallRef)
_Results: TypeAlias = tuple[torch.Tensor, ...]


def call(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Results:
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


def _on_copies(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], writes: int) -> _Results:
    copies = [a.clone(memory_format=torch.contiguous_format) for a in args[:writes]]
    op(*copies, *args[writes:], **kwargs)
    return tuple(copies)


@contextmanager
def quiet() -> Iterator[None]:
    """Without gradients and without autocast, whatever the caller has switched on."""
    with torch.no_grad(), torch._C._DisableAutocast():  # noqa: SLF001 - of all devices at once
        yield


@dataclass(frozen=True)
class _Ready:
    """A call that can be made.

    Attributes:
        op: The overload.
        args: Arguments, decoded; what stands for operands is replaced.
        kwargs: Keyword arguments, likewise.
        operands: The tensors among them.
        places: Where each operand goes: a position or a name, and for a list a position in it.
        writes: How many of its first arguments it writes to.
        anywhere: Whether it is exact on every device.
        device: Kind of device that it was recorded on.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[Value, ...]
    places: tuple[tuple[int | str, int | None], ...]
    writes: int
    anywhere: bool
    device: str

    def __call__(self, operands: Sequence[torch.Tensor]) -> _Results:
        """Make it with these operands."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for (where, inner), operand in zip(self.places, operands, strict=True):
            given: Any = kwargs if isinstance(where, str) else args
            if inner is None:
                given[where] = operand
            else:
                given[where] = [*given[where][:inner], operand, *given[where][inner + 1 :]]
        if self.writes:
            return _on_copies(self.op, args, kwargs, self.writes)
        result = self.op(*args, **kwargs)
        return (result,) if isinstance(result, torch.Tensor) else tuple(result)


class Calls:
    """All calls of a plan, made ready once."""

    def __init__(self, data: PlanData) -> None:
        """Decode them.

        Raises:
            KeyError: An op is none that plans may hold.
            ValueError: A literal cannot be read.
        """
        self._data = data
        self._leaves = {leaf.fqn: leaf for leaf in data.leaves}

    @cached_property
    def ready(self) -> tuple[_Ready, ...]:
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

    @cached_property
    def _followed(self) -> tuple[frozenset[str], ...]:
        found: list[frozenset[str]] = []
        for one in self.ready:
            names = {value.fqn for value in one.operands if isinstance(value, SourceRef)}
            earlier = (found[value.call] for value in one.operands if isinstance(value, CallRef))
            found.append(frozenset(names).union(*earlier))
        return tuple(found)

    def leaves_of(self, value: Value) -> frozenset[str]:
        """The leaves that a value follows from."""
        if isinstance(value, SourceRef):
            return frozenset({value.fqn})
        return self.follows(value.call) if isinstance(value, CallRef) else frozenset()

    def follows(self, number: int) -> frozenset[str]:
        """The leaves that a call follows from."""
        return self._followed[number]

    def _is_steady(self, value: Value, found: set[int]) -> bool:
        if isinstance(value, CallRef):
            return value.call in found
        if isinstance(value, PinnedRef):
            return True
        leaf = self._leaves[value.fqn]
        return not leaf.persistent or not _is_float(leaf.dtype)

    def _ready(self, one: OpCall) -> _Ready:
        op = ops.overload(one.op)
        operands = operands_of(one)
        return _Ready(
            op=op,
            args=tuple(map(ops.decode, one.args)),
            kwargs={name: ops.decode(value) for name, value in one.kwargs.items()},
            operands=operands,
            places=tuple(_places(one)),
            writes=_writes(op),
            anywhere=ops.is_exact_anywhere(one, [self._dtype(value) for value in operands]),
            device=one.device,
        )

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

    def needed(self, values: Sequence[Value]) -> Counter[int]:
        """How often each call's results are used when these values are computed once each."""
        uses: Counter[int] = Counter()
        stack = [value for value in values if isinstance(value, CallRef)]
        while stack:
            value = stack.pop()
            uses[value.call] += 1
            if uses[value.call] == 1:
                operands = self.ready[value.call].operands
                stack += [one for one in operands if isinstance(one, CallRef)]
        return uses


def operands_of(one: OpCall) -> tuple[Value, ...]:
    """The tensors among the arguments of a call."""
    flat: list[Any] = []
    for argument in (*one.args, *one.kwargs.values()):
        flat += argument if isinstance(argument, tuple) else (argument,)
    return tuple(value for value in flat if isinstance(value, _References))


def _places(one: OpCall) -> Iterator[tuple[int | str, int | None]]:
    """Where they stand, in the same order."""
    given: list[tuple[int | str, Any]] = [*enumerate(one.args), *one.kwargs.items()]
    for where, argument in given:
        if isinstance(argument, _References):
            yield where, None
        elif isinstance(argument, tuple):
            yield from ((where, i) for i, a in enumerate(argument) if isinstance(a, _References))


class Kept:
    """Results of steady calls, from one refit to the next, with the leaves that they were made of.

    Entries are replaced as a whole, so threads that refit at the same time do no harm.
    """

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._entries: dict[int, tuple[Mapping[str, torch.Tensor], _Results]] = {}

    def of(self, number: int, leaves: Mapping[str, torch.Tensor]) -> _Results | None:
        """Results of a call, if they were made of the same values of these leaves."""
        known, results = self._entries.get(number, ({}, None))
        if results is None or any(
            known[fqn].device != value.device or not same_bits(known[fqn], value)
            for fqn, value in leaves.items()
        ):
            return None
        return results

    def keep(self, number: int, leaves: Mapping[str, torch.Tensor], results: _Results) -> None:
        """Keep results."""
        copies = {fqn: value.detach().clone() for fqn, value in leaves.items()}
        self._entries[number] = copies, results


class Replay:
    """Values from one source."""

    def __init__(
        self,
        calls: Calls,
        values: Sequence[Value],
        leaf: Callable[[str], torch.Tensor],
        pinned: Callable[[str], torch.Tensor],
        kept: Kept,
    ) -> None:
        """Compute nothing yet.

        Args:
            calls: The plan's calls.
            values: Values that will be asked for, once each; others can be, and are then not
                shared.
            leaf: Gives a leaf of the program.
            pinned: Gives a tensor that the plan keeps.
            kept: Results of the refits before.
        """
        self._calls, self._leaf, self._pinned, self._kept = calls, leaf, pinned, kept
        self._left = calls.needed(values)
        self._made: dict[int, _Results] = {}
        self._flat: dict[int, torch.Tensor] = {}

    def value(self, value: Value) -> torch.Tensor:
        """Compute one."""
        with quiet():
            return self._value(value)

    def _value(self, value: Value) -> torch.Tensor:
        if isinstance(value, SourceRef):
            return self._leaf(value.fqn)
        if isinstance(value, PinnedRef):
            return self._pinned(value.name)
        results = self._results(value.call)
        return results[value.output]

    def _results(self, number: int) -> _Results:
        found = self._made.get(number)
        if found is None:
            found = self._made_now(number)
        self._used(number, found)
        return found

    def _made_now(self, number: int) -> _Results:
        if number in self._calls.frontier:
            return self._steady(number)
        batch = self._calls.batches.get(number)
        if batch is not None and self._whole(batch):
            return self._of_batch(batch)[number]
        return self._call(number)

    def _used(self, number: int, results: _Results) -> None:
        """Count one use of a call's results, and forget them after the last."""
        self._left[number] -= 1
        if self._left[number] > 0:
            self._made[number] = results
        else:
            self._made.pop(number, None)

    # -- many at once -----------------------------------------------------------------------

    def _whole(self, batch: Batch) -> bool:
        """Whether all calls of a batch are still to be made."""
        return batch.members[0] not in self._flat and all(
            self._left[number] > 0 and number not in self._made for number in batch.members
        )

    def _of_batch(self, batch: Batch) -> dict[int, _Results]:
        first = batch.members[0]
        operands = [self._side(batch, place) for place in range(len(batch.operands))]
        flat = self._flat[first] = self._run(first, operands)[0]
        pieces = flat.split_with_sizes(batch.sizes)
        found: dict[int, _Results] = {
            number: (piece if len(shape) == 1 else piece.view(shape),)
            for number, piece, shape in zip(batch.members, pieces, batch.shapes, strict=True)
        }
        self._made.update(found)
        return found

    def _side(self, batch: Batch, place: int) -> torch.Tensor:
        """One operand of all calls of a batch, one after another."""
        values = batch.operands[place]
        below = self._below(batch, place)
        if below is None:
            tensors = [self._value(value).reshape(-1) for value in values]
            there = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
            return torch.cat([t if t.device == there else t.to(there) for t in tensors])
        for number in below.members:
            if number in self._made:
                self._used(number, self._made[number])
        return self._flat[below.members[0]]

    def _below(self, batch: Batch, place: int) -> Batch | None:
        """The batch whose results are this operand, if it is made as one."""
        first = batch.operands[place][0]
        if not batch.aligned[place] or not isinstance(first, CallRef):
            return None
        below = self._calls.batches[first.call]
        if below.members[0] not in self._flat and self._whole(below):
            self._of_batch(below)
        return below if below.members[0] in self._flat else None

    def _steady(self, number: int) -> _Results:
        leaves = {fqn: self._leaf(fqn) for fqn in self._calls.follows(number)}
        found = self._kept.of(number, leaves)
        if found is None:
            found = self._call(number)
            self._kept.keep(number, leaves, found)
        return found

    def _call(self, number: int) -> _Results:
        return self._run(number, [self._value(v) for v in self._calls.ready[number].operands])

    def _run(self, number: int, operands: list[torch.Tensor]) -> _Results:
        one = self._calls.ready[number]
        device = _device(one, operands)
        try:
            results = one([t if t.device == device else t.to(device) for t in operands])
        except (RuntimeError, TypeError, ValueError, IndexError) as exc:
            problem = Problem(f"call {number}", str(one.op), hint=str(exc))
            raise PlanMismatchError("A recipe cannot be computed.", problems=[problem]) from exc
        if not all(isinstance(result, torch.Tensor) for result in results):
            problem = Problem(f"call {number}", str(one.op), "no tensor")
            raise PlanMismatchError("A recipe cannot be computed.", problems=[problem])
        return results


def _device(one: _Ready, operands: list[torch.Tensor]) -> torch.device:
    """Where a call is made: where its operands are, or where it was recorded if that matters."""
    there = next((t.device for t in operands if t.device.type != "cpu"), operands[0].device)
    return there if one.anywhere or there.type == one.device else torch.device(one.device)


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat", "complex"))
