"""A plan in memory: read it, bind it to engines, compute slot values with it, store it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

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
from refitkit.protocols import SlotValue, WeightSource
from refitkit.recipe import store
from refitkit.recipe.calls import Calls
from refitkit.recipe.reads import broken_ties, broken_views
from refitkit.recipe.replay import Kept, Replay, Schedules
from refitkit.recipe.sources import TensorMap, pieces_of

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

    from refitkit.model import Guard, SlotKey, Value


Opener: TypeAlias = Callable[[Any, "RefitPlan"], WeightSource]
"""Turns anything that a user calls weights into a source of what a plan's program reads."""

_DEVICES = frozenset({"cpu", "cuda"})
"""Kinds of devices with which platforms in fingerprints end."""


class RefitPlan:
    """How every slot of every engine of one model follows from the model's own state.

    Attributes:
        data: Everything but the pinned tensors, as a frozen value.
    """

    def __init__(
        self,
        data: PlanData,
        pinned: Mapping[str, torch.Tensor],
        opener: Opener | None = None,
    ) -> None:
        """Plans are made by ``refitkit.plan`` and ``refitkit.compile``, or loaded.

        Args:
            data: Ledger, leaves, ties and fingerprint.
            pinned: The tensors that the plan keeps.
            opener: What turns anything that a user calls weights into a source for a plan.
        """
        self.data = data
        self._pinned = dict(pinned)
        self._opener = opener
        self._leaves = {leaf.fqn: leaf for leaf in data.leaves}
        self._values = Values(data, self._pinned)
        self._fitted: tuple[str, tuple[Slot, ...]] | None = None

    @property
    def ledger(self) -> tuple[LedgerRow, ...]:
        """One row for every slot, always complete."""
        return self.data.ledger

    @property
    def backend(self) -> str:
        """Name of the backend that it is for."""
        return self.data.backend

    def pinned(self, name: str) -> torch.Tensor:
        """A tensor that the plan keeps. Not to be written to.

        Raises:
            KeyError: There is none of this name.
        """
        return self._pinned[name]

    def noting(self, **fields: Any) -> RefitPlan:
        """This plan with other fields of its data; tensors are shared."""
        return RefitPlan(self.data.model_copy(update=fields), self._pinned, self._opener)

    # -- values -----------------------------------------------------------------------------

    def values_of(
        self, rows: Sequence[LedgerRow], source: WeightSource
    ) -> dict[SlotKey, SlotValue | str]:
        """Values of rows from a source, not yet computed; or why there is none, by slot.

        What several of them need is computed once, if each is read once.
        """
        return self._values.of(rows, source)

    def value_of(self, row: LedgerRow, source: WeightSource) -> SlotValue | str:
        """The same of one row."""
        return self._values.of((row,), source)[row.slot.key]

    def lacking(self, row: LedgerRow, source: WeightSource) -> tuple[str, ...]:
        """Leaves that a row needs and that the source has under none of their names.

        Leaves that no state_dict holds are not among them: the plan keeps their values.
        """
        return self._values.lacking(row, source)

    def broken_guards(self, source: WeightSource) -> list[Problem]:
        """Guards whose value is another one with this source, or cannot be told."""
        return self._values.broken_guards(source)

    def iter_slots(
        self, weights: Any, device: str | None = None
    ) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Values of all slots, one after another; of frozen ones where the plan has them.

        Identity values are the source's own tensors, not copies: read them only.

        Args:
            weights: A weight source, a state_dict, or anything the pipeline that made this plan
                can open.
            device: Where values shall be, as torch writes it; None: where they come to be.

        Yields:
            The slot and its value: dtype and shape of the slot, any layout.

        Raises:
            SourceError: The weights cannot be read.
            UnmappedSlotError: Slots have no value; lists all of them, before the first is given.
            WeightMismatchError: Values do not fit their slots, or names of one tensor have several;
                lists all of them, likewise.
        """
        for value in self._filling(weights):  # none is kept here while the next one is computed
            yield value.slot, in_plain_state(partial(_loaded, value, device))

    @plain
    def _filling(self, weights: Any) -> list[SlotValue]:
        """Values of all slots, not yet computed; see ``iter_slots`` for what is raised."""
        source = self._open(weights)
        rows = [row for row in self.ledger if row.state is not SlotState.FROZEN or row.value]
        values = self.values_of(rows, source)
        problems = [
            Problem(r.slot.name, "no value", hint=v)
            for r in rows
            if isinstance(v := values[r.slot.key], str)
        ]
        problems += self.broken_guards(source) if not problems else []
        if problems:
            raise UnmappedSlotError(
                f"{source.description} does not fill all slots.", problems=problems
            )
        wanted = [value for value in values.values() if isinstance(value, SlotValue)]
        names = self._values.read_of(wanted, source)
        problems = list(self._misfits(names, source)) or [
            *broken_ties(self.data.ties, names, source),
            *broken_views(self._leaves, source.names(), source),
        ]
        if problems:
            message = f"{source.description} does not fit the plan."
            raise WeightMismatchError(message, problems=problems)
        return wanted

    def materialize(
        self, weights: Any, device: str | None = None
    ) -> dict[str, dict[str, torch.Tensor]]:
        """All values at once: ``{engine: {slot: tensor}}``; see ``iter_slots``."""
        result: dict[str, dict[str, torch.Tensor]] = {}
        for slot, tensor in self.iter_slots(weights, device):
            result.setdefault(slot.engine, {})[slot.name] = tensor
        return result

    def _misfits(self, names: Iterable[str], source: WeightSource) -> Iterator[Problem]:
        """Entries of the source that are not what the program had under these names."""
        if isinstance(source, TensorMap):
            names = source.doubtful(names, self._wanted)
        for fqn in names:
            info, leaf = source.info(fqn), self._leaves.get(fqn)
            found = f"{info.dtype} {info.shape}"
            if info.unusable:
                yield Problem(fqn, "unusable", info.unusable)
            elif leaf and (info.dtype, info.shape) != (leaf.dtype, leaf.shape):
                yield Problem(fqn, "value", found, f"{leaf.dtype} {leaf.shape}")

    @cached_property
    def _wanted(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What each leaf has to be."""
        return {leaf.fqn: (dtype_of(leaf.dtype), leaf.shape) for leaf in self.data.leaves}

    def _open(self, weights: Any) -> WeightSource:
        if self._opener is not None:
            return self._opener(weights, self)
        if isinstance(weights, WeightSource):
            return weights
        if isinstance(weights, Mapping):
            return TensorMap(weights)
        raise SourceError(
            f"A plan on its own cannot open a {type(weights).__name__}.",
            hint="Pass a state_dict, or open it first: refitkit.Pipeline().open_weights(weights).",
        )

    # -- binding ----------------------------------------------------------------------------

    def check_engines(self, backend: str, slots: Iterable[Slot]) -> None:
        """Check that this plan is for exactly these engines.

        Raises:
            PlanMismatchError: Names, dtypes or counts of slots differ; lists every difference.
        """
        engines = backend, tuple(slots)
        if engines == self._fitted:  # mostly the very objects of the refit before
            return
        problems = list(self._differences(backend, {slot.key: slot for slot in engines[1]}))
        if problems:
            raise PlanMismatchError(
                "The plan was made for another engine.",
                problems=problems,
                hint="Plan from the program that was compiled: refitkit.plan(program, target=...).",
            )
        self._fitted = engines

    def _differences(self, backend: str, slots: dict[tuple[str, str], Slot]) -> Iterator[Problem]:
        if backend != self.backend:
            yield Problem("backend", "differs", self.backend, backend)
        yield from self._another_device(slots.values())
        mine = {row.slot.key: row.slot for row in self.ledger}
        for key in sorted(mine.keys() | slots.keys()):
            name = "/".join(key)
            if key not in slots:
                yield Problem(name, "in the plan, not in the engine")
            elif key not in mine:
                yield Problem(name, "in the engine, not in the plan")
            else:
                found, wanted = mine[key], slots[key]
                if (found.dtype, found.count) != (wanted.dtype, wanted.count):
                    yield Problem(name, "differs", _short(found), _short(wanted))

    def _another_device(self, slots: Iterable[Slot]) -> Iterator[Problem]:
        """Whether it was recorded on another kind of device than the engines are on.

        Names, dtypes and counts can then be the same and values not: of a Llama that was planned on
        a CPU, all 258 slots had the names of the CUDA engine's, and 48 had other bits.
        """
        recorded = self.data.fingerprint.platform.rpartition(" ")[2]
        there = {slot.device.partition(":")[0] for slot in slots}
        if recorded in _DEVICES and there and recorded not in there:
            hint = "slots of one name may hold other values there"
            yield Problem("device", "differs", recorded, ", ".join(sorted(there)), hint)

    # -- storage ----------------------------------------------------------------------------

    @plain
    def to_bytes(self) -> bytes:
        """The bytes of a plan file."""
        return store.encode(self.data, self._pinned)

    @classmethod
    @verb("A plan cannot be read")
    def from_bytes(
        cls,
        content: bytes,
        what: str = "This plan",
        opener: Opener | None = None,
    ) -> RefitPlan:
        """A plan from the bytes of a plan file.

        Raises:
            PlanMismatchError: It is not a plan, is damaged or of another version.
        """
        data, pinned = store.decode(content, what)
        return cls(data, pinned, opener)

    @resources("A plan cannot be written")
    def save(self, path: str | Path) -> None:
        """Write a plan file: beside ``path``, then renamed.

        Raises:
            RefitError: It cannot be written there; says why.
        """
        path = Path(path)
        with saying_why(path), replacing(path) as file:
            file.write(self.to_bytes())

    @classmethod
    @resources("A plan cannot be read")
    def load(cls, path: str | Path) -> RefitPlan:
        """Read a plan file. Nothing in it is run.

        Raises:
            PlanMismatchError: It is missing, not a plan, damaged or of another version.
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


def _short(slot: Slot) -> str:
    return f"{slot.dtype} x {slot.count}"


# MERGED values: What a plan's recipes make of a source: a value for each slot, or why there is
# none.

STRATEGY = "recipe"
"""Name of the strategy that serves slots from a plan."""

_Bind: TypeAlias = "Callable[[WeightSource, Replay], SlotValue | str]"
"""Makes the value of a slot from a source that has all that any slot follows from."""


class Values:
    """Values of a plan's slots from any source."""

    def __init__(self, data: PlanData, pinned: Mapping[str, torch.Tensor]) -> None:
        """Compute nothing yet.

        Args:
            data: The plan.
            pinned: The tensors that it keeps.
        """
        self._data, self._pinned = data, pinned
        self._twins = {name: tie for tie in data.ties for name in tie}
        self._calls = Calls(data)
        self._schedules = Schedules(self._calls)
        self._kept = Kept()
        self._constants: dict[SlotKey, SlotValue] = {}
        self._all_sources = tuple(dict.fromkeys(n for row in data.ledger for n in row.sources))

    def of(self, rows: Sequence[LedgerRow], source: WeightSource) -> dict[SlotKey, SlotValue | str]:
        """Values of rows from a source, not yet computed; or why there is none, by slot.

        What several of them need is computed once, if each is read once.
        """
        names = source.names()
        whole = all(fqn in names for fqn in self._all_sources)
        if whole and rows == self._data.ledger:  # mostly: nothing depends on the source's names
            replay = self._replay(self._all_calls, source)
            return {key: bind(source, replay) for key, bind in self._binds}
        lacking = {row.slot.key: () if whole else self._lacking(row, names) for row in rows}
        computed = [
            row.value for row in rows if type(row.value) is CallRef and not lacking[row.slot.key]
        ]
        replay = self._replay(computed, source)
        return {
            row.slot.key: self._bind(row, names, lacking[row.slot.key])(source, replay)
            for row in rows
        }

    @cached_property
    def _all_calls(self) -> tuple[CallRef, ...]:
        values = (row.value for row in self._data.ledger)
        return tuple(value for value in values if isinstance(value, CallRef))

    @cached_property
    def _binds(self) -> tuple[tuple[SlotKey, _Bind], ...]:
        """What makes the value of each slot from a source with all names."""
        ledger, names = self._data.ledger, frozenset(self._all_sources)
        return tuple((row.slot.key, self._bind(row, names, ())) for row in ledger)

    def _bind(self, row: LedgerRow, names: Collection[str], lacking: Collection[str]) -> _Bind:
        """What makes a slot's value from a source of these names, or says why there is none."""
        value, slot = row.value, row.slot
        if value is None:
            return partial(_reason, row.reason or f"its state is {row.state}")
        if type(value) is not CallRef and row.state is not SlotState.FROZEN:
            for fqn in self._candidates(row):
                if fqn in names:
                    return partial(_identity, slot, (fqn,))
        if type(value) is PinnedRef:
            return partial(_constant, self._constant(value.name, slot))
        if lacking:
            return partial(_reason, f"the source has no {', '.join(map(repr, lacking))}")
        return partial(_computed, slot, tuple(fqn for fqn in row.sources if fqn in names), value)

    def _constant(self, name: str, slot: Slot) -> SlotValue:
        """A tensor that the plan keeps, as a slot's value: always the same object."""
        found = self._constants.get(slot.key)
        if found is None:
            tensor = _as_slot(self._pinned[name], slot)
            found = SlotValue(slot, STRATEGY, (), lambda: tensor, identity=True, pinned=True)
            self._constants[slot.key] = found
        return found

    def _candidates(self, row: LedgerRow) -> tuple[str, ...]:
        if isinstance(row.value, SourceRef):
            first = row.value.fqn
            return (first, *(n for n in self._twins.get(first, ()) if n != first))
        return row.sources

    # -- what is lacking --------------------------------------------------------------------

    def lacking(self, row: LedgerRow, source: WeightSource) -> tuple[str, ...]:
        """Leaves that a row needs and that the source has under none of their names.

        Leaves that no state_dict holds are not among them: the plan keeps their values.
        """
        return self._lacking(row, source.names())

    def _lacking(self, row: LedgerRow, names: Collection[str]) -> tuple[str, ...]:
        return tuple(
            fqn
            for fqn in row.sources
            if self._twins.get(fqn, (fqn,))[0] == fqn
            and fqn not in self._pinned
            and not any(name in names for name in self._twins.get(fqn, (fqn,)))
        )

    def read_of(self, values: Iterable[SlotValue], source: WeightSource) -> dict[str, None]:
        """Entries of the source that values and guards follow from, under all their names."""
        names = source.names()
        read = dict.fromkeys(name for value in values for name in value.sources)
        for guard in self._data.guards:
            read |= dict.fromkeys(sorted(self._calls.followed.by(guard.value)))
        if self._data.ties:
            read = {twin: None for name in read for twin in self._twins.get(name, (name,))}
        return {name: None for name in read if name in names}

    # -- guards -----------------------------------------------------------------------------

    def broken_guards(self, source: WeightSource) -> list[Problem]:
        """Guards whose value is another one with this source, or cannot be told."""
        guards = self._data.guards
        if not guards:
            return []
        names = source.names()
        values = [guard.value for guard in guards if not self._lacked_by(guard, names)]
        replay = self._replay(values, source)
        return [problem for guard in guards for problem in self._broken(guard, source, replay)]

    def _broken(self, guard: Guard, source: WeightSource, replay: Replay) -> Iterator[Problem]:
        shown = ", ".join(sorted(self._calls.followed.by(guard.value))) or "guard"
        lacking = self._lacked_by(guard, source.names())
        if lacking:
            hint = f"the source has no {', '.join(map(repr, lacking))}"
            yield Problem(shown, "guard", wanted=guard.reason, hint=hint)
            return
        value = replay.value(guard.value)
        same = (dtype_name(value.dtype), tuple(value.shape)) == (guard.dtype, guard.shape)
        if not same or digest(value) != guard.sha256:
            found = str(value.tolist()) if guard.shown else "another value"
            yield Problem(shown, "guard", found, guard.shown or "the value of then", guard.reason)

    def _lacked_by(self, guard: Guard, names: Collection[str]) -> list[str]:
        return sorted(n for n in self._calls.followed.by(guard.value) if not self._has(n, names))

    def _has(self, fqn: str, names: Collection[str]) -> bool:
        return fqn in self._pinned or any(n in names for n in self._twins.get(fqn, (fqn,)))

    # -- computing --------------------------------------------------------------------------

    def _replay(self, values: Sequence[Value], source: WeightSource) -> Replay:
        names, get = source.names(), source.get

        def leaf(fqn: str) -> torch.Tensor:
            if fqn in names:
                return get(fqn)
            twin = next((name for name in self._twins.get(fqn, ()) if name in names), None)
            return self._pinned[fqn] if twin is None else get(twin)

        return Replay(self._schedules, values, leaf, self._pinned.__getitem__, self._kept)


def _reason(reason: str, _source: WeightSource, _replay: Replay) -> str:
    return reason


def _constant(value: SlotValue, _source: WeightSource, _replay: Replay) -> SlotValue:
    return value


def _identity(slot: Slot, sources: tuple[str], source: WeightSource, _replay: Replay) -> SlotValue:
    load = partial(_read, source.get, sources[0], slot)
    pieces = partial(pieces_of, source, sources[0])
    return SlotValue(slot, STRATEGY, sources, load, identity=True, pieces=pieces)


def _computed(
    slot: Slot, sources: tuple[str, ...], value: Value, _source: WeightSource, replay: Replay
) -> SlotValue:
    load = partial(_made, replay, value, slot)
    return SlotValue(slot, STRATEGY, sources, load, pinned=not sources)


def _read(get: Callable[[str], torch.Tensor], fqn: str, slot: Slot) -> torch.Tensor:
    return _as_slot(get(fqn), slot)


def _made(replay: Replay, value: Value, slot: Slot) -> torch.Tensor:
    return _as_slot(replay.value(value), slot)


def _as_slot(value: torch.Tensor, slot: Slot) -> torch.Tensor:
    """A value in the shape of its slot."""
    return value if slot.shape is None or value.shape == slot.shape else value.reshape(slot.shape)
