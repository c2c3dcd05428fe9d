"""Computing values as recipes say.

Each call is made when its first result is needed and forgotten after the last use of it, so values
that are read one after another never lie in memory all at once.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import PlanMismatchError, Problem, raise_if_resource
from refitkit.model import CallRef, PinnedRef, SourceRef
from refitkit.program.bits import same_bits
from refitkit.recipe.ops import calls_below, is_flushing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from refitkit.model import Value
    from refitkit.recipe.calls import Batch, Calls, Ready, Results


@contextmanager
def quiet() -> Iterator[None]:
    """Without gradients and autocast and with denormals, whatever the caller has switched on."""
    flushing = is_flushing()
    with torch.no_grad(), torch._C._DisableAutocast():  # noqa: SLF001 - of all devices at once
        if not flushing:
            yield
            return
        torch.set_flush_denormal(False)
        try:
            yield
        finally:
            torch.set_flush_denormal(True)


class Kept:
    """Results of steady calls, from one refit to the next, with the leaves that they were made of.

    Entries are replaced as a whole, so threads that refit at the same time do no harm.
    """

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._entries: dict[int, tuple[Mapping[str, torch.Tensor], Results]] = {}

    def of(self, number: int, leaves: Mapping[str, torch.Tensor]) -> Results | None:
        """Results of a call, if they were made of the same values of these leaves."""
        known, results = self._entries.get(number, ({}, None))
        if results is None or any(
            known[fqn].device != value.device or not same_bits(known[fqn], value)
            for fqn, value in leaves.items()
        ):
            return None
        return results

    def keep(self, number: int, leaves: Mapping[str, torch.Tensor], results: Results) -> None:
        """Keep results; copies of those that are views of leaves, which others may change."""
        copies = {fqn: value.detach().clone() for fqn, value in leaves.items()}
        theirs = {value.untyped_storage().data_ptr() for value in leaves.values()}
        own = tuple(
            one.clone() if one.untyped_storage().data_ptr() in theirs else one for one in results
        )
        self._entries[number] = copies, own


class Replay:
    """Values from one source."""

    def __init__(
        self,
        schedules: Schedules,
        values: Sequence[Value],
        leaf: Callable[[str], torch.Tensor],
        pinned: Callable[[str], torch.Tensor],
        kept: Kept,
    ) -> None:
        """Compute nothing yet.

        Args:
            schedules: Orders of the plan's calls.
            values: Values that will be asked for, once each, best in this order; others can be,
                and again, and are then computed on their own.
            leaf: Gives a leaf of the program.
            pinned: Gives a tensor that the plan keeps.
            kept: Results of the refits before.
        """
        self._schedules, self._leaf, self._pinned, self._kept = schedules, leaf, pinned, kept
        self._wanted = tuple(value for value in values if isinstance(value, CallRef))
        self._run: _Run | None = None
        self._lock = threading.Lock()

    def value(self, value: Value) -> torch.Tensor:
        """Compute one."""
        if isinstance(value, SourceRef):
            return self._leaf(value.fqn)
        if isinstance(value, PinnedRef):
            return self._pinned(value.name)
        with self._lock:
            if self._run is None:
                self._run = self._start(self._wanted)
            if self._run.is_ahead(value):
                with quiet():
                    self._run.reach(value)
            found = self._run.take(value)
        if found is None:
            with quiet():
                found = self._alone(value)
        # whoever reads memory by its address knows nothing of what torch put off
        return found.resolve_neg().resolve_conj() if found.is_neg() or found.is_conj() else found

    def _alone(self, value: CallRef) -> torch.Tensor:
        run = self._start((value,))
        run.reach(value)
        found = run.take(value)
        if found is None:
            raise KeyError(value)
        return found

    def _start(self, values: tuple[CallRef, ...]) -> _Run:
        return _Run(self._schedules.of(values), self._leaf, self._pinned, self._below)

    def _below(self, number: int) -> Results:
        """Results of a steady call: those of before, if its leaves are what they were."""
        leaves = {fqn: self._leaf(fqn) for fqn in self._schedules.calls.followed.by_call(number)}
        found = self._kept.of(number, leaves)
        if found is None:
            schedule = self._schedules.below(number)
            run = _Run(schedule, leaves.__getitem__, self._pinned, self._below)
            found = run.results()
            self._kept.keep(number, leaves, found)
        return found


class _Run:
    """Steps of a schedule, made as far as they are needed."""

    def __init__(
        self,
        schedule: Schedule,
        leaf: Callable[[str], torch.Tensor],
        pinned: Callable[[str], torch.Tensor],
        steady: Callable[[int], Results],
    ) -> None:
        self._schedule, self._leaf, self._pinned, self._steady = schedule, leaf, pinned, steady
        self._tensors: list[Any] = [None] * schedule.size
        self._left = dict(schedule.reads)
        self._next = 0
        self._home: torch.device | None = None  # where everything is, unless it is scattered
        self._scattered = False

    def is_ahead(self, value: CallRef) -> bool:
        """Whether steps have to be made before it can be taken."""
        place = self._schedule.place.get(value)
        return place is not None and self._left[place] > 0 and self._tensors[place] is None

    def reach(self, value: CallRef) -> None:
        """Make steps until it is there."""
        place = self._schedule.place[value]
        while self._tensors[place] is None:
            self._step()

    def take(self, value: CallRef) -> torch.Tensor | None:
        """A value that is there; None if it was taken before, or is none of the schedule's."""
        place = self._schedule.place.get(value)
        if place is None or not self._left[place]:
            return None
        found: torch.Tensor = self._tensors[place]
        self._left[place] -= 1
        if not self._left[place] and self._schedule.final[place] < self._next:
            self._tensors[place] = None
        return found

    def results(self) -> Results:
        """All values of the schedule."""
        for value in self._schedule.place:
            self.reach(value)
        return tuple(self._tensors[place] for place in self._schedule.place.values())

    def _step(self) -> None:
        step = self._schedule.steps[self._next]
        self._next += 1
        try:
            self._do(step)
        except (RuntimeError, TypeError, ValueError, IndexError) as exc:
            raise_if_resource(exc, f"{step.name} cannot be computed")
            problem = Problem(step.name, "recipe", hint=str(exc))
            raise PlanMismatchError("A recipe cannot be computed.", problems=[problem]) from exc
        for place in step.last:
            self._tensors[place] = None

    def _do(self, step: Load | Make | Keep | Many) -> None:
        tensors = self._tensors
        if isinstance(step, Make):
            if step.simple is not None and self._is_made_at_home(step.ready):
                args = list(step.ready.args)
                for position, place in step.simple:
                    args[position] = tensors[place]
                tensors[step.places[0]] = step.ready.op(*args, **step.ready.kwargs)
            else:
                self._fill(step.places, _made(step.ready, [tensors[p] for p in step.operands]))
        elif isinstance(step, Load):
            value = step.value
            found = (
                self._leaf(value.fqn) if isinstance(value, SourceRef) else self._pinned(value.name)
            )
            self._note(found.device)
            tensors[step.place] = found
        elif isinstance(step, Keep):
            self._fill(step.places, self._steady(step.number))
        else:
            self._many(step)

    def _note(self, device: torch.device) -> None:
        """Note where something is that was read or made."""
        if self._home is None:
            self._home = device
        elif device != self._home:
            self._scattered = True

    def _is_made_at_home(self, ready: Ready) -> bool:
        """Whether a call is exact where all its operands are: nothing has to be moved."""
        home = self._home
        return home is not None and not self._scattered and ready.is_exact_on(home.type)

    def _many(self, step: Many) -> None:
        operands = [
            self._tensors[side]
            if isinstance(side, int)
            else _end_to_end([self._tensors[place] for place in side], alike=not self._scattered)
            for side in step.operands
        ]
        (flat,) = _made(step.ready, operands)
        self._note(flat.device)
        self._tensors[step.flat] = flat
        pieces = flat.split_with_sizes(step.batch.sizes)
        for place, piece, shape in zip(step.places, pieces, step.batch.shapes, strict=True):
            self._tensors[place] = piece if len(shape) == 1 else piece.view(shape)

    def _fill(self, places: tuple[int, ...], results: Results) -> None:
        for place, result in zip(places, results, strict=True):
            if not isinstance(result, torch.Tensor):
                raise TypeError("it gives no tensor")
            self._note(result.device)
            self._tensors[place] = result


def _made(ready: Ready, operands: list[torch.Tensor]) -> Results:
    device = ready.made_on(_device(operands))
    return ready([t if t.device == device else t.to(device) for t in operands])


def _end_to_end(tensors: list[torch.Tensor], *, alike: bool) -> torch.Tensor:
    flat = [t if t.dim() == 1 else t.reshape(-1) for t in tensors]
    if alike:
        return torch.cat(flat)
    device = _device(tensors)
    return torch.cat([t.to(device) for t in flat])


def _device(tensors: list[torch.Tensor]) -> torch.device:
    """Where these are: on the first device that is no CPU, if any is there."""
    return next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)


# MERGED schedule: In which order calls are made, and when their results are forgotten.
#
# Values get numbered places. A step fills places from others, and empties those that no later
# step reads; so a run is one loop over a list that was made once.


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
