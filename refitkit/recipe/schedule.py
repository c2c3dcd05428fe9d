"""In which order calls are made, and when their results are forgotten.

Values get numbered places. A step fills places from others, and empties those that no later step
reads; so a run is one loop over a list that was made once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from refitkit.model import CallRef, PinnedRef, SourceRef
from refitkit.recipe.operands import calls_below

if TYPE_CHECKING:
    from collections.abc import Sequence

    from refitkit.model import Value
    from refitkit.recipe.batches import Batch
    from refitkit.recipe.calls import Calls, Ready


@dataclass
class Load:
    """Read a leaf, or a tensor that the plan keeps."""

    value: SourceRef | PinnedRef
    place: int
    last: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return self.value.fqn if isinstance(self.value, SourceRef) else self.value.name


@dataclass
class Make:
    """Make a call.

    Attributes:
        number: The call.
        ready: It.
        operands: Places of its operands.
        places: Places for its results.
        last: Places that nobody reads any more afterwards.
        simple: Where the operands stand, if all are positional and there is one result.
    """

    number: int
    ready: Ready
    operands: tuple[int, ...]
    places: tuple[int, ...]
    last: list[int] = field(default_factory=list)
    simple: tuple[tuple[int, int], ...] | None = None

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return f"call {self.number}, {self.ready.op}"


@dataclass
class Keep:
    """Make a call whose result seldom changes, or take the one of before.

    Attributes:
        number: The call.
        places: Places for its results.
        last: None; as with the others.
    """

    number: int
    places: tuple[int, ...]
    last: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return f"call {self.number}"


@dataclass
class Many:
    """Make a batch of calls as one.

    Attributes:
        batch: The calls.
        ready: One of them.
        operands: For each operand, the place of a flat tensor, or places of its parts.
        flat: Place for all results, one after another.
        places: Places for the results.
        last: Places that nobody reads any more afterwards.
    """

    batch: Batch
    ready: Ready
    operands: tuple[int | tuple[int, ...], ...]
    flat: int
    places: tuple[int, ...]
    last: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return f"calls {list(self.batch.members)}, {self.ready.op}"


class Schedule:
    """Steps that make values, in their order.

    Attributes:
        steps: The steps.
        size: Number of places.
        place: Place of each value that was asked for.
        reads: How often each of these places is read from outside.
        final: The last step that reads or fills each place.
    """

    def __init__(self, calls: Calls, values: Sequence[CallRef], inside: int | None = None) -> None:
        """Put steps in order; each value will be read once.

        Args:
            calls: The plan's calls.
            values: What is wanted, in the order in which it will be read.
            inside: A steady call that is made here, not taken from before.
        """
        self._calls, self._inside = calls, inside
        self._numbers: dict[Any, int] = {}
        self._done: set[int] = set()
        self.steps: list[Load | Make | Keep | Many] = []
        self._needed = calls_below(values, self._operands)
        for value in values:
            self._want(value)
        self.place = {value: self._number(value) for value in values}
        self.reads = Counter(self.place[value] for value in values)
        self.size = len(self._numbers)
        self._forget()

    def _operands(self, number: int) -> tuple[Value, ...]:
        """What a call is made of: nothing where its results are kept."""
        return () if self._is_kept(number) else self._calls.ready[number].operands

    def _is_kept(self, number: int) -> bool:
        return number in self._calls.frontier and number != self._inside

    def _number(self, key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _want(self, wanted: Value) -> None:
        """Add the steps that make a value; without recursion, as chains can be long."""
        stack: list[tuple[Value, bool]] = [(wanted, False)]
        while stack:
            value, ready = stack.pop()
            if not isinstance(value, CallRef):
                self._load(value)
            elif value.call in self._done:
                continue
            elif ready:
                self._make(value.call)
            else:
                stack.append((value, True))
                stack += [(one, False) for one in reversed(self._below(value.call))]

    def _below(self, number: int) -> list[Value]:
        """What has to be there before a call is made."""
        batch = self._batch(number)
        if batch is None:
            return list(self._operands(number))
        return [value for column in batch.operands for value in column]

    def _batch(self, number: int) -> Batch | None:
        """The batch of a call, if all of it is needed and nothing of it was made."""
        batch = self._calls.batches.get(number)
        if batch is None or not self._needed.issuperset(batch.members):
            return None
        return None if self._done.intersection(batch.members) else batch

    def _load(self, value: SourceRef | PinnedRef) -> None:
        if value not in self._numbers:
            self.steps.append(Load(value, self._number(value)))

    def _make(self, number: int) -> None:
        batch = self._batch(number)
        if self._is_kept(number):
            self.steps.append(Keep(number, self._results(number)))
        elif batch is not None:
            self._many(batch)
            return
        else:
            self.steps.append(self._single(number))
        self._done.add(number)

    def _single(self, number: int) -> Make:
        ready = self._calls.ready[number]
        operands = tuple(map(self._number, ready.operands))
        simple = None
        if ready.is_simple:
            positions = [where for where, _ in ready.places if isinstance(where, int)]
            simple = tuple(zip(positions, operands, strict=True))
        return Make(number, ready, operands, self._results(number), simple=simple)

    def _many(self, batch: Batch) -> None:
        places = tuple(place for one in batch.members for place in self._results(one))
        operands = tuple(
            self._side(column, aligned=aligned)
            for column, aligned in zip(batch.operands, batch.aligned, strict=True)
        )
        flat = self._number(("flat", batch.members[0]))
        ready = self._calls.ready[batch.members[0]]
        self.steps.append(Many(batch, ready, operands, flat, places))
        self._done |= set(batch.members)

    def _side(self, column: Sequence[Value], *, aligned: bool) -> int | tuple[int, ...]:
        first = column[0]
        if aligned and isinstance(first, CallRef):
            flat = "flat", self._calls.batches[first.call].members[0]
            if flat in self._numbers:
                return self._numbers[flat]
        return tuple(map(self._number, column))

    def _results(self, number: int) -> tuple[int, ...]:
        count = self._calls.ready[number].results
        return tuple(self._number(CallRef(call=number, output=i)) for i in range(count))

    def _forget(self) -> None:
        """Say after which step each place is read for the last time."""
        outside = set(self.reads)
        self.final: dict[int, int] = {}
        for position in reversed(range(len(self.steps))):
            step = self.steps[position]
            used = _used(step)
            step.last = sorted(used - self.final.keys() - outside)
            self.final.update(dict.fromkeys(used - self.final.keys(), position))


class Schedules:
    """Schedules of a plan's calls, made once where they are asked for again.

    Attributes:
        calls: The calls.
    """

    def __init__(self, calls: Calls) -> None:
        """Make none yet."""
        self.calls = calls
        self._below: dict[int, Schedule] = {}
        self._last: dict[tuple[CallRef, ...], Schedule] = {}

    def of(self, values: tuple[CallRef, ...]) -> Schedule:
        """The order of calls for these values; that of the last several values is kept."""
        if len(values) < 2:  # noqa: PLR2004 - values that are asked for alone are seldom the same
            return Schedule(self.calls, values)
        if values not in self._last:
            self._last = {values: Schedule(self.calls, values)}
        return self._last[values]

    def below(self, number: int) -> Schedule:
        """The order of calls for all results of one steady call."""
        if number not in self._below:
            count = self.calls.ready[number].results
            results = tuple(CallRef(call=number, output=i) for i in range(count))
            self._below[number] = Schedule(self.calls, results, inside=number)
        return self._below[number]


def _used(step: Load | Make | Keep | Many) -> set[int]:
    """Places that a step reads or fills."""
    if isinstance(step, Load):
        return {step.place}
    if isinstance(step, Make):
        return {*step.operands, *step.places}
    if isinstance(step, Keep):
        return set(step.places)
    sides = (one if isinstance(one, tuple) else (one,) for one in step.operands)
    return {step.flat, *step.places, *(place for side in sides for place in side)}
