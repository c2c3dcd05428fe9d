"""Engines and modules in memory that keep every contract and can be made to fail.

Every step that could fail in a refit first calls a :class:`Tripwire` with a label. A dry run counts
the calls; a test then makes each of them fail in turn.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import WeightMismatchError
from refitkit.model import EngineMemory, Slot
from refitkit.recipe import Overwriting
from refitkit.recipe.sources import require_values
from refitkit.testing.oracles import bits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from refitkit.protocols import SlotValue

BACKEND = "fake"
"""Backend name of fake modules and of plans from ``make_plan``."""


class Tripwire:
    """Records calls by label, and raises at chosen calls.

    Attributes:
        calls: Labels of all calls since the last ``arm``.
        faults: Exceptions to raise, by the number of the call, counted from 0.
    """

    def __init__(self) -> None:
        """Start without faults."""
        self.calls: list[str] = []
        self.faults: dict[int, BaseException] = {}

    def __call__(self, label: str) -> None:
        """Record a call, and raise its fault if it has one."""
        number = len(self.calls)
        self.calls.append(label)
        if number in self.faults:
            raise self.faults[number]

    def arm(self, faults: Mapping[int, BaseException] | None = None) -> None:
        """Count calls from 0 again, with new faults."""
        self.calls = []
        self.faults = dict(faults or {})


class FakeStaged:
    """The staged values of a ``FakeEngine``.

    Attributes:
        engine: Engine of the refit.
        values: New values by slot.
        did: Names of ``commit``, ``rollback`` and ``discard`` in the order of their calls.
    """

    def __init__(self, engine: FakeEngine, values: Mapping[str, torch.Tensor]) -> None:
        """Stage values; the engine calls this."""
        self.engine, self.values = engine, values
        self.did: list[str] = []
        self._before: dict[str, torch.Tensor] = {}

    def _trip(self, label: str) -> None:
        self.engine.wire(f"{self.engine.name}.{label}")

    def changed(self) -> bool | None:
        """Whether any bit differs from the live values."""
        self._trip("changed")
        live = self.engine.live
        return any(bits(live[name]) != bits(value) for name, value in self.values.items())

    def staged(self, slot: str) -> torch.Tensor:
        """The slot's value after a commit: its new value, else the live one."""
        self._trip("show")
        return self.values.get(slot, self.engine.live[slot])

    def commit(self) -> None:
        """Write the values into their slots, one by one."""
        self.did.append("commit")
        self._trip("commit")
        # Copy the mapping first: a fault at any slot must leave something to restore.
        self._before = self.engine.spare = dict(self.engine.live)
        for name, value in self.values.items():
            self.engine.live[name] = value
            self._trip(f"commit-{name}")  # a fault here leaves old and new values mixed

    def rollback(self) -> None:
        """Restore the values from before the commit."""
        self.did.append("rollback")
        self._trip("rollback")
        self.engine.live.update(self._before)
        self.engine.spare = {}
        self._trip("rollback-end")

    def discard(self) -> None:
        """Do nothing: the live values are untouched."""
        self.did.append("discard")
        self._trip("discard")


class FakeEngine:
    """An engine that is refitted as a whole and has no readback.

    Attributes:
        name: Name of the engine.
        live: Live values by slot; reading them here calls no tripwire.
        spare: Values from before the last commit.
        slots: Slots by name.
        wire: Tripwire that every step calls first.
    """

    def __init__(
        self, name: str, values: Mapping[str, torch.Tensor], wire: Tripwire | None = None
    ) -> None:
        """Start with copies of these values, one slot for each."""
        self.name = name
        self.live = {slot: _copied(value) for slot, value in values.items()}
        self.spare: dict[str, torch.Tensor] = {}
        self.wire = wire or Tripwire()
        # Subclasses add read; their slots have to say so.
        readable = hasattr(self, "read")
        self.slots = {
            slot: slot_for(slot, value, name, readable=readable)
            for slot, value in self.live.items()
        }

    @property
    def memory(self) -> EngineMemory:
        """Declares a second set of all values on the device."""
        self.wire(f"{self.name}.memory")
        size = sum(slot.nbytes for slot in self.slots.values())
        return EngineMemory(engine=self.name, kind="device", bytes=size)

    def stage(self, values: Sequence[SlotValue]) -> FakeStaged:
        """Copy values for all slots.

        Raises:
            WeightMismatchError: Names, dtypes or shapes are not exactly those of the slots.
        """
        self.wire(f"{self.name}.stage")
        given = [value.slot.name for value in values]
        if sorted(given) != sorted(self.slots):
            raise WeightMismatchError(f"{self.name} needs {sorted(self.slots)}, got {given}.")
        return self._stage(values)

    def _stage(self, values: Sequence[SlotValue]) -> FakeStaged:
        # Check everything before returning: live values are untouched if this raises.
        copies = {}
        for value in values:
            name = value.slot.name
            if name in copies or name not in self.slots:
                raise WeightMismatchError(f"{name} is repeated, or not a slot.")
            tensor, slot = value.load(), self.slots[name]
            if (str(tensor.dtype), tuple(tensor.shape)) != (f"torch.{slot.dtype}", slot.shape):
                raise WeightMismatchError(f"{name} has a wrong dtype or shape.")
            copies[name] = _copied(tensor)
        self.wire(f"{self.name}.stage-end")
        return FakeStaged(self, copies)


class OpenEngine(FakeEngine):
    """An engine with readback, partial refits, overwriting, warming and a spare buffer.

    The spare buffer has the values from before the last commit.
    """

    def read(self, slot: str) -> torch.Tensor:
        """The live value of a slot, as an alias."""
        self.wire(f"{self.name}.read")
        return self.live[slot]

    def stage_partial(self, values: Sequence[SlotValue]) -> FakeStaged:
        """Copy values for some slots."""
        self.wire(f"{self.name}.stage-partial")
        return self._stage(values)

    def previous(self) -> dict[str, torch.Tensor]:
        """The values from before the last commit, by slot."""
        self.wire(f"{self.name}.previous")
        return dict(self.spare)

    def stage_over(self, values: Sequence[SlotValue]) -> Overwriting:
        """Stage values that the commit writes over the live ones, one by one.

        Raises:
            WeightMismatchError: Names are unknown or repeated.
        """
        self.wire(f"{self.name}.stage-over")
        require_values(self.slots, values, partial=True)
        self.free_spare()
        return Overwriting(lambda: self._write_over(values))

    def _write_over(self, values: Sequence[SlotValue]) -> None:
        for value in values:
            # A fault here leaves old and new values mixed, and nothing can restore the old ones.
            self.wire(f"{self.name}.over-{value.slot.name}")
            self.live[value.slot.name] = _copied(value.load())

    def free_spare(self) -> int:
        """Drop the values from before the last commit; returns their size in bytes."""
        freed = sum(value.nbytes for value in self.spare.values())
        self.spare.clear()
        return freed

    def warm(self, progress: Callable[[str], None]) -> None:
        """Report one line of progress; there is nothing to warm."""
        self.wire(f"{self.name}.warm")
        progress(f"{self.name} is warm")


class FakeModule:
    """An opened module whose outputs are all weights of its engines, times the first input.

    So a change of any weight changes the outputs. ``answer`` replaces this computation.

    Attributes:
        engines: Engines by name.
        attachments: Contents of attached files, by name.
        wire: Tripwire that every step calls first.
        answer: Function of the module and the inputs that computes the outputs instead; or None.
        on_run: Function without arguments that ``run`` calls first.
    """

    backend = BACKEND

    def __init__(
        self,
        engines: Sequence[Any],
        attachments: Mapping[str, bytes] | None = None,
        wire: Tripwire | None = None,
        answer: Callable[..., Any] | None = None,
    ) -> None:
        """Make a module of engines."""
        self.engines: dict[str, Any] = {engine.name: engine for engine in engines}
        self.attachments: Mapping[str, bytes] = dict(attachments or {})
        self.wire = wire or Tripwire()
        self.answer = answer
        self.on_run: Callable[[], None] = lambda: None

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The outputs: by default each weight times the first input, by ``engine/slot``."""
        self.wire("run")
        self.on_run()
        if self.answer is not None:
            return self.answer(self, *args, **kwargs)
        return {
            f"{name}/{slot}": value * args[0] if args else value.clone()
            for name, engine in self.engines.items()
            for slot, value in engine.live.items()
        }

    def probe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The outputs of ``run``, which changes no weights."""
        self.wire("probe")
        return self.run(args, kwargs)

    def synchronize(self) -> None:
        """Do nothing: no work is ever pending."""
        self.wire("synchronize")

    def save(self, path: Path, attachments: Mapping[str, bytes]) -> None:
        """Write a JSON file with the names of engines, slots and attachments; no values."""
        names = {name: list(engine.slots) for name, engine in self.engines.items()}
        path.write_text(json.dumps({"engines": names, "attachments": sorted(attachments)}))
        self.attachments = dict(attachments)

    def reopen(self) -> FakeModule:
        """A second module with copies of all values, and the same tripwires."""
        # Keep subclasses: tests make broken engines of them.
        engines = [type(e)(e.name, e.live, e.wire) for e in self.engines.values()]
        return type(self)(engines, self.attachments, self.wire, self.answer)

    def holds(self) -> dict[str, torch.Tensor]:
        """Copies of all live values, by ``engine/slot``, without any gate or tripwire."""
        return {
            f"{name}/{slot}": value.clone()
            for name, engine in self.engines.items()
            for slot, value in engine.live.items()
        }


def slot_for(
    name: str, value: torch.Tensor, engine: str = "model", *, readable: bool = False
) -> Slot:
    """A slot with the dtype, shape and count of a tensor."""
    return Slot(
        engine=engine,
        name=name,
        dtype=str(value.dtype).removeprefix("torch."),
        shape=tuple(value.shape),
        count=value.numel(),
        readable=readable,
    )


def _copied(value: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in memory of its own."""
    # clone() computes lazy conjugates and negations; expanded tensors need contiguous_format.
    return value.detach().clone(memory_format=torch.contiguous_format)
