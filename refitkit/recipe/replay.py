"""Compute values from recipes, each call once and with little memory.

This module hides in which order calls run and when their results are freed. A call runs when its
first result is needed, and its results are freed after their last use. So values that are loaded
one after another are never all in memory at once.

Read ``Replay`` first: it computes the values of one refit. A ``Schedule`` puts calls in order once
per plan; ``Schedules`` caches them. Values get numbered places. Each step of a schedule fills
places from others, and then empties the places that no later step reads. So a run (``_Run``) is one
loop over a list. ``ResultCache`` keeps results of steady calls from one refit to the next.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from refitkit.errors import PlanMismatchError, Problem, raise_if_resource
from refitkit.model import CallRef, PinnedRef, SourceRef
from refitkit.program.bits import same_bits
from refitkit.recipe.ops import calls_below, is_flushing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from refitkit.model import Value
    from refitkit.recipe.calls import Batch, Calls, PreparedCall, Results


class Replay:
    """Computes values of a plan from one source. Threads may share it."""

    def __init__(
        self,
        schedules: Schedules,
        values: Sequence[Value],
        leaf: Callable[[str], torch.Tensor],
        pinned: Callable[[str], torch.Tensor],
        steady_results: ResultCache,
    ) -> None:
        """Compute nothing yet.

        Args:
            schedules: Schedules of the plan.
            values: Values that will be asked for once each, preferably in this order. Other values,
                and the same ones again, can be asked for. They are then computed on their own.
            leaf: Returns a leaf of the program, by FQN.
            pinned: Returns a tensor that the plan keeps, by name.
            steady_results: Results of steady calls of earlier refits.
        """
        self._schedules = schedules
        self._leaf, self._pinned = self._noting(leaf), self._noting(pinned)
        self._read: set[int] = set()  # addresses of the memory of all tensors that were read
        self._steady_results = steady_results
        self._expected = tuple(value for value in values if isinstance(value, CallRef))
        self._run: _Run | None = None
        self._lock = threading.Lock()

    def value(self, value: Value) -> torch.Tensor:
        """Compute one value.

        Raises:
            PlanMismatchError: A call failed. The error names the call.
        """
        if isinstance(value, SourceRef):
            return self._leaf(value.fqn)
        if isinstance(value, PinnedRef):
            return self._pinned(value.name)
        # protects the shared run only: values that are computed alone have a run of their own
        with self._lock:
            if self._run is None:
                self._run = self._start(self._expected)
            if self._run.is_ahead(value):
                with default_modes():
                    self._run.reach(value)
            result = self._run.take(value)
        if result is None:
            with default_modes():
                result = self._compute_alone(value)
        # readers of raw memory do not see torch's lazy negation and conjugation
        needs_resolving = result.is_neg() or result.is_conj()
        return result.resolve_neg().resolve_conj() if needs_resolving else result

    def restart(self) -> None:
        """Drop all results, because the leaves have changed."""
        with self._lock:
            self._run = None
            self._read.clear()

    def is_new(self, result: torch.Tensor) -> bool:
        """Whether a result was computed now: it has no memory of a leaf, the plan or the cache."""
        return result.untyped_storage().data_ptr() not in self._read

    def _noting(self, get: Callable[[str], torch.Tensor]) -> Callable[[str], torch.Tensor]:
        def noted(name: str) -> torch.Tensor:
            tensor = get(name)
            self._read.add(tensor.untyped_storage().data_ptr())
            return tensor

        return noted

    def _compute_alone(self, value: CallRef) -> torch.Tensor:
        run = self._start((value,))
        run.reach(value)
        result = run.take(value)
        if result is None:
            raise KeyError(value)
        return result

    def _start(self, values: tuple[CallRef, ...]) -> _Run:
        schedule = self._schedules.of(values)
        return _Run(schedule, self._leaf, self._pinned, self._results_of_steady)

    def _results_of_steady(self, number: int) -> Results:
        """Results of a steady call, from the cache if its leaves have not changed."""
        names = self._schedules.calls.dependencies.of_call(number)
        # each leaf is read once, so that cached results belong to exactly the compared values
        leaves = {fqn: self._leaf(fqn) for fqn in names}
        results = self._steady_results.lookup(number, leaves)
        if results is None:
            schedule = self._schedules.of_steady(number)
            run = _Run(schedule, leaves.__getitem__, self._pinned, self._results_of_steady)
            results = run.results()
            self._steady_results.store(number, leaves, results)
        self._read |= {one.untyped_storage().data_ptr() for one in results}  # the cache has them
        return results


@contextmanager
def default_modes() -> Iterator[None]:
    """Run without gradients and autocast, and with denormals, under any settings of the caller."""
    flushing = is_flushing()
    with torch.no_grad(), torch._C._DisableAutocast():  # noqa: SLF001 - the public one is per device
        if not flushing:
            yield
            return
        torch.set_flush_denormal(False)
        try:
            yield
        finally:
            torch.set_flush_denormal(True)


class ResultCache:
    """Results of steady calls across refits, with the leaves that they were computed from.

    Threads may share it: an entry is one tuple, and is only ever replaced as a whole.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._entries: dict[int, tuple[Mapping[str, torch.Tensor], Results]] = {}

    def lookup(self, number: int, leaves: Mapping[str, torch.Tensor]) -> Results | None:
        """Results of a call, or None if these leaves differ from those that it was computed from.

        Args:
            number: Number of the call.
            leaves: Current values of the leaves that the call depends on, by FQN.
        """
        known, results = self._entries.get(number, ({}, None))
        if results is None or any(
            known[fqn].device != value.device or not same_bits(known[fqn], value)
            for fqn, value in leaves.items()
        ):
            return None
        return results

    def store(self, number: int, leaves: Mapping[str, torch.Tensor], results: Results) -> None:
        """Keep the results of a call, with copies of the leaves that it depends on."""
        copies = {fqn: value.detach().clone() for fqn, value in leaves.items()}
        # a result may be a view of a leaf, which belongs to the caller and may change
        storages = {value.untyped_storage().data_ptr() for value in leaves.values()}
        own = tuple(
            one.clone() if one.untyped_storage().data_ptr() in storages else one for one in results
        )
        self._entries[number] = copies, own


class _Run:
    """One run of a schedule, advanced as far as values are needed."""

    def __init__(
        self,
        schedule: Schedule,
        leaf: Callable[[str], torch.Tensor],
        pinned: Callable[[str], torch.Tensor],
        steady: Callable[[int], Results],
    ) -> None:
        self._schedule, self._leaf, self._pinned, self._steady = schedule, leaf, pinned, steady
        self._tensors: list[Any] = [None] * schedule.size
        self._reads_left = dict(schedule.reads)
        self._next = 0
        # device of all tensors so far; nearly always there is one, so that calls need no transfers
        self._device: torch.device | None = None
        self._has_several_devices = False

    def is_ahead(self, value: CallRef) -> bool:
        """Whether ``reach`` must run before the value can be taken."""
        place = self._schedule.place.get(value)
        return place is not None and self._reads_left[place] > 0 and self._tensors[place] is None

    def reach(self, value: CallRef) -> None:
        """Run steps until the value is computed."""
        place = self._schedule.place[value]
        while self._tensors[place] is None:
            self._step()

    def take(self, value: CallRef) -> torch.Tensor | None:
        """A computed value. None if it was taken before, or is not in the schedule."""
        place = self._schedule.place.get(value)
        if place is None or not self._reads_left[place]:
            return None
        result: torch.Tensor = self._tensors[place]
        self._reads_left[place] -= 1
        # a place that a later step still reads is freed with the run
        if not self._reads_left[place] and self._schedule.last_use[place] < self._next:
            self._tensors[place] = None
        return result

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
        for place in step.releases:
            self._tensors[place] = None

    def _do(self, step: _Step) -> None:
        tensors = self._tensors
        if isinstance(step, CallStep):
            if step.positional is not None and self._is_exact_here(step.call):
                # the usual call: the other path checks devices and copies more, which costs time
                args = list(step.call.args)
                for position, place in step.positional:
                    args[position] = tensors[place]
                tensors[step.places[0]] = step.call.op(*args, **step.call.kwargs)
            else:
                results = _run_on_one_device(step.call, [tensors[p] for p in step.operands])
                self._fill(step.places, results)
        elif isinstance(step, LoadStep):
            value = step.value
            tensor = (
                self._leaf(value.fqn) if isinstance(value, SourceRef) else self._pinned(value.name)
            )
            self._note_device(tensor.device)
            tensors[step.place] = tensor
        elif isinstance(step, SteadyStep):
            self._fill(step.places, self._steady(step.number))
        else:
            self._run_batch(step)

    def _note_device(self, device: torch.device) -> None:
        if self._device is None:
            self._device = device
        elif device != self._device:
            self._has_several_devices = True

    def _is_exact_here(self, call: PreparedCall) -> bool:
        """Whether a call gives the recorded bits where all tensors are, without any transfer."""
        device = self._device
        return (
            device is not None and not self._has_several_devices and call.is_exact_on(device.type)
        )

    def _run_batch(self, step: BatchStep) -> None:
        is_one_device = not self._has_several_devices
        operands = [
            self._tensors[column]
            if isinstance(column, int)
            else _concatenated([self._tensors[p] for p in column], is_one_device=is_one_device)
            for column in step.operands
        ]
        (flat,) = _run_on_one_device(step.call, operands)
        self._note_device(flat.device)
        self._tensors[step.flat] = flat
        # views of the flat result: members need no copy
        pieces = flat.split_with_sizes(step.batch.sizes)
        for place, piece, shape in zip(step.places, pieces, step.batch.shapes, strict=True):
            self._tensors[place] = piece if len(shape) == 1 else piece.view(shape)

    def _fill(self, places: tuple[int, ...], results: Results) -> None:
        for place, result in zip(places, results, strict=True):
            # ops can return None for a result that they skip
            if not isinstance(result, torch.Tensor):
                raise TypeError("it returns no tensor")
            self._note_device(result.device)
            self._tensors[place] = result


def _run_on_one_device(call: PreparedCall, operands: list[torch.Tensor]) -> Results:
    # operands may be on several devices, and some calls are exact on one kind only
    device = call.device_for(_device_of(operands))
    return call([t if t.device == device else t.to(device) for t in operands])


def _concatenated(tensors: list[torch.Tensor], *, is_one_device: bool) -> torch.Tensor:
    flat = [t if t.dim() == 1 else t.reshape(-1) for t in tensors]
    if is_one_device:
        return torch.cat(flat)
    device = _device_of(tensors)
    return torch.cat([t.to(device) for t in flat])


def _device_of(tensors: list[torch.Tensor]) -> torch.device:
    """The first device that is not the CPU, if a tensor is on one. Else the CPU."""
    return next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)


# -- schedules --------------------------------------------------------------------------------


@dataclass
class LoadStep:
    """Read a leaf, or a tensor that the plan keeps.

    Attributes:
        value: The tensor to read.
        place: Place to fill.
        releases: Places to empty afterwards, because no later step reads them.
    """

    value: SourceRef | PinnedRef
    place: int
    releases: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Label for error messages."""
        return self.value.fqn if isinstance(self.value, SourceRef) else self.value.name


@dataclass
class CallStep:
    """Run a call.

    Attributes:
        number: Number of the call.
        call: The call, prepared.
        operands: Places of its operands.
        places: Places to fill with its results.
        releases: Places to empty afterwards, because no later step reads them.
        positional: Position among the arguments, and place, of each operand. None if the call does
            not take the fast path.
    """

    number: int
    call: PreparedCall
    operands: tuple[int, ...]
    places: tuple[int, ...]
    releases: list[int] = field(default_factory=list)
    positional: tuple[tuple[int, int], ...] | None = None

    @property
    def name(self) -> str:
        """Label for error messages."""
        return f"call {self.number}, {self.call.op}"


@dataclass
class SteadyStep:
    """Get the results of a steady call, from the cache or by running it.

    Attributes:
        number: Number of the call.
        places: Places to fill with its results.
        releases: Places to empty afterwards, because no later step reads them.
    """

    number: int
    places: tuple[int, ...]
    releases: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Label for error messages."""
        return f"call {self.number}"


@dataclass
class BatchStep:
    """Run a batch of calls as one.

    Attributes:
        batch: The calls.
        call: The first of them, prepared.
        operands: For each operand, the place of a flat tensor, or the places to concatenate.
        flat: Place to fill with all results, one after another in one flat tensor.
        places: Places to fill with the results of the calls.
        releases: Places to empty afterwards, because no later step reads them.
    """

    batch: Batch
    call: PreparedCall
    operands: tuple[int | tuple[int, ...], ...]
    flat: int
    places: tuple[int, ...]
    releases: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Label for error messages."""
        return f"calls {list(self.batch.members)}, {self.call.op}"


_Step: TypeAlias = LoadStep | CallStep | SteadyStep | BatchStep


class Schedules:
    """Schedules of one plan, cached if they are likely to be needed again.

    Attributes:
        calls: Calls of the plan.
    """

    def __init__(self, calls: Calls) -> None:
        """Schedule nothing yet."""
        self.calls = calls
        self._of_steady: dict[int, Schedule] = {}
        self._last: dict[tuple[CallRef, ...], Schedule] = {}

    def of(self, values: tuple[CallRef, ...]) -> Schedule:
        """The schedule for these values. The last one for several values is cached."""
        if len(values) < 2:  # noqa: PLR2004 - single values are seldom the same ones again
            return Schedule(self.calls, values)
        if values not in self._last:
            # one is enough: a refit asks for the same values as the refit before
            self._last = {values: Schedule(self.calls, values)}
        return self._last[values]

    def of_steady(self, number: int) -> Schedule:
        """The schedule for all results of one steady call. It is cached."""
        if number not in self._of_steady:
            count = self.calls.prepared[number].result_count
            results = tuple(CallRef(call=number, output=i) for i in range(count))
            self._of_steady[number] = Schedule(self.calls, results, root=number)
        return self._of_steady[number]


class Schedule:
    """The steps that compute some values, in order.

    Attributes:
        steps: The steps.
        size: Number of places.
        place: Place of each requested value.
        reads: How often callers read each of these places.
        last_use: Index of the last step that reads or fills each place.
    """

    def __init__(self, calls: Calls, values: Sequence[CallRef], root: int | None = None) -> None:
        """Put the steps in order.

        Args:
            calls: Calls of the plan.
            values: Requested values, in the order in which callers will read them, once each.
            root: Number of a steady call that this schedule runs instead of reading the cache.
        """
        self._calls, self._root = calls, root
        self._places: dict[Any, int] = {}
        self._scheduled: set[int] = set()
        self.steps: list[_Step] = []
        # known before the first step is added: a batch runs only if all members are needed
        self._needed = calls_below(values, self._operands)
        for value in values:
            self._add_steps_for(value)
        self.place = {value: self._place_of(value) for value in values}
        self.reads = Counter(self.place[value] for value in values)
        self.size = len(self._places)
        self._set_releases()

    def _operands(self, number: int) -> tuple[Value, ...]:
        """Operands of a call. A call whose results are cached needs none."""
        return () if self._is_cached(number) else self._calls.prepared[number].operands

    def _is_cached(self, number: int) -> bool:
        return number in self._calls.frontier and number != self._root

    def _place_of(self, key: Any) -> int:
        return self._places.setdefault(key, len(self._places))

    def _add_steps_for(self, requested: Value) -> None:
        """Add the steps that compute a value."""
        # an explicit stack: chains of calls can exceed Python's recursion limit
        stack: list[tuple[Value, bool]] = [(requested, False)]
        while stack:
            value, has_operands = stack.pop()
            if not isinstance(value, CallRef):
                self._add_load(value)
            elif value.call in self._scheduled:
                continue
            elif has_operands:
                self._add_call(value.call)
            else:
                stack.append((value, True))
                stack += [(one, False) for one in reversed(self._inputs(value.call))]

    def _inputs(self, number: int) -> list[Value]:
        """Values that must be computed before a call, or before its batch."""
        batch = self._batch_to_run(number)
        if batch is None:
            return list(self._operands(number))
        return [value for column in batch.operands for value in column]

    def _batch_to_run(self, number: int) -> Batch | None:
        """The batch of a call, if all its members are needed and none is scheduled."""
        batch = self._calls.batches.get(number)
        if batch is None or not self._needed.issuperset(batch.members):
            return None
        return None if self._scheduled.intersection(batch.members) else batch

    def _add_load(self, value: SourceRef | PinnedRef) -> None:
        if value not in self._places:
            self.steps.append(LoadStep(value, self._place_of(value)))

    def _add_call(self, number: int) -> None:
        batch = self._batch_to_run(number)
        if self._is_cached(number):
            self.steps.append(SteadyStep(number, self._result_places(number)))
        elif batch is not None:
            self._add_batch(batch)
            return
        else:
            self.steps.append(self._call_step(number))
        self._scheduled.add(number)

    def _call_step(self, number: int) -> CallStep:
        call = self._calls.prepared[number]
        operands = tuple(map(self._place_of, call.operands))
        positional = None
        if call.has_fast_path:
            positions = [where for where, _ in call.operand_positions if isinstance(where, int)]
            positional = tuple(zip(positions, operands, strict=True))
        places = self._result_places(number)
        return CallStep(number, call, operands, places, positional=positional)

    def _add_batch(self, batch: Batch) -> None:
        places = tuple(place for one in batch.members for place in self._result_places(one))
        operands = tuple(
            self._batch_operand(column, reuses_batch=reuses_batch)
            for column, reuses_batch in zip(batch.operands, batch.reuses_batch, strict=True)
        )
        flat = self._place_of(("flat", batch.members[0]))
        call = self._calls.prepared[batch.members[0]]
        self.steps.append(BatchStep(batch, call, operands, flat, places))
        self._scheduled |= set(batch.members)

    def _batch_operand(
        self, column: Sequence[Value], *, reuses_batch: bool
    ) -> int | tuple[int, ...]:
        """The place of the flat result of another batch, or the places to concatenate."""
        first = column[0]
        if reuses_batch and isinstance(first, CallRef):
            flat = "flat", self._calls.batches[first.call].members[0]
            if flat in self._places:  # it is not if the members of that batch run one by one
                return self._places[flat]
        return tuple(map(self._place_of, column))

    def _result_places(self, number: int) -> tuple[int, ...]:
        count = self._calls.prepared[number].result_count
        return tuple(self._place_of(CallRef(call=number, output=i)) for i in range(count))

    def _set_releases(self) -> None:
        """Set which places each step releases. ``_Run.take`` releases those of requested values."""
        requested = set(self.reads)
        self.last_use: dict[int, int] = {}
        # backwards, so that the first use of a place that is seen is its last one
        for position in reversed(range(len(self.steps))):
            step = self.steps[position]
            used = _used_places(step)
            step.releases = sorted(used - self.last_use.keys() - requested)
            self.last_use.update(dict.fromkeys(used - self.last_use.keys(), position))


def _used_places(step: _Step) -> set[int]:
    """Places that a step reads or fills."""
    if isinstance(step, LoadStep):
        return {step.place}
    if isinstance(step, CallStep):
        return {*step.operands, *step.places}
    if isinstance(step, SteadyStep):
        return set(step.places)
    columns = (one if isinstance(one, tuple) else (one,) for one in step.operands)
    return {step.flat, *step.places, *(place for column in columns for place in column)}
