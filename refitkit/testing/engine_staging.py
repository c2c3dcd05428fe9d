"""Checks of bringing values in: whole, copied, from any layout, and untouched where it fails."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch

from refitkit.protocols import SlotValue
from refitkit.testing import oracles
from refitkit.testing.breach import Breach
from refitkit.testing.engine_base import A, B, C, EngineBase
from refitkit.testing.layouts import LAYOUTS
from refitkit.testing.memory import Storage

if TYPE_CHECKING:
    from refitkit.model import Slot

_STAGE = "Engine.stage"
_COMMIT = "StagedRefit.commit"


class LoadFaultError(Exception):
    """What a value raises that was told to."""


class StagingChecks(EngineBase):
    """What ``stage`` does with good values, and with values that fail."""

    def test_every_slot_is_written(self) -> None:
        """After ``stage`` and ``commit`` every slot holds its new value, bit for bit."""
        engine = self.ready()
        values = self.make_values(engine, B)
        wanted = oracles.snapshot(values)
        self.commit(engine, values)
        advice = "Write every value that is given, in logical order."
        self.require_held(engine, wanted, _COMMIT, "after a refit", advice)

    def test_staging_changes_nothing_live(self) -> None:
        """Until ``commit`` the live values serve."""
        engine = self.ready()
        before = self.snapshot(engine)
        self.stage(engine, self.make_values(engine, B))
        advice = "Keep new values beside the live ones until commit."
        self.require_held(engine, before, _STAGE, "once values are staged", advice)

    def test_twice_equals_once(self) -> None:
        """The same refit a second time changes nothing."""
        engine = self.ready()
        values = self.make_values(engine, B)
        wanted = oracles.snapshot(values)
        for _ in range(2):
            self.commit(engine, values)
        advice = "A refit writes what it is given, whatever was there before."
        self.require_held(engine, wanted, _COMMIT, "after the same refit twice", advice)

    def test_there_and_back_is_bit_equal(self) -> None:
        """From A to B to A, and the engine holds A, bit for bit."""
        engine = self.ready()
        wanted = self.snapshot(engine)
        for seed in (B, A):
            self.commit(engine, self.make_values(engine, seed))
        advice = "Nothing of an earlier refit may be left over."
        self.require_held(engine, wanted, _COMMIT, "after refits to B and back to A", advice)

    def test_any_layout_is_copied_exactly(self) -> None:
        """Views, strides, offsets, gradients and put-off signs: the same elements arrive."""
        engine = self.ready()
        for layout, laid_out in LAYOUTS.items():
            values = self.make_values(engine, B)
            others = {name: laid_out(value) for name, value in values.items()}
            odd = {name: value for name, value in others.items() if value is not None}
            if odd:
                self._require_copied(engine, {**values, **odd}, layout)

    def _require_copied(self, engine: Any, values: dict[str, torch.Tensor], layout: str) -> None:
        wanted = oracles.snapshot(values)
        try:
            self.commit(engine, values)
        except Exception as exc:
            found = f"values that are {layout} are refused: {type(exc).__name__}: {exc}."
            advice = "A value has the dtype and shape of its slot, and any layout."
            raise Breach(_STAGE, found, advice) from exc
        advice = "Copy element by element, without gradients: tensor.copy_(value)."
        self.require_held(engine, wanted, _STAGE, f"when values are {layout}", advice)

    def test_values_are_free_once_staged(self) -> None:
        """What the caller does with its tensors after ``stage`` does not reach the engine."""
        engine = self.ready()
        values = self.make_values(engine, B)
        wanted = oracles.snapshot(values)
        staged = self.stage(engine, values)
        for value in values.values():
            value.copy_(torch.zeros_like(value))
        staged.commit()
        advice = "Copy each value in stage: the caller's tensor is free when it returns."
        when = "where the caller overwrote its tensors between stage and commit"
        self.require_held(engine, wanted, _STAGE, when, advice)

    def test_values_are_not_kept(self) -> None:
        """The caller's tensors die with the caller, before ``commit``; the staged ones do not."""
        engine = self.ready()
        values = self.make_values(engine, B)
        wanted = oracles.snapshot(values)
        alive = {name: Storage(value) for name, value in values.items() if value.numel()}
        sizes = [value.nbytes for value in values.values()]
        staged = self.stage(engine, values)
        del values
        gc.collect()
        kept = sorted(name for name, storage in alive.items() if not storage.expired())
        if kept:
            found = f"tensors of the caller are kept after stage: {oracles.shown(kept)}."
            raise Breach(_STAGE, found, "Keep copies alone, also in what stage returns.")
        junk = [torch.full((size,), 85, dtype=torch.uint8) for size in sizes for _ in range(4)]
        staged.commit()
        del junk
        advice = "What is staged has to stay alive until it is committed or discarded."
        when = "where the caller freed its tensors between stage and commit"
        self.require_held(engine, wanted, _COMMIT, when, advice)

    def test_values_are_not_written_to(self) -> None:
        """The caller's tensors are read only: by a refit, its rollback and the next one."""
        engine = self.ready()
        values = self.make_values(engine, B)
        before = oracles.snapshot(values)
        self.commit(engine, values).rollback()
        self.commit(engine, self.make_values(engine, C))
        wrong = oracles.differing(oracles.snapshot(values), before)
        if wrong:
            found = f"tensors of the caller were written to: {oracles.shown(wrong)}."
            raise Breach(_STAGE, found, "Values may be views of the caller's: only read them.")

    def test_each_value_is_loaded_once(self) -> None:
        """``load`` computes: it is called once for each value."""
        engine = self.ready()
        values = self.make_values(engine, B)
        loads: list[str] = []
        self._loading(engine, values, loads.append)
        wrong = sorted(name for name in values if loads.count(name) != 1)
        if wrong:
            found = f"load was not called once for each value: {oracles.shown(wrong)}."
            raise Breach(_STAGE, found, "Load each value once; loading is computing.")

    def test_a_fault_at_any_value_leaves_all_as_it_was(self) -> None:
        """Whichever value cannot be loaded: live values stay, and the next refit is right."""
        engine = self.ready()
        before = self.snapshot(engine)
        values = self.make_values(engine, B)
        for number, failing in enumerate(values):

            def fail(name: str, failing: str = failing) -> None:
                if name == failing:
                    raise LoadFaultError(name)

            try:
                self._loading(engine, values, fail)
            except Exception:  # noqa: BLE001, S110 - any: the live values tell
                pass
            else:
                found = f"value {number}, {failing!r}, cannot be loaded, and stage returned."
                raise Breach(_STAGE, found, "Let what load raises through, or wrap it.")
            when = f"after value {number}, {failing!r}, could not be loaded"
            advice = "When stage raises, live values are untouched."
            self.require_held(engine, before, _STAGE, when, advice)
        after = self.make_values(engine, C)
        wanted = oracles.snapshot(after)
        self.commit(engine, after)
        advice = "A refit that failed leaves nothing behind."
        self.require_held(engine, wanted, _STAGE, "in the refit after faults", advice)

    @staticmethod
    def _loading(engine: Any, values: dict[str, torch.Tensor], on_load: Any) -> None:
        def value_of(slot: Slot) -> SlotValue:
            def load() -> torch.Tensor:
                on_load(slot.name)
                return values[slot.name]

            return SlotValue(slot, "conformance", (slot.name,), load)

        engine.stage([value_of(engine.slots[name]) for name in values])
