"""What the author of an engine writes, and what all checks of engines do."""

from __future__ import annotations

import gc
from contextlib import suppress
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import ModuleLostError, RefitError
from refitkit.model import EngineMemory, Slot
from refitkit.protocols import SlotValue, SupportsPartial
from refitkit.testing import oracles
from refitkit.testing.breach import Breach, SuiteError, refusal, skip
from refitkit.testing.oracles import LAYOUTS, Storage, of_other_dtypes, of_other_shapes
from refitkit.testing.scenes import EngineScene

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from refitkit.protocols import Engine, StagedRefit


A, B, C = 1, 2, 3
"""Seeds of three sets of weights."""


class EngineBase:
    """Factory, oracle, and ways to make the engine fail; only the first two have to be written."""

    def make_engine(self) -> Engine:
        """A new engine that nobody has refitted yet, with the same slots each time."""
        raise NotImplementedError("Write make_engine: it returns a new engine.")

    def held(self, engine: Any) -> Mapping[str, torch.Tensor]:
        """What the engine serves from now, by slot, found *without the engine's own code*.

        Look where the weights really are: ask the runtime, look into the memory, run it on an
        input that shows them. Dtypes and the order of elements count, shapes do not.
        """
        raise NotImplementedError("Write held: what the engine holds, without asking the engine.")

    def make_values(self, engine: Any, seed: int) -> dict[str, torch.Tensor]:
        """A new value for every slot, another one for each seed; any that fit by default."""
        return oracles.random_values(engine.slots.values(), seed)

    def commit_fault(self, engine: Any) -> AbstractContextManager[object] | None:  # noqa: ARG002
        """Have the next commit of the engine fail, if possible half-way; None: no way to do it."""
        return None

    def rollback_fault(self, engine: Any) -> AbstractContextManager[object] | None:  # noqa: ARG002
        """Have the next rollback of the engine fail; None: no way to do it."""
        return None

    # -- what checks do ---------------------------------------------------------------------

    def ready(self) -> Any:
        """A new engine that holds the weights of seed A."""
        engine = self.make_engine()
        self.commit(engine, self.make_values(engine, A))
        return engine

    def snapshot(self, engine: Any) -> dict[str, oracles.Bits]:
        """The bits that the oracle finds.

        Raises:
            SuiteError: It does not tell of all slots.
        """
        found = oracles.snapshot(self.held(engine))
        lacking = sorted(engine.slots.keys() - found.keys())
        if lacking:
            raise SuiteError(f"held() tells nothing of the slots {oracles.shown(lacking)}.")
        return {name: found[name] for name in engine.slots}

    def stage(self, engine: Any, values: Mapping[str, torch.Tensor]) -> StagedRefit:
        """Stage values for all slots."""
        staged: StagedRefit = engine.stage(oracles.slot_values(engine.slots, values))
        return staged

    def commit(self, engine: Any, values: Mapping[str, torch.Tensor]) -> StagedRefit:
        """Stage values for all slots and make them live."""
        staged = self.stage(engine, values)
        staged.commit()
        return staged

    def partly(self, engine: Any, values: Sequence[SlotValue]) -> StagedRefit:
        """Stage some slots, in an engine that can."""
        if not isinstance(engine, SupportsPartial):
            raise SuiteError("The engine is not refitted in part.")
        return engine.stage_partial(values)

    def require_held(
        self,
        engine: Any,
        wanted: Mapping[str, oracles.Bits],
        contract: str,
        when: str,
        advice: str,
    ) -> None:
        """Compare what the engine holds with what it should.

        Raises:
            Breach: Slots differ; names them.
        """
        wrong = oracles.differing(self.snapshot(engine), wanted)
        if wrong:
            slots = f"{len(wanted)} slots" if len(wanted) > 1 else "1 slot"
            found = f"{when}, {len(wrong)} of {slots} are wrong: {oracles.shown(wrong)}."
            raise Breach(contract, found, advice)


# MERGED engine_slots: Checks of what an engine says of its slots.


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


# MERGED engine_staging: Checks of bringing values in: whole, copied, from any layout, and
# untouched where it fails.

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


# MERGED engine_transaction: Checks of the way in and the way back: changed, commit, rollback,
# discard.

_CHANGED = "StagedRefit.changed"
_ROLLBACK = "StagedRefit.rollback"
_DISCARD = "StagedRefit.discard"
_NO_FAULT = "commit_fault() gives no way to make a commit fail"
_NO_FAULTS = "commit_fault() and rollback_fault() give no way to make both fail"


class TransactionChecks(EngineBase):
    """A refit is kept, or taken back bit for bit, or the module is lost and says so."""

    def test_a_rollback_brings_the_old_values_back(self) -> None:
        """After ``commit`` and ``rollback`` every bit is as before; the next refit is right."""
        engine = self.ready()
        before = self.snapshot(engine)
        staged = self.commit(engine, self.make_values(engine, B))
        staged.rollback()
        advice = "Keep the old values until the next refit, bit for bit."
        self.require_held(engine, before, _ROLLBACK, "after a rollback", advice)
        self._require_refit(engine, _ROLLBACK, "in the refit after a rollback")

    def test_a_rollback_can_be_repeated(self) -> None:
        """It is called again where an interrupt came, which may be right after it was done."""
        engine = self.ready()
        before = self.snapshot(engine)
        staged = self.commit(engine, self.make_values(engine, B))
        staged.rollback()
        staged.rollback()
        advice = "Let a second rollback of what is back already change nothing."
        self.require_held(engine, before, _ROLLBACK, "after a second rollback", advice)
        self._require_refit(engine, _ROLLBACK, "in the refit after a second rollback")

    def test_the_first_refit_can_be_taken_back(self) -> None:
        """An engine that nobody has refitted yet has a way back, too."""
        engine = self.make_engine()
        before = self.snapshot(engine)
        self.commit(engine, self.make_values(engine, B)).rollback()
        advice = "Know the way back before the first commit, or refuse to stage."
        self.require_held(engine, before, _ROLLBACK, "after a rollback of a first refit", advice)

    def test_a_rollback_right_after_staging_changes_nothing(self) -> None:
        """It is called whenever ``commit`` failed, and that may have done nothing yet."""
        engine = self.ready()
        before = self.snapshot(engine)
        self.stage(engine, self.make_values(engine, B)).rollback()
        advice = "Roll back what was done, which may be nothing."
        self.require_held(engine, before, _ROLLBACK, "after a rollback without a commit", advice)

    def test_a_failed_commit_can_be_taken_back(self) -> None:
        """Half-way through a commit, and back: every bit is as before."""
        engine = self.ready()
        before = self.snapshot(engine)
        staged = self.stage(engine, self.make_values(engine, B))
        fault = self.commit_fault(engine)
        if fault is None:
            skip(_NO_FAULT)
        with fault:
            self._require_commit_fails(staged)
        staged.rollback()
        advice = "Be ready for a rollback at every line of commit."
        self.require_held(engine, before, _ROLLBACK, "after a commit failed half-way", advice)
        self._require_refit(engine, _ROLLBACK, "in the refit after a commit that failed")

    @staticmethod
    def _require_commit_fails(staged: Any) -> None:
        try:
            staged.commit()
        except Exception:  # noqa: BLE001 - any will do
            return
        found = "it was made to fail, and returned."
        advice = "Raise what goes wrong: nobody else can tell that slots are a mixture."
        raise Breach("StagedRefit.commit", found, advice)

    def test_a_discard_leaves_the_live_values(self) -> None:
        """What is discarded was never live; the next refit is right."""
        engine = self.ready()
        before = self.snapshot(engine)
        self.stage(engine, self.make_values(engine, B)).discard()
        advice = "Forget what is staged, and touch nothing else."
        self.require_held(engine, before, _DISCARD, "after a discard", advice)
        self._require_refit(engine, _DISCARD, "in the refit after a discard")

    def _require_refit(self, engine: Any, contract: str, when: str) -> None:
        values = self.make_values(engine, C)
        wanted = oracles.snapshot(values)
        self.commit(engine, values)
        self.require_held(engine, wanted, contract, when, "Leave nothing behind.")

    def test_changed_tells_the_truth(self) -> None:
        """True or None where any bit differs, in whichever slot; False or None where none does."""
        engine = self.ready()
        values, others = self.make_values(engine, B), self.make_values(engine, C)
        self.commit(engine, values)
        same = self.stage(engine, values)
        if same.changed() is True:
            found = "it says True of the very values that are live."
            raise Breach(_CHANGED, found, "Compare bits, or answer None.")
        same.discard()
        for name in oracles.differing(oracles.snapshot(values), oracles.snapshot(others)):
            staged = self.stage(engine, {**values, name: others[name]})
            if staged.changed() is False:
                found = f"it says False, and {name!r} has other bits than the live value."
                raise Breach(_CHANGED, found, "Compare all slots, or answer None.")
            staged.discard()

    def test_changed_compares_bits(self) -> None:
        """-0 is not 0: where only the sign of a zero differs, it does not say False."""
        engine = self.ready()
        for name, slot in engine.slots.items():
            if not slot.count or not oracles.dtype_of(slot.dtype).is_floating_point:
                continue
            values = self.make_values(engine, B)
            values[name].view(-1)[0] = 0.0
            self.commit(engine, values)
            values[name].view(-1)[0] = -0.0
            if oracles.bits(values[name]) == oracles.bits(self.held(engine)[name]):
                continue  # a type that has one zero
            staged = self.stage(engine, values)
            if staged.changed() is False:
                found = f"it says False, and a zero of {name!r} has another sign."
                raise Breach(_CHANGED, found, "Compare bits: torch.equal takes -0 for 0.")
            staged.discard()

    # -- through refitkit's own pipeline ----------------------------------------------------

    def test_a_refit_that_is_judged_wrong_is_taken_back(self) -> None:
        """A whole refit through the pipeline, whose verifier says no."""
        engine = self.ready()
        before = self.snapshot(engine)
        scene = EngineScene(engine)
        with suppress(RefitError):
            scene.refit(self.make_values(engine, B), verdict=False)
        advice = "The way back has to work after any commit."
        self.require_held(engine, before, _ROLLBACK, "after a refit that was refused", advice)
        values = self.make_values(engine, C)
        wanted = oracles.snapshot(values)
        scene.refit(values)
        when = "after a refit through the pipeline"
        self.require_held(engine, wanted, "Engine.stage", when, "Write what is given.")

    def test_the_module_is_lost_where_the_way_back_fails(self) -> None:
        """A commit that fails, and a rollback that fails: no call may be answered any more."""
        engine = self.ready()
        commit, rollback = self.commit_fault(engine), self.rollback_fault(engine)
        if commit is None or rollback is None:
            skip(_NO_FAULTS)
        scene = EngineScene(engine)
        with commit, rollback:
            try:
                scene.refit(self.make_values(engine, B))
            except ModuleLostError:
                pass
            except RefitError as exc:
                found = f"it was made to fail, and the refit ended with {type(exc).__name__}: "
                advice = "Raise when the old values cannot be brought back."
                raise Breach(_ROLLBACK, f"{found}{exc.message}", advice) from exc
        if not scene.compiled.gate.lost:
            found = "it was made to fail, and the module answers as if nothing had happened."
            raise Breach(_ROLLBACK, found, "Raise when the old values cannot be brought back.")


# MERGED engine_refusals: Checks of what an engine refuses, with its live values untouched.


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
