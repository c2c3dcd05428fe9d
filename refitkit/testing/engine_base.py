"""The checks that every engine has to pass, independent of its optional protocols.

:class:`EngineBase` holds the factory and the oracle that the author of an engine writes, and the
steps that the checks share. Four groups of checks follow: what an engine says of its slots
(:class:`SlotChecks`), how it stages values (:class:`StagingChecks`), which values it refuses
(:class:`RefusalChecks`), and commit, rollback and discard (:class:`TransactionChecks`).
Checks of optional abilities are in :mod:`refitkit.testing.engine`.
"""

from __future__ import annotations

import gc
from contextlib import suppress
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import ModuleLostError, RefitError
from refitkit.model import EngineMemory, Slot
from refitkit.protocols import SlotValue, SteadyValues, SupportsPartial
from refitkit.testing import oracles
from refitkit.testing.breach import Breach, SuiteError, refusal, skip
from refitkit.testing.oracles import LAYOUTS, Storage, other_dtypes, other_shapes
from refitkit.testing.scenes import EngineScene

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from refitkit.protocols import Engine, StagedRefit


A, B, C = 1, 2, 3
"""Seeds of three sets of weights."""

_STAGE = "Engine.stage"
_CHANGED = "StagedRefit.changed"
_COMMIT = "StagedRefit.commit"
_ROLLBACK = "StagedRefit.rollback"
_DISCARD = "StagedRefit.discard"
_NO_COMMIT_FAULT = "commit_fault() returned None, so no commit can be made to fail"
_NO_FAULTS = "commit_fault() or rollback_fault() returned None, so not both can be made to fail"


class EngineBase:
    """Factory, oracle and fault injection of a suite for engines.

    Write ``make_engine`` and ``held``. The other methods have defaults.
    """

    def make_engine(self) -> Engine:
        """A new engine that was never refitted; the same slots on each call."""
        raise NotImplementedError("Write make_engine: it returns a new engine.")

    def held(self, engine: Any) -> Mapping[str, torch.Tensor]:
        """The live weights of an engine by slot, read *without the engine's own code*.

        Look where the weights really are: ask the runtime, read the memory, or run the engine on
        an input that reveals them. Dtypes and the order of elements matter; shapes do not.
        """
        raise NotImplementedError("Write held: it reads the live weights past the engine.")

    def make_values(self, engine: Any, seed: int) -> dict[str, torch.Tensor]:
        """A new value for every slot, different for each seed.

        By default random values of the slot's dtype and shape. Override it if your engine accepts
        only certain values.
        """
        return oracles.random_values(engine.slots.values(), seed)

    def commit_fault(self, engine: Any) -> AbstractContextManager[object] | None:  # noqa: ARG002
        """A context in which the engine's next commit fails, best after some slots are written.

        Returns None if no commit can be made to fail; checks that need it are then skipped.
        """
        return None

    def rollback_fault(self, engine: Any) -> AbstractContextManager[object] | None:  # noqa: ARG002
        """A context in which the engine's next rollback fails; None if none can be made to."""
        return None

    # -- steps that checks share ------------------------------------------------------------

    def ready(self) -> Any:
        """A new engine that was refitted with the weights of seed A."""
        # Refit once: some engines do not know the weights that they were built with,
        # and have no spare buffer before their first refit.
        engine = self.make_engine()
        self.commit(engine, self.make_values(engine, A))
        return engine

    def ready_with(self, ability: type, method: str) -> Any:
        """Like ``ready``; skips the check if the engine lacks a protocol.

        Args:
            ability: Runtime-checkable protocol that the engine has to satisfy.
            method: Name of the protocol's method, for the reason of the skip.
        """
        engine = self.ready()
        if not isinstance(engine, ability):
            skip(f"the engine has no {method}")
        return engine

    def snapshot(self, engine: Any) -> dict[str, oracles.Bits]:
        """The bits of all slots, as the oracle reads them.

        Raises:
            SuiteError: The oracle returns no value for some slots.
        """
        # Snapshot at once: the oracle may return aliases of the live weights.
        found = oracles.snapshot(self.held(engine))
        lacking = sorted(engine.slots.keys() - found.keys())
        if lacking:
            raise SuiteError(f"held() returns no value for the slots {oracles.quoted(lacking)}.")
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

    def stage_partial(self, engine: Any, values: Sequence[SlotValue]) -> StagedRefit:
        """Stage values for some slots of an engine that supports it.

        Raises:
            SuiteError: The engine has no ``stage_partial``.
        """
        if not isinstance(engine, SupportsPartial):
            raise SuiteError("The engine has no stage_partial.")
        return engine.stage_partial(values)

    def require_bits(
        self,
        engine: Any,
        wanted: Mapping[str, oracles.Bits],
        contract: str,
        when: str,
        advice: str,
    ) -> None:
        """Compare an engine's live weights with the expected ones, bit for bit.

        Args:
            engine: Engine to read with the oracle.
            wanted: Expected bits of all slots.
            contract: Protocol member that is checked.
            when: Point in the check, such as "after a rollback", for the message.
            advice: Text of :attr:`Breach.advice`.

        Raises:
            Breach: Some slots differ; the message names them.
        """
        wrong = oracles.differing(self.snapshot(engine), wanted)
        if wrong:
            slots = f"{len(wanted)} slots" if len(wanted) > 1 else "1 slot"
            found = f"{when}, {len(wrong)} of {slots} are wrong: {oracles.quoted(wrong)}."
            raise Breach(contract, found, advice)


class SlotChecks(EngineBase):
    """Slots have the right names, dtypes, counts and shapes."""

    def test_slots_are_listed_under_their_own_names(self) -> None:
        """``slots`` maps the name of each slot to a ``Slot`` of this engine."""
        engine = self.make_engine()
        slots: dict[str, Any] = dict(engine.slots)
        for name, slot in slots.items():
            if not isinstance(slot, Slot):
                found = f"slots[{name!r}] is a {type(slot).__name__}."
                raise Breach("Engine.slots", found, "Return refitkit.model.Slot objects.")
            if slot.name != name or slot.engine != engine.name:
                found = f"slots[{name!r}] of the engine {engine.name!r} has the key {slot.key}."
                advice = "Give each slot the name of its engine and the name it is listed under."
                raise Breach("Engine.slots", found, advice)

    def test_slots_are_the_same_each_time(self) -> None:
        """Slots depend on the engine alone: neither on when they are read, nor on refits."""
        engine, other = self.make_engine(), self.make_engine()
        first = dict(engine.slots)
        again = dict(engine.slots)
        self.commit(engine, self.make_values(engine, B))
        for slots, when in (
            (again, "when read a second time"),
            (dict(engine.slots), "after a refit"),
            (dict(other.slots), "in a second engine of the same kind"),
        ):
            wrong = sorted(n for n in first.keys() | slots.keys() if first.get(n) != slots.get(n))
            if wrong:
                found = f"slots differ {when}: {oracles.quoted(wrong)}."
                raise Breach("Engine.slots", found, "Return equal slots always: plans name them.")

    def test_slots_tell_what_the_engine_holds(self) -> None:
        """Every weight that the oracle finds is a slot, with its dtype, count and shape."""
        engine = self.make_engine()
        held = self.held(engine)
        hidden = sorted(held.keys() - engine.slots.keys())
        if hidden:
            found = f"the engine has weights that are not in slots: {oracles.quoted(hidden)}."
            raise Breach("Engine.slots", found, "List all weights: a refit skips the others.")
        for name, slot in engine.slots.items():
            tensor = held[name]
            dtype, count = str(tensor.dtype).removeprefix("torch."), tensor.numel()
            if (dtype, count) != (slot.dtype, slot.count):
                found = f"slot {name!r} says {slot.dtype} x {slot.count}, but holds "
                raise Breach("Engine.slots", f"{found}{dtype} x {count}.", "Ask the runtime.")
            if slot.shape is not None and prod(slot.shape) != slot.count:
                found = f"slot {name!r} has the shape {slot.shape}, but {slot.count} elements."
                raise Breach("Engine.slots", found, "Set the real shape, or None.")

    def test_memory_is_told(self) -> None:
        """``memory`` is an ``EngineMemory`` of this engine, before and after a refit."""
        engine = self.make_engine()
        for when in ("before", "after"):
            memory: Any = engine.memory
            if not isinstance(memory, EngineMemory):
                found = f"{when} a refit it is a {type(memory).__name__}."
                raise Breach("Engine.memory", found, "Return a refitkit.model.EngineMemory.")
            if memory.engine != engine.name or memory.bytes < 0:
                found = f"{when} a refit the engine {engine.name!r} returns {memory!r}."
                advice = "Set the name of the engine, and a number of bytes of 0 or more."
                raise Breach("Engine.memory", found, advice)
            self.commit(engine, self.make_values(engine, B))


class LoadFaultError(Exception):
    """Raised by a value whose ``load`` a check makes fail."""


class StagingChecks(EngineBase):
    """``stage`` copies good values from any layout, and changes nothing if a value fails."""

    def test_every_slot_is_written(self) -> None:
        """After ``stage`` and ``commit`` every slot has its new value, bit for bit.

        Also if only the last element of one slot differs from the live values.
        """
        engine = self.ready()
        values = self.make_values(engine, B)
        wanted = oracles.snapshot(values)
        self.commit(engine, values)
        advice = "Write every value, with its elements in logical order."
        self.require_bits(engine, wanted, _COMMIT, "after a refit", advice)
        others = self.make_values(engine, C)
        for name, slot in engine.slots.items():
            dtype = oracles.dtype_of(slot.dtype)
            # Integers may be valid only together, such as those of a permutation.
            if not slot.count or not (dtype.is_floating_point or dtype.is_complex):
                continue
            values[name].view(-1)[-1] = others[name].view(-1)[-1]
            wanted[name] = oracles.bits(values[name])
            self.commit(engine, values)
            when = f"after a refit that changes only the last element of {name!r}"
            advice = "Compare all bits of values before you skip a write or use what a cache holds."
            self.require_bits(engine, wanted, _COMMIT, when, advice)

    def test_staging_changes_nothing_live(self) -> None:
        """Until ``commit`` the live values stay as they are."""
        engine = self.ready()
        before = self.snapshot(engine)
        self.stage(engine, self.make_values(engine, B))
        advice = "Keep new values in memory of their own until commit."
        self.require_bits(engine, before, _STAGE, "after stage and before commit", advice)

    def test_twice_equals_once(self) -> None:
        """The same refit a second time changes nothing."""
        engine = self.ready()
        values = self.make_values(engine, B)
        wanted = oracles.snapshot(values)
        for _ in range(2):
            self.commit(engine, values)
        advice = "Write the new values over any old values."
        self.require_bits(engine, wanted, _COMMIT, "after the same refit twice", advice)

    def test_there_and_back_is_bit_equal(self) -> None:
        """After refits from A to B and back to A the engine has A, bit for bit."""
        engine = self.ready()
        wanted = self.snapshot(engine)
        for seed in (B, A):
            self.commit(engine, self.make_values(engine, seed))
        advice = "Leave nothing of an earlier refit in the slots."
        self.require_bits(engine, wanted, _COMMIT, "after refits to B and back to A", advice)

    def test_the_same_values_load_other_tensors_later(self) -> None:
        """The same ``SteadyValues`` again: the engine loads the tensors of that refit."""
        engine, now = self.ready(), dict[str, torch.Tensor]()
        values = SteadyValues(
            SlotValue(slot, "conformance", (name,), partial(now.__getitem__, name))
            for name, slot in engine.slots.items()
        )
        for seed in (B, C, B):
            now.update(self.make_values(engine, seed))
            wanted = oracles.snapshot({name: now[name].clone() for name in engine.slots})
            engine.stage(values).commit()
            when = "after a refit with the values of an earlier one"
            self.require_bits(engine, wanted, _STAGE, when, "Load all values in each refit.")

    def test_any_layout_is_copied_exactly(self) -> None:
        """Views, strides, offsets, gradients and lazy negations: the elements arrive unchanged."""
        engine = self.ready()
        for layout, with_layout in LAYOUTS.items():
            values = self.make_values(engine, B)
            laid_out = {name: with_layout(value) for name, value in values.items()}
            possible = {name: value for name, value in laid_out.items() if value is not None}
            if possible:
                self._require_copied(engine, {**values, **possible}, layout)

    def _require_copied(self, engine: Any, values: dict[str, torch.Tensor], layout: str) -> None:
        wanted = oracles.snapshot(values)
        try:
            self.commit(engine, values)
        except Exception as exc:
            found = f"values that are {layout} raised {type(exc).__name__}: {exc}."
            advice = "Accept any layout: only the dtype and the shape are those of the slot."
            raise Breach(_STAGE, found, advice) from exc
        advice = "Copy element by element, without gradients: tensor.copy_(value)."
        self.require_bits(engine, wanted, _STAGE, f"for values that are {layout}", advice)

    def test_values_are_free_once_staged(self) -> None:
        """The caller may overwrite its tensors after ``stage`` returns."""
        engine = self.ready()
        values = self.make_values(engine, B)
        wanted = oracles.snapshot(values)
        staged = self.stage(engine, values)
        for value in values.values():
            value.copy_(torch.zeros_like(value))
        staged.commit()
        advice = "Copy each value in stage: the caller may reuse its tensors afterwards."
        when = "after the caller overwrote its tensors between stage and commit"
        self.require_bits(engine, wanted, _STAGE, when, advice)

    def test_values_are_not_kept(self) -> None:
        """``stage`` keeps no reference to the caller's tensors, but keeps its copies alive."""
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
            found = f"the caller's tensors stay alive after stage: {oracles.quoted(kept)}."
            advice = "Keep only copies, in the engine and in the returned StagedRefit."
            raise Breach(_STAGE, found, advice)
        # Allocate blocks of the same sizes: they reuse the memory of the freed tensors. An engine
        # that kept bare addresses now reads 0x55 bytes instead of the values.
        junk = [torch.full((size,), 0x55, dtype=torch.uint8) for size in sizes for _ in range(4)]
        staged.commit()
        del junk
        advice = "Keep the staged copies alive until commit or discard."
        when = "after the caller freed its tensors between stage and commit"
        self.require_bits(engine, wanted, _COMMIT, when, advice)

    def test_values_are_not_written_to(self) -> None:
        """A refit, its rollback and the next refit only read the caller's tensors."""
        engine = self.ready()
        values = self.make_values(engine, B)
        before = oracles.snapshot(values)
        self.commit(engine, values).rollback()
        self.commit(engine, self.make_values(engine, C))
        wrong = oracles.differing(oracles.snapshot(values), before)
        if wrong:
            found = f"the engine wrote to tensors of the caller: {oracles.quoted(wrong)}."
            raise Breach(_STAGE, found, "Only read values: they may be views of live parameters.")

    def test_each_value_is_loaded_once(self) -> None:
        """``stage`` calls ``load`` once for each value, because ``load`` may compute."""
        engine = self.ready()
        values = self.make_values(engine, B)
        loads: list[str] = []
        self._stage_with_hook(engine, values, loads.append)
        wrong = sorted(name for name in values if loads.count(name) != 1)
        if wrong:
            found = f"load was not called exactly once for {oracles.quoted(wrong)}."
            raise Breach(_STAGE, found, "Call load once for each value: it may be expensive.")

    def test_a_fault_at_any_value_leaves_all_as_it_was(self) -> None:
        """If any one value fails to load, live values stay, and the next refit is right."""
        engine = self.ready()
        before = self.snapshot(engine)
        values = self.make_values(engine, B)
        # Fail at each value in turn: an engine that writes while it loads passes at the first one.
        for number, failing in enumerate(values):

            def fail(name: str, failing: str = failing) -> None:
                if name == failing:
                    raise LoadFaultError(name)

            try:
                self._stage_with_hook(engine, values, fail)
            except Exception:  # noqa: BLE001, S110 - any error is fine: the live values decide
                pass
            else:
                found = f"value {number}, {failing!r}, failed to load, but stage returned."
                raise Breach(_STAGE, found, "Let errors of load propagate, or wrap them.")
            when = f"after value {number}, {failing!r}, failed to load"
            advice = "Leave live values untouched if stage raises."
            self.require_bits(engine, before, _STAGE, when, advice)
        after = self.make_values(engine, C)
        wanted = oracles.snapshot(after)
        self.commit(engine, after)
        advice = "Leave no state behind when a refit fails."
        self.require_bits(engine, wanted, _STAGE, "in the refit after the failed ones", advice)

    @staticmethod
    def _stage_with_hook(engine: Any, values: dict[str, torch.Tensor], on_load: Any) -> None:
        """Stage values whose ``load`` first calls ``on_load`` with the name of the slot."""

        def value_of(slot: Slot) -> SlotValue:
            def load() -> torch.Tensor:
                on_load(slot.name)
                return values[slot.name]

            return SlotValue(slot, "conformance", (slot.name,), load)

        engine.stage([value_of(engine.slots[name]) for name in values])


class RefusalChecks(EngineBase):
    """Values that do not fit raise a typed error, and live values stay untouched."""

    def test_a_wrong_dtype_is_refused(self) -> None:
        """A value of another dtype is refused, which ``copy_`` would cast."""
        engine = self.ready()
        advice = "Compare the dtype of the loaded tensor with the slot's before using it."
        for slot, value, others in self._one_by_one(engine):
            for wrong in other_dtypes(value):
                what = f"a value of {wrong.dtype} for slot {slot.name!r} of {slot.dtype}"
                self._require_refused(
                    engine, [oracles.slot_value(slot, wrong), *others], what, advice
                )

    def test_a_wrong_shape_is_refused(self) -> None:
        """A value of another shape is refused, which ``copy_`` would broadcast.

        A raw copy of memory would read past its end.
        """
        engine = self.ready()
        advice = "Compare the shape of the loaded tensor with the slot's before using it."
        for slot, value, others in self._one_by_one(engine):
            size = f"shape {slot.shape}" if slot.shape is not None else f"{slot.count} elements"
            for wrong in other_shapes(slot, value):
                what = f"a value of shape {tuple(wrong.shape)} for slot {slot.name!r} of {size}"
                self._require_refused(
                    engine, [oracles.slot_value(slot, wrong), *others], what, advice
                )

    def test_an_unknown_name_is_refused(self) -> None:
        """A value for a slot that the engine does not have is refused."""
        engine = self.ready()
        values = oracles.slot_values(engine.slots, self.make_values(engine, B))
        advice = "Refuse names that are not slots of the engine."
        what = "a value for a slot that does not exist"
        self._require_refused(engine, [*values, _unknown_value(engine)], what, advice)

    def test_a_missing_value_is_refused(self) -> None:
        """``stage`` refuses values that leave out any one slot."""
        engine = self.ready()
        for slot, _, others in self._one_by_one(engine):
            advice = "Require values for all slots in stage: a missing one would stay old."
            self._require_refused(engine, others, f"a refit without {slot.name!r}", advice)

    def test_a_slot_that_is_given_twice_is_refused(self) -> None:
        """Two values for one slot are refused, because either could be the right one."""
        engine = self.ready()
        other = self.make_values(engine, C)
        values = oracles.slot_values(engine.slots, self.make_values(engine, B))
        for slot in engine.slots.values():
            second = oracles.slot_value(slot, other[slot.name])
            what = f"a refit with two values for {slot.name!r}"
            self._require_refused(engine, [*values, second], what, "Refuse repeated names.")

    def _one_by_one(self, engine: Any) -> Iterator[tuple[Slot, torch.Tensor, SteadyValues]]:
        """Each slot with its value, and the values of all other slots."""
        values = self.make_values(engine, B)
        # A copy of the mapping: the caller stages between two items.
        for name, slot in dict(engine.slots).items():
            others = {other: value for other, value in values.items() if other != name}
            yield slot, values[name], oracles.slot_values(engine.slots, others)

    def _require_refused(
        self, engine: Any, values: Sequence[SlotValue], what: str, advice: str
    ) -> None:
        before = self.snapshot(engine)
        # Commit too: an engine that defers its checks to commit may refuse there.
        with refusal(_STAGE, what, advice):
            engine.stage(values).commit()
        advice = "Check all values before writing any: live values stay if stage raises."
        self.require_bits(engine, before, _STAGE, f"after {what} was refused", advice)


def _unknown_value(engine: Any) -> SlotValue:
    slot = Slot(engine=engine.name, name="no such slot", dtype="float32", shape=(1,), count=1)
    return oracles.slot_value(slot, torch.ones(1))


class TransactionChecks(EngineBase):
    """A refit is committed, or rolled back bit for bit, or the module is marked as lost."""

    def test_a_rollback_brings_the_old_values_back(self) -> None:
        """After ``commit`` and ``rollback`` every bit is as before; the next refit is right."""
        engine = self.ready()
        before = self.snapshot(engine)
        staged = self.commit(engine, self.make_values(engine, B))
        staged.rollback()
        advice = "Keep the old values bit for bit until the next refit."
        self.require_bits(engine, before, _ROLLBACK, "after a rollback", advice)
        self._require_refit(engine, _ROLLBACK, "in the refit after a rollback")

    def test_a_rollback_can_be_repeated(self) -> None:
        """A second ``rollback`` changes nothing.

        The pipeline calls it again after an interrupt, which may come after the first completed.
        """
        engine = self.ready()
        before = self.snapshot(engine)
        staged = self.commit(engine, self.make_values(engine, B))
        staged.rollback()
        staged.rollback()
        advice = "Let a second rollback change nothing."
        self.require_bits(engine, before, _ROLLBACK, "after a second rollback", advice)
        self._require_refit(engine, _ROLLBACK, "in the refit after a second rollback")

    def test_the_first_refit_can_be_taken_back(self) -> None:
        """The first refit of an engine can be rolled back like any other."""
        engine = self.make_engine()
        before = self.snapshot(engine)
        self.commit(engine, self.make_values(engine, B)).rollback()
        advice = "Save the old values before the first commit, or refuse to stage."
        self.require_bits(engine, before, _ROLLBACK, "after a rollback of a first refit", advice)

    def test_a_rollback_right_after_staging_changes_nothing(self) -> None:
        """``rollback`` without ``commit`` changes nothing.

        The pipeline calls it after every failed commit, also if the commit wrote nothing yet.
        """
        engine = self.ready()
        before = self.snapshot(engine)
        self.stage(engine, self.make_values(engine, B)).rollback()
        advice = "Roll back only what this refit wrote, which may be nothing."
        self.require_bits(engine, before, _ROLLBACK, "after a rollback without a commit", advice)

    def test_a_failed_commit_can_be_taken_back(self) -> None:
        """If a commit fails after some slots are written, ``rollback`` restores every bit."""
        engine = self.ready()
        before = self.snapshot(engine)
        staged = self.stage(engine, self.make_values(engine, B))
        fault = self.commit_fault(engine)
        if fault is None:
            skip(_NO_COMMIT_FAULT)
        with fault:
            self._require_commit_fails(staged)
        staged.rollback()
        advice = "Support a rollback after any line of commit."
        self.require_bits(engine, before, _ROLLBACK, "after rollback of a failed commit", advice)
        self._require_refit(engine, _ROLLBACK, "in the refit after a commit that failed")

    @staticmethod
    def _require_commit_fails(staged: Any) -> None:
        try:
            staged.commit()
        except Exception:  # noqa: BLE001 - an engine may raise any exception here
            return
        found = "it returned, although commit_fault() made it fail."
        advice = "Let errors propagate: only commit knows that slots are partly written."
        raise Breach(_COMMIT, found, advice)

    def test_a_discard_leaves_the_live_values(self) -> None:
        """Discarded values never become live; the next refit is right."""
        engine = self.ready()
        before = self.snapshot(engine)
        self.stage(engine, self.make_values(engine, B)).discard()
        advice = "Drop the staged values, and touch nothing else."
        self.require_bits(engine, before, _DISCARD, "after a discard", advice)
        self._require_refit(engine, _DISCARD, "in the refit after a discard")

    def _require_refit(self, engine: Any, contract: str, when: str) -> None:
        before, values = self.snapshot(engine), self.make_values(engine, C)
        wanted = oracles.snapshot(values)
        staged = self.stage(engine, values)
        advice = "Never stage into memory that has the live values: rollbacks swap it, too."
        self.require_bits(engine, before, _STAGE, f"{when}, after stage", advice)
        staged.commit()
        self.require_bits(engine, wanted, contract, when, "Leave no state behind.")

    def test_changed_tells_the_truth(self) -> None:
        """``changed`` is not True if all bits are equal, and not False if any slot differs."""
        engine = self.ready()
        values, others = self.make_values(engine, B), self.make_values(engine, C)
        self.commit(engine, values)
        same = self.stage(engine, values)
        # None is fine in both cases: it means that the engine does not know.
        if same.changed() is True:
            found = "it returned True for values that equal the live ones."
            raise Breach(_CHANGED, found, "Compare bits, or return None.")
        same.discard()
        # One slot at a time: an engine that compares only its first slots must not pass.
        for name in oracles.differing(oracles.snapshot(values), oracles.snapshot(others)):
            staged = self.stage(engine, {**values, name: others[name]})
            if staged.changed() is False:
                found = f"it returned False, but {name!r} differs from the live value."
                raise Breach(_CHANGED, found, "Compare all slots, or return None.")
            staged.discard()

    def test_changed_compares_bits(self) -> None:
        """``changed`` is not False if only the sign of a zero differs: -0 and 0 differ in bits."""
        engine = self.ready()
        for name, slot in engine.slots.items():
            if not slot.count or not oracles.dtype_of(slot.dtype).is_floating_point:
                continue
            values = self.make_values(engine, B)
            values[name].view(-1)[0] = 0.0
            self.commit(engine, values)
            values[name].view(-1)[0] = -0.0
            if oracles.bits(values[name]) == oracles.bits(self.held(engine)[name]):
                continue  # a dtype with only one zero, such as float8_e4m3fnuz
            staged = self.stage(engine, values)
            if staged.changed() is False:
                found = f"it returned False, but a zero of {name!r} changed its sign."
                raise Breach(_CHANGED, found, "Compare bits: torch.equal treats -0 as equal to 0.")
            staged.discard()

    # -- through refitkit's own pipeline ----------------------------------------------------

    def test_a_refit_that_is_judged_wrong_is_taken_back(self) -> None:
        """The pipeline can roll a refit back whose verifier rejects it, and refit again."""
        engine = self.ready()
        before = self.snapshot(engine)
        scene = EngineScene(engine)
        # The pipeline raises for a rejected refit. Only the weights matter here.
        with suppress(RefitError):
            scene.refit(self.make_values(engine, B), verdict=False)
        advice = "Support a rollback after any commit."
        when = "after a refit that the verifier rejected"
        self.require_bits(engine, before, _ROLLBACK, when, advice)
        values = self.make_values(engine, C)
        wanted = oracles.snapshot(values)
        scene.refit(values)
        when = "after a refit through the pipeline"
        self.require_bits(engine, wanted, _STAGE, when, "Write the given values.")

    def test_the_module_is_lost_where_the_way_back_fails(self) -> None:
        """If a commit and its rollback fail, the module is lost and answers no calls."""
        engine = self.ready()
        commit, rollback = self.commit_fault(engine), self.rollback_fault(engine)
        if commit is None or rollback is None:
            skip(_NO_FAULTS)
        scene = EngineScene(engine)
        advice = "Raise if the old values cannot be restored."
        with commit, rollback:
            try:
                scene.refit(self.make_values(engine, B))
            except ModuleLostError:
                pass
            except RefitError as exc:
                # The pipeline raises another error if it believes that the rollback worked.
                found = "rollback_fault() made it fail, but the refit raised "
                found += f"{type(exc).__name__}: {exc.message}"
                raise Breach(_ROLLBACK, found, advice) from exc
        if not scene.compiled.gate.lost:
            found = "rollback_fault() made it fail, but the module still answers calls."
            raise Breach(_ROLLBACK, found, advice)
