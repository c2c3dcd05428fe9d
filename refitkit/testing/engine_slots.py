"""Checks of what an engine says of its slots."""

from __future__ import annotations

from math import prod
from typing import Any

from refitkit.model import EngineMemory, Slot
from refitkit.testing import oracles
from refitkit.testing.breach import Breach
from refitkit.testing.engine_base import B, EngineBase


class SlotChecks(EngineBase):
    """Names, dtypes, counts and shapes."""

    def test_slots_are_listed_under_their_own_names(self) -> None:
        """``slots`` maps the name of each slot to a ``Slot`` of this engine."""
        engine = self.make_engine()
        slots: dict[str, Any] = dict(engine.slots)
        for name, slot in slots.items():
            if not isinstance(slot, Slot):
                found = f"under {name!r} stands a {type(slot).__name__}."
                raise Breach("Engine.slots", found, "Give values of refitkit.model.Slot.")
            if slot.name != name or slot.engine != engine.name:
                found = f"under {name!r} of {engine.name!r} stands the slot {slot.key}."
                advice = "A slot carries the name that it is listed under, and its engine's."
                raise Breach("Engine.slots", found, advice)

    def test_slots_are_the_same_each_time(self) -> None:
        """Slots depend on the engine alone: not on when they are asked for, nor on refits."""
        engine, other = self.make_engine(), self.make_engine()
        first = dict(engine.slots)
        again = dict(engine.slots)
        self.commit(engine, self.make_values(engine, B))
        for slots, when in (
            (again, "when asked a second time"),
            (dict(engine.slots), "after a refit"),
            (dict(other.slots), "of a second engine of the same kind"),
        ):
            wrong = sorted(n for n in first.keys() | slots.keys() if first.get(n) != slots.get(n))
            if wrong:
                found = f"{when}, slots are other ones: {oracles.shown(wrong)}."
                raise Breach("Engine.slots", found, "Plans bind by slots: keep them as they are.")

    def test_slots_tell_what_the_engine_holds(self) -> None:
        """Dtype, count and shape of each slot are those of what the oracle finds; all are there."""
        engine = self.make_engine()
        held = self.held(engine)
        hidden = sorted(held.keys() - engine.slots.keys())
        if hidden:
            found = f"the engine holds weights that are no slots: {oracles.shown(hidden)}."
            raise Breach("Engine.slots", found, "List all weights: one that is not is never new.")
        for name, slot in engine.slots.items():
            tensor = held[name]
            is_ = str(tensor.dtype).removeprefix("torch."), tensor.numel()
            if is_ != (slot.dtype, slot.count):
                found = f"{name!r} is said to be {slot.dtype} x {slot.count}, and is {is_[0]} x "
                raise Breach("Engine.slots", f"{found}{is_[1]}.", "Ask what the engine holds.")
            if slot.shape is not None and prod(slot.shape) != slot.count:
                found = f"{name!r} has the shape {slot.shape} and {slot.count} elements."
                raise Breach("Engine.slots", found, "Give the shape that it has, or None.")

    def test_memory_is_told(self) -> None:
        """``memory`` is an ``EngineMemory`` of this engine, before and after a refit."""
        engine = self.make_engine()
        for when in ("before", "after"):
            memory: Any = engine.memory
            if not isinstance(memory, EngineMemory):
                found = f"{when} a refit it is a {type(memory).__name__}."
                raise Breach("Engine.memory", found, "Give an EngineMemory of refitkit.model.")
            if memory.engine != engine.name or memory.bytes < 0:
                found = f"{when} a refit it says {memory!r} of the engine {engine.name!r}."
                raise Breach("Engine.memory", found, "Name the engine, and count bytes.")
            self.commit(engine, self.make_values(engine, B))
