"""Engines and modules in memory, that keep every contract and fail when they are told to.

Everything that could fail in a refit calls a :class:`Tripwire` with a label first. A dry run counts
those calls; a test then arms one of them after another.
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


class Tripwire:
    """Counts calls by label, and raises at some of them.

    Attributes:
        calls: Labels of all calls since it was armed.
        faults: What to raise at which call, by its number.
    """

    def __init__(self) -> None:
        """Armed with nothing."""
        self.calls: list[str] = []
        self.faults: dict[int, BaseException] = {}

    def __call__(self, label: str) -> None:
        """Count a call, and raise what it is armed with."""
        number = len(self.calls)
        self.calls.append(label)
        if number in self.faults:
            raise self.faults[number]

    def arm(self, faults: Mapping[int, BaseException] | None = None) -> None:
        """Count from 0 again, and raise these."""
        self.calls = []
        self.faults = dict(faults or {})


class FakeStaged:
    """New values beside the live ones.

    Attributes:
        engine: The engine that they are for.
        values: The new values by slot.
        did: Which of its methods were called.
    """

    def __init__(self, engine: FakeEngine, values: Mapping[str, torch.Tensor]) -> None:
        """Made by the engine."""
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
        """What a slot will hold: its new value, else the live one."""
        self._trip("show")
        return self.values.get(slot, self.engine.live[slot])

    def commit(self) -> None:
        """Put one value after another into its slot."""
        self.did.append("commit")
        self._trip("commit")
        self._before = self.engine.spare = dict(self.engine.live)
        for name, value in self.values.items():
            self.engine.live[name] = value
            self._trip(f"commit-{name}")  # a failure here leaves a mixture

    def rollback(self) -> None:
        """Put the old values back."""
        self.did.append("rollback")
        self._trip("rollback")
        self.engine.live.update(self._before)
        self.engine.spare = {}
        self._trip("rollback-end")

    def discard(self) -> None:
        """Leave all as it is."""
        self.did.append("discard")
        self._trip("discard")


class FakeEngine:
    """An engine that takes all its weights at once and cannot be read.

    Attributes:
        name: Its name.
        live: The live values by slot, past every wire.
        spare: The values before the last commit.
        slots: Its slots.
        wire: What it calls first.
    """

    def __init__(
        self, name: str, values: Mapping[str, torch.Tensor], wire: Tripwire | None = None
    ) -> None:
        """Hold copies of these values."""
        self.name = name
        self.live = {slot: _copied(value) for slot, value in values.items()}
        self.spare: dict[str, torch.Tensor] = {}
        self.wire = wire or Tripwire()
        readable = hasattr(self, "read")
        self.slots = {
            slot: slot_for(slot, value, name, readable=readable)
            for slot, value in self.live.items()
        }

    @property
    def memory(self) -> EngineMemory:
        """The old values."""
        self.wire(f"{self.name}.memory")
        size = sum(slot.nbytes for slot in self.slots.values())
        return EngineMemory(engine=self.name, kind="device", bytes=size)

    def stage(self, values: Sequence[SlotValue]) -> FakeStaged:
        """Copy values for all slots."""
        self.wire(f"{self.name}.stage")
        given = [value.slot.name for value in values]
        if sorted(given) != sorted(self.slots):
            raise WeightMismatchError(f"{self.name} needs {sorted(self.slots)}, got {given}.")
        return self._stage(values)

    def _stage(self, values: Sequence[SlotValue]) -> FakeStaged:
        copies = {}
        for value in values:
            name = value.slot.name
            if name in copies or name not in self.slots:
                raise WeightMismatchError(f"{name} is given twice, or is no slot.")
            tensor, slot = value.load(), self.slots[name]
            if (str(tensor.dtype), tuple(tensor.shape)) != (f"torch.{slot.dtype}", slot.shape):
                raise WeightMismatchError(f"{name} does not fit.")
            copies[name] = _copied(tensor)
        self.wire(f"{self.name}.stage-end")
        return FakeStaged(self, copies)


class OpenEngine(FakeEngine):
    """An engine that can be read, refitted in part, written over and warmed; with a spare buffer.

    What it held before the last commit stays there.
    """

    def read(self, slot: str) -> torch.Tensor:
        """The live value."""
        self.wire(f"{self.name}.read")
        return self.live[slot]

    def stage_partial(self, values: Sequence[SlotValue]) -> FakeStaged:
        """Copy values for some slots."""
        self.wire(f"{self.name}.stage-partial")
        return self._stage(values)

    def previous(self) -> dict[str, torch.Tensor]:
        """The values before the last commit."""
        self.wire(f"{self.name}.previous")
        return dict(self.spare)

    def stage_over(self, values: Sequence[SlotValue]) -> Overwriting:
        """Write one value after another into its slot, at the commit."""
        self.wire(f"{self.name}.stage-over")
        require_values(self.slots, values, partial=True)
        self.free_spare()
        return Overwriting(lambda: self._write_over(values))

    def _write_over(self, values: Sequence[SlotValue]) -> None:
        for value in values:
            self.wire(f"{self.name}.over-{value.slot.name}")
            self.live[value.slot.name] = _copied(value.load())

    def free_spare(self) -> int:
        """Forget the values before the last commit; returns their bytes."""
        freed = sum(value.nbytes for value in self.spare.values())
        self.spare.clear()
        return freed

    def warm(self, progress: Callable[[str], None]) -> None:
        """Tell that there is nothing to do."""
        self.wire(f"{self.name}.warm")
        progress(f"{self.name} is warm")


class FakeModule:
    """An opened module. Called, it answers with all that its engines hold, times the input.

    So any bit of any weight shows in the answer. Another answer can be given as a function of the
    module and the inputs.

    Attributes:
        engines: Its engines by name.
        attachments: What was saved beside them.
        wire: What it calls first.
        answer: What it answers instead.
        on_run: Called whenever it runs.
    """

    backend = BACKEND

    def __init__(
        self,
        engines: Sequence[Any],
        attachments: Mapping[str, bytes] | None = None,
        wire: Tripwire | None = None,
        answer: Callable[..., Any] | None = None,
    ) -> None:
        """Put engines into a module."""
        self.engines: dict[str, Any] = {engine.name: engine for engine in engines}
        self.attachments: Mapping[str, bytes] = dict(attachments or {})
        self.wire = wire or Tripwire()
        self.answer = answer
        self.on_run: Callable[[], None] = lambda: None

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Answer with all weights, by ``engine/slot``."""
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
        """Answer likewise: nothing changes anyway."""
        self.wire("probe")
        return self.run(args, kwargs)

    def synchronize(self) -> None:
        """Wait for nothing."""
        self.wire("synchronize")

    def save(self, path: Path, attachments: Mapping[str, bytes]) -> None:
        """Write names alone."""
        names = {name: list(engine.slots) for name, engine in self.engines.items()}
        path.write_text(json.dumps({"engines": names, "attachments": sorted(attachments)}))
        self.attachments = dict(attachments)

    def reopen(self) -> FakeModule:
        """A second one with copies of all values."""
        engines = [type(e)(e.name, e.live, e.wire) for e in self.engines.values()]
        return type(self)(engines, self.attachments, self.wire, self.answer)

    def holds(self) -> dict[str, torch.Tensor]:
        """Copies of all live values, past every gate and every wire."""
        return {
            f"{name}/{slot}": value.clone()
            for name, engine in self.engines.items()
            for slot, value in engine.live.items()
        }


def slot_for(
    name: str, value: torch.Tensor, engine: str = "model", *, readable: bool = False
) -> Slot:
    """The slot that an engine would list for a tensor."""
    return Slot(
        engine=engine,
        name=name,
        dtype=str(value.dtype).removeprefix("torch."),
        shape=tuple(value.shape),
        count=value.numel(),
        readable=readable,
    )


def _copied(value: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own, with nothing put off."""
    plain = value.detach().resolve_conj().resolve_neg()
    return plain.clone(memory_format=torch.contiguous_format)
