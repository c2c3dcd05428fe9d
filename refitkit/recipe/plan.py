"""Plans in memory: bind one to engines, compute slot values with it, read and write its file.

A plan is a :class:`refitkit.model.PlanData` value plus the tensors that it pins. This module hides
how a plan turns a weight source into slot values. Read ``RefitPlan`` first: it is the public class.
``SlotValues`` below it does the work for values, missing names and guards. It runs recipes with
:mod:`refitkit.recipe.replay`. The file format is in :mod:`refitkit.recipe.store`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from refitkit.errors import (
    PlanMismatchError,
    Problem,
    SourceError,
    UnmappedSlotError,
    WeightMismatchError,
    raise_if_resource,
    resources,
)
from refitkit.files.archive import saying_why
from refitkit.files.replacing import replacing
from refitkit.model import CallRef, LedgerRow, PinnedRef, PlanData, Slot, SlotState, SourceRef
from refitkit.program.ambient import in_plain_state, plain, verb
from refitkit.program.bits import digest
from refitkit.program.dtypes import dtype_name, dtype_of
from refitkit.protocols import GivesAway, GivesPieces, KnowsBits, SlotValue, WeightSource
from refitkit.recipe import store
from refitkit.recipe.calls import Calls
from refitkit.recipe.foreign import getter_of, info_of
from refitkit.recipe.reads import broken_ties, broken_views
from refitkit.recipe.replay import Replay, ResultCache, Schedules
from refitkit.recipe.sources import TensorMap

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

    from refitkit.model import Guard, SlotKey, Value


Opener: TypeAlias = Callable[[Any, "RefitPlan"], WeightSource]
"""Opens any object that a user passes as weights, as a source for the plan's program."""

STRATEGY = "recipe"
"""Name of the strategy that fills slots from a plan."""


def is_entry(value: SlotValue) -> bool:
    """Whether a value is an entry of the source as it is, by a recipe."""
    return value.identity and not value.pinned and value.strategy == STRATEGY


_DEVICES = frozenset({"cpu", "cuda"})
"""Device kinds that can be the last word of ``Fingerprint.platform``."""


class RefitPlan:
    """The rules that compute every slot of every engine of one model from the model's state.

    Attributes:
        data: The plan without its pinned tensors, as a frozen value.
    """

    def __init__(
        self,
        data: PlanData,
        pinned: Mapping[str, torch.Tensor],
        opener: Opener | None = None,
    ) -> None:
        """Wrap plan data. ``refitkit.plan``, ``refitkit.compile`` and ``load`` call this.

        Args:
            data: Ledger, leaves, ties and fingerprint.
            pinned: The tensors that the plan keeps, by name.
            opener: Opens any object that a user passes as weights. Without it, the plan accepts
                weight sources and state_dicts only.
        """
        self.data = data
        self._pinned = dict(pinned)
        self._opener = opener
        self._leaves = {leaf.fqn: leaf for leaf in data.leaves}
        self._values = SlotValues(data, self._pinned)
        self._last_matching_engines: tuple[str, tuple[Slot, ...]] | None = None

    @property
    def ledger(self) -> tuple[LedgerRow, ...]:
        """One row for every slot of every engine. No slot is left out."""
        return self.data.ledger

    @property
    def backend(self) -> str:
        """Name of the backend that made the engines."""
        return self.data.backend

    def pinned(self, name: str) -> torch.Tensor:
        """A tensor that the plan keeps. Do not write to it.

        Raises:
            KeyError: The plan keeps no tensor of this name.
        """
        return self._pinned[name]

    def noting(self, **fields: Any) -> RefitPlan:
        """A copy of this plan with some fields of ``data`` replaced. The copy shares the tensors.

        Args:
            fields: New values of fields of :class:`refitkit.model.PlanData`.
        """
        return RefitPlan(self.data.model_copy(update=fields), self._pinned, self._opener)

    # -- values -----------------------------------------------------------------------------

    def values_of(
        self, rows: Sequence[LedgerRow], source: WeightSource
    ) -> dict[SlotKey, SlotValue | str]:
        """A value for each slot, computed on demand, or the reason why the slot has none.

        A result that several values share is computed once if the caller loads each value once.

        Args:
            rows: Rows of this plan's ledger.
            source: The new weights.
        """
        return self._values.of(rows, source)

    def repeatable_values(
        self, source: WeightSource
    ) -> tuple[dict[SlotKey, SlotValue | str], Callable[[], None]]:
        """Return ``values_of`` all rows, and a function that drops results of the old tensors."""
        return self._values.repeatable(self.ledger, source)

    def value_of(self, row: LedgerRow, source: WeightSource) -> SlotValue | str:
        """The value of one row, computed on demand, or the reason why there is none."""
        return self._values.of((row,), source)[row.slot.key]

    def lacking(self, row: LedgerRow, source: WeightSource) -> tuple[str, ...]:
        """Leaves that a row needs and that the source has under none of their names.

        Leaves that no state_dict holds are not listed, because the plan keeps their values.
        """
        return self._values.lacking(row, source)

    def broken_guards(self, source: WeightSource) -> list[Problem]:
        """Guards that do not hold for this source, and guards that it cannot evaluate."""
        return self._values.broken_guards(source)

    def iter_slots(
        self, weights: Any, device: str | None = None
    ) -> Iterator[tuple[Slot, torch.Tensor]]:
        """All slots with their values, one after another.

        A frozen slot is included if the plan keeps its value. If a slot holds a weight unchanged,
        the tensor is the source's own, not a copy: do not write to it.

        Args:
            weights: A weight source, a state_dict, or any object that the pipeline of this plan
                can open.
            device: Device of the values, as torch writes it. None keeps each value where it is
                computed.

        Yields:
            The slot and its value. The value has the dtype and shape of the slot, in any layout.

        Raises:
            SourceError: The weights cannot be read.
            UnmappedSlotError: Slots have no value. The error lists all of them and is raised
                before the first value is yielded.
            WeightMismatchError: Values do not fit their slots, or tied names have different
                values. The error lists all of them and is raised before the first value.
        """
        # the loop keeps no reference to a tensor, so its memory is free before the next is computed
        for value in self._checked_values(weights):
            yield value.slot, in_plain_state(partial(_loaded, value, device))

    @plain
    def _checked_values(self, weights: Any) -> list[SlotValue]:
        """Values of all slots, not yet computed. Raises what ``iter_slots`` raises."""
        source = self._open(weights)
        rows = [row for row in self.ledger if row.state is not SlotState.FROZEN or row.value]
        results = self.values_of(rows, source)
        problems = [
            Problem(r.slot.name, "no value", hint=reason)
            for r in rows
            if isinstance(reason := results[r.slot.key], str)
        ]
        # guards come last: the leaves that they depend on may be missing
        problems += self.broken_guards(source) if not problems else []
        if problems:
            raise UnmappedSlotError(
                f"{source.description} does not fill all slots.", problems=problems
            )
        values = [value for value in results.values() if isinstance(value, SlotValue)]
        # only entries that are read are checked: a source may have any others
        names = self._values.read_of(values, source)
        # ties and views compare tensors, which is possible only if dtypes and shapes are right
        problems = list(self._type_mismatches(names, source)) or [
            *broken_ties(self.data.ties, names, source),
            *broken_views(self._leaves, source.names(), source),
        ]
        if problems:
            message = f"{source.description} does not fit the plan."
            raise WeightMismatchError(message, problems=problems)
        return values

    def materialize(
        self, weights: Any, device: str | None = None
    ) -> dict[str, dict[str, torch.Tensor]]:
        """All values at once, as ``{engine: {slot: tensor}}``. See ``iter_slots``."""
        result: dict[str, dict[str, torch.Tensor]] = {}
        for slot, tensor in self.iter_slots(weights, device):
            result.setdefault(slot.engine, {})[slot.name] = tensor
        return result

    def _type_mismatches(self, names: Iterable[str], source: WeightSource) -> Iterator[Problem]:
        """Entries that are unusable, or whose dtype or shape differs from the program's."""
        if isinstance(source, TensorMap):
            names = source.doubtful(names, self._expected_types)
        for fqn in names:
            info, leaf = info_of(source, fqn), self._leaves.get(fqn)
            found = f"{info.dtype} {info.shape}"
            if info.unusable:
                yield Problem(fqn, "unusable", info.unusable)
            elif leaf and (info.dtype, info.shape) != (leaf.dtype, leaf.shape):
                yield Problem(fqn, "value", found, f"{leaf.dtype} {leaf.shape}")

    @cached_property
    def _expected_types(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each leaf of the program, by FQN."""
        return {leaf.fqn: (dtype_of(leaf.dtype), leaf.shape) for leaf in self.data.leaves}

    def _open(self, weights: Any) -> WeightSource:
        if self._opener is not None:
            return self._opener(weights, self)
        if isinstance(weights, WeightSource):
            return weights
        if isinstance(weights, Mapping):
            return TensorMap(weights)
        raise SourceError(
            f"A plan without a pipeline cannot open a {type(weights).__name__}.",
            hint="Pass a state_dict, or open it first: refitkit.Pipeline().open_weights(weights).",
        )

    # -- binding ----------------------------------------------------------------------------

    def check_engines(self, backend: str, slots: Iterable[Slot]) -> None:
        """Check that this plan is for exactly these engines.

        Args:
            backend: Name of the backend of the engines.
            slots: All slots of all engines.

        Raises:
            PlanMismatchError: Backend, device kind, or names, dtypes or counts of slots differ. The
                error lists every difference.
        """
        engines = backend, tuple(slots)
        if engines == self._last_matching_engines:  # fast if a refit passes the same objects again
            return
        problems = list(self._differences(backend, {slot.key: slot for slot in engines[1]}))
        if problems:
            raise PlanMismatchError(
                "The plan was made for another engine.",
                problems=problems,
                hint="Plan from the program that was compiled: refitkit.plan(program, target=...).",
            )
        self._last_matching_engines = engines

    def _differences(self, backend: str, slots: dict[tuple[str, str], Slot]) -> Iterator[Problem]:
        if backend != self.backend:
            yield Problem("backend", "differs", self.backend, backend)
        yield from self._device_differences(slots.values())
        planned = {row.slot.key: row.slot for row in self.ledger}
        for key in sorted(planned.keys() | slots.keys()):
            name = "/".join(key)
            if key not in slots:
                yield Problem(name, "in the plan, not in the engine")
            elif key not in planned:
                yield Problem(name, "in the engine, not in the plan")
            else:
                ours, theirs = planned[key], slots[key]
                if (ours.dtype, ours.count) != (theirs.dtype, theirs.count):
                    yield Problem(name, "differs", _dtype_and_count(ours), _dtype_and_count(theirs))

    def _device_differences(self, slots: Iterable[Slot]) -> Iterator[Problem]:
        """A problem if the plan was recorded on another kind of device than the engines use.

        Names, dtypes and counts can agree while values differ. In a Llama that was planned on a
        CPU, all 258 slots had the names of the CUDA engine's slots, and 48 had other bits.
        """
        # the last word of the platform is the kind of device
        recorded = self.data.fingerprint.platform.rpartition(" ")[2]
        devices = {slot.device.partition(":")[0] for slot in slots}
        if recorded in _DEVICES and devices and recorded not in devices:
            hint = "slots of the same name may hold other values on another device"
            yield Problem("device", "differs", recorded, ", ".join(sorted(devices)), hint)

    # -- storage ----------------------------------------------------------------------------

    @plain
    def to_bytes(self) -> bytes:
        """The content of a plan file."""
        return store.encode(self.data, self._pinned)

    @classmethod
    @verb("A plan cannot be read")
    def from_bytes(
        cls,
        content: bytes,
        what: str = "This plan",
        opener: Opener | None = None,
    ) -> RefitPlan:
        """A plan from the content of a plan file.

        Args:
            content: The whole file.
            what: Label of the plan in error messages.
            opener: Opens any object that a user passes as weights.

        Raises:
            PlanMismatchError: The content is not a plan, is damaged, or has another format version.
        """
        data, pinned = store.decode(content, what)
        return cls(data, pinned, opener)

    @resources("A plan cannot be written")
    def save(self, path: str | Path) -> None:
        """Write a plan file. It is written beside ``path`` and then renamed.

        Raises:
            RefitError: The file cannot be written. The message gives the reason.
        """
        path = Path(path)
        with saying_why(path), replacing(path) as file:
            file.write(self.to_bytes())

    @classmethod
    @resources("A plan cannot be read")
    def load(cls, path: str | Path) -> RefitPlan:
        """Read a plan file. No code from the file is run.

        Raises:
            PlanMismatchError: The file is missing, not a plan, damaged, or of another format
                version.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as exc:
            raise_if_resource(exc, f"The plan {str(path)!r} cannot be read")
            raise PlanMismatchError(f"The plan {str(path)!r} cannot be read: {exc}.") from exc
        return cls.from_bytes(content, f"{str(path)!r}")


def _loaded(value: SlotValue, device: str | None) -> torch.Tensor:
    tensor = value.load()
    return tensor if device is None else tensor.to(device)


def _dtype_and_count(slot: Slot) -> str:
    return f"{slot.dtype} x {slot.count}"


# -- slot values ------------------------------------------------------------------------------


class _Given(NamedTuple):
    """What slot values need of a source. It is asked once for its abilities, not for each slot."""

    get: Callable[[str], torch.Tensor]
    pieces: Callable[[str, torch.Tensor | None], Iterator[torch.Tensor] | None] | None
    has_bits: Callable[[str, torch.Tensor], bool | None] | None
    gives_away: Callable[[str], bool]

    @classmethod
    def of(cls, source: WeightSource) -> _Given:
        pieces = source.pieces if isinstance(source, GivesPieces) else None
        has_bits = source.has_bits if isinstance(source, KnowsBits) else None
        gives_away = source.gives_away if isinstance(source, GivesAway) else _never
        return cls(getter_of(source), pieces, has_bits, gives_away)


_ValueFactory: TypeAlias = "Callable[[_Given, Replay], SlotValue | str]"
"""Returns the value of one slot from a source, or the reason why there is none."""


class SlotValues:
    """Computes slot values of one plan from any source, and checks the plan's guards."""

    def __init__(self, data: PlanData, pinned: Mapping[str, torch.Tensor]) -> None:
        """Compute nothing yet.

        Args:
            data: The plan.
            pinned: The tensors that the plan keeps, by name.
        """
        self._data, self._pinned = data, pinned
        self._ties = {name: tie for tie in data.ties for name in tie}
        self._calls = Calls(data)
        self._schedules = Schedules(self._calls)
        self._steady_results = ResultCache()
        self._pinned_values: dict[SlotKey, SlotValue] = {}
        self._all_sources = tuple(dict.fromkeys(n for row in data.ledger for n in row.sources))

    def of(self, rows: Sequence[LedgerRow], source: WeightSource) -> dict[SlotKey, SlotValue | str]:
        """A value for each slot, computed on demand, or the reason why the slot has none.

        A result that several values share is computed once if the caller loads each value once.
        """
        return self.repeatable(rows, source)[0]

    def repeatable(
        self, rows: Sequence[LedgerRow], source: WeightSource
    ) -> tuple[dict[SlotKey, SlotValue | str], Callable[[], None]]:
        """A value for each slot, and a function that drops results of the old tensors."""
        names, given = source.names(), _Given.of(source)
        is_complete = all(fqn in names for fqn in self._all_sources)
        # the usual refit: factories depend on the source's names only, so they can be reused
        if is_complete and rows == self._data.ledger:
            replay = self._replay(self._all_calls, source)
            found = {key: factory(given, replay) for key, factory in self._factories}
            return found, replay.restart
        lacking = {row.slot.key: () if is_complete else self._lacking(row, names) for row in rows}
        computed = [
            row.value for row in rows if type(row.value) is CallRef and not lacking[row.slot.key]
        ]
        replay = self._replay(computed, source)
        found = {
            row.slot.key: self._factory(row, names, lacking[row.slot.key])(given, replay)
            for row in rows
        }
        return found, replay.restart

    @cached_property
    def _all_calls(self) -> tuple[CallRef, ...]:
        values = (row.value for row in self._data.ledger)
        return tuple(value for value in values if isinstance(value, CallRef))

    @cached_property
    def _factories(self) -> tuple[tuple[SlotKey, _ValueFactory], ...]:
        """A factory for each slot, for sources that have all names."""
        ledger, names = self._data.ledger, frozenset(self._all_sources)
        return tuple((row.slot.key, self._factory(row, names, ())) for row in ledger)

    def _factory(
        self, row: LedgerRow, names: Collection[str], lacking: Collection[str]
    ) -> _ValueFactory:
        """The factory of one slot's value, for sources that have these names.

        Args:
            row: The slot and its recipe.
            names: Names of the source.
            lacking: Leaves that the row needs and the source lacks.
        """
        value, slot = row.value, row.slot
        if value is None:
            return partial(_no_value, row.reason or f"its state is {row.state}")
        if type(value) is not CallRef and row.state is not SlotState.FROZEN:
            for fqn in self._candidates(row):
                if fqn in names:
                    return partial(_source_value, slot, (fqn,))
        # after the loop above: an entry of the source overrides a pinned tensor
        if type(value) is PinnedRef:
            return partial(_pinned_value, self._pinned_value(value.name, slot))
        if lacking:
            return partial(_no_value, f"the source has no {', '.join(map(repr, lacking))}")
        sources = tuple(fqn for fqn in row.sources if fqn in names)
        return partial(_computed_value, slot, sources, value)

    def _pinned_value(self, name: str, slot: Slot) -> SlotValue:
        """A pinned tensor as the value of a slot. Each slot gets the same object every time."""
        value = self._pinned_values.get(slot.key)
        if value is None:
            tensor = _in_slot_shape(self._pinned[name], slot)
            value = SlotValue(slot, STRATEGY, (), lambda: tensor, identity=True, pinned=True)
            self._pinned_values[slot.key] = value
        return value

    def _candidates(self, row: LedgerRow) -> tuple[str, ...]:
        """Names under which the source may have the whole value of a row, the best one first."""
        if isinstance(row.value, SourceRef):
            first = row.value.fqn
            return (first, *(n for n in self._ties.get(first, ()) if n != first))
        return row.sources

    # -- names ------------------------------------------------------------------------------

    def lacking(self, row: LedgerRow, source: WeightSource) -> tuple[str, ...]:
        """Leaves that a row needs and that the source has under none of their names.

        Leaves that no state_dict holds are not listed, because the plan keeps their values.
        """
        return self._lacking(row, source.names())

    def _lacking(self, row: LedgerRow, names: Collection[str]) -> tuple[str, ...]:
        return tuple(
            fqn
            for fqn in row.sources
            if self._ties.get(fqn, (fqn,))[0] == fqn
            and fqn not in self._pinned
            and not any(name in names for name in self._ties.get(fqn, (fqn,)))
        )

    def read_of(self, values: Iterable[SlotValue], source: WeightSource) -> dict[str, None]:
        """Entries of the source that values and guards depend on, under all tied names."""
        names = source.names()
        read = dict.fromkeys(name for value in values for name in value.sources)
        for guard in self._data.guards:
            read |= dict.fromkeys(sorted(self._calls.dependencies.of(guard.value)))
        if self._data.ties:
            read = {tied: None for name in read for tied in self._ties.get(name, (name,))}
        return {name: None for name in read if name in names}

    # -- guards -----------------------------------------------------------------------------

    def broken_guards(self, source: WeightSource) -> list[Problem]:
        """Guards that do not hold for this source, and guards that it cannot evaluate."""
        guards = self._data.guards
        if not guards:
            return []
        names = source.names()
        values = [guard.value for guard in guards if not self._lacked_by(guard, names)]
        replay = self._replay(values, source)
        return [problem for guard in guards for problem in self._broken(guard, source, replay)]

    def _broken(self, guard: Guard, source: WeightSource, replay: Replay) -> Iterator[Problem]:
        subject = ", ".join(sorted(self._calls.dependencies.of(guard.value))) or "guard"
        lacking = self._lacked_by(guard, source.names())
        if lacking:
            hint = f"the source has no {', '.join(map(repr, lacking))}"
            yield Problem(subject, "guard", wanted=guard.reason, hint=hint)
            return
        value = replay.value(guard.value)
        # the digest covers bytes only, which tensors of different shapes can share
        is_same_type = (dtype_name(value.dtype), tuple(value.shape)) == (guard.dtype, guard.shape)
        if not is_same_type or digest(value) != guard.sha256:
            found = str(value.tolist()) if guard.shown else "another value"
            wanted = guard.shown or "the value at planning"
            yield Problem(subject, "guard", found, wanted, guard.reason)

    def _lacked_by(self, guard: Guard, names: Collection[str]) -> list[str]:
        """Leaves that a guard depends on and that neither the source nor the plan has."""
        needed = self._calls.dependencies.of(guard.value)
        return sorted(name for name in needed if not self._has(name, names))

    def _has(self, fqn: str, names: Collection[str]) -> bool:
        return fqn in self._pinned or any(n in names for n in self._ties.get(fqn, (fqn,)))

    # -- computing --------------------------------------------------------------------------

    def _replay(self, values: Sequence[Value], source: WeightSource) -> Replay:
        names, get = source.names(), getter_of(source)

        def leaf(fqn: str) -> torch.Tensor:
            if fqn in names:
                return get(fqn)
            # pinned tensors come last: entries of the source override them
            tied = next((name for name in self._ties.get(fqn, ()) if name in names), None)
            return self._pinned[fqn] if tied is None else get(tied)

        pinned = self._pinned.__getitem__
        return Replay(self._schedules, values, leaf, pinned, self._steady_results)


def _no_value(reason: str, _given: _Given, _replay: Replay) -> str:
    return reason


def _pinned_value(value: SlotValue, _given: _Given, _replay: Replay) -> SlotValue:
    return value


def _source_value(slot: Slot, sources: tuple[str], given: _Given, _replay: Replay) -> SlotValue:
    load = partial(_load_from_source, given.get, sources[0], slot)
    pieces = None if given.pieces is None else partial(given.pieces, sources[0])
    has_bits = None if given.has_bits is None else partial(given.has_bits, sources[0])
    keepable = _always if given.gives_away(sources[0]) else None
    return SlotValue(
        slot,
        STRATEGY,
        sources,
        load,
        identity=True,
        pieces=pieces,
        has_bits=has_bits,
        keepable=keepable,
    )


def _always(_tensor: torch.Tensor) -> bool:
    return True


def _never(_fqn: str) -> bool:
    return False


def _computed_value(
    slot: Slot, sources: tuple[str, ...], value: Value, _given: _Given, replay: Replay
) -> SlotValue:
    load = partial(_load_computed, replay, value, slot)
    return SlotValue(slot, STRATEGY, sources, load, pinned=not sources, keepable=replay.is_new)


def _load_from_source(get: Callable[[str], torch.Tensor], fqn: str, slot: Slot) -> torch.Tensor:
    return _in_slot_shape(get(fqn), slot)


def _load_computed(replay: Replay, value: Value, slot: Slot) -> torch.Tensor:
    return _in_slot_shape(replay.value(value), slot)


def _in_slot_shape(value: torch.Tensor, slot: Slot) -> torch.Tensor:
    """A value in the shape of its slot. Slots without a shape take any."""
    return value if slot.shape is None or value.shape == slot.shape else value.reshape(slot.shape)
