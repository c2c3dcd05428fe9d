"""What a plan's recipes make of a source: a value for each slot, or why there is none."""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeAlias

from refitkit.errors import Problem
from refitkit.model import CallRef, PinnedRef, SlotState, SourceRef
from refitkit.program.bits import digest
from refitkit.program.dtypes import dtype_name
from refitkit.protocols import SlotValue
from refitkit.recipe.calls import Calls
from refitkit.recipe.pieces import pieces_of
from refitkit.recipe.replay import Kept, Replay
from refitkit.recipe.schedule import Schedules

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    import torch

    from refitkit.model import Guard, LedgerRow, PlanData, Slot, SlotKey, Value
    from refitkit.protocols import WeightSource

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
