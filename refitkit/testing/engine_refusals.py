"""Checks of what an engine refuses, with its live values untouched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from refitkit.model import Slot
from refitkit.testing import oracles
from refitkit.testing.breach import refusal
from refitkit.testing.engine_base import B, C, EngineBase
from refitkit.testing.layouts import of_other_dtypes, of_other_shapes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from refitkit.protocols import SlotValue



class RefusalChecks(EngineBase):
    """Values that do not fit are refused with a typed error, and nothing has happened."""

    def test_a_wrong_dtype_is_refused(self) -> None:
        """``copy_`` would cast."""
        engine = self.ready()
        for slot, value, others in self._one_by_one(engine):
            for odd in of_other_dtypes(value):
                what = f"a value of {odd.dtype} for {slot.name!r}, which is {slot.dtype},"
                advice = "Compare the dtype of what is loaded with the slot's before it is used."
                self._require_refused(engine, [oracles.given(slot, odd), *others], what, advice)

    def test_a_wrong_shape_is_refused(self) -> None:
        """``copy_`` would broadcast; raw copies read past the end."""
        engine = self.ready()
        for slot, value, others in self._one_by_one(engine):
            for odd in of_other_shapes(slot, value):
                what = f"a value of the shape {tuple(odd.shape)} for {slot.name!r}, which is "
                what += f"{slot.shape if slot.shape is not None else slot.count},"
                advice = "Compare the shape of what is loaded with the slot's before it is used."
                self._require_refused(engine, [oracles.given(slot, odd), *others], what, advice)

    def test_an_unknown_name_is_refused(self) -> None:
        """A value for a slot that the engine does not have."""
        engine = self.ready()
        values = oracles.slot_values(engine.slots, self.make_values(engine, B))
        advice = "Refuse names that are no slots of the engine."
        what = "a value for a slot that does not exist"
        self._require_refused(engine, [*values, _stranger(engine)], what, advice)

    def test_a_missing_value_is_refused(self) -> None:
        """``stage`` is for all slots; whichever is missing."""
        engine = self.ready()
        for slot, _, others in self._one_by_one(engine):
            advice = "stage takes values for all slots: the missing one would keep an old value."
            self._require_refused(engine, others, f"a refit without {slot.name!r}", advice)

    def test_a_slot_that_is_given_twice_is_refused(self) -> None:
        """Nobody knows which of two values is meant."""
        engine = self.ready()
        other = self.make_values(engine, C)
        values = oracles.slot_values(engine.slots, self.make_values(engine, B))
        for slot in engine.slots.values():
            again = oracles.given(slot, other[slot.name])
            what = f"a refit with two values for {slot.name!r}"
            self._require_refused(engine, [*values, again], what, "Refuse names given twice.")

    def _one_by_one(self, engine: Any) -> Iterator[tuple[Slot, torch.Tensor, list[SlotValue]]]:
        """Each slot with its value, and the values of all others."""
        values = self.make_values(engine, B)
        for name, slot in dict(engine.slots).items():
            others = {other: value for other, value in values.items() if other != name}
            yield slot, values[name], oracles.slot_values(engine.slots, others)

    def _require_refused(
        self, engine: Any, values: Sequence[SlotValue], what: str, advice: str
    ) -> None:
        before = self.snapshot(engine)
        with refusal(_STAGE, what, advice):
            engine.stage(values).commit()
        advice = "Check before anything is written: when stage raises, live values are untouched."
        self.require_held(engine, before, _STAGE, f"after {what} was refused", advice)


def _stranger(engine: Any) -> SlotValue:
    slot = Slot(engine=engine.name, name="no such slot", dtype="float32", shape=(1,), count=1)
    return oracles.given(slot, torch.ones(1))
