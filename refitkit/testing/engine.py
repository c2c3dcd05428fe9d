"""The suite for engines: ``class TestMyEngine(EngineSuite)``, a factory, an oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.protocols import (
    HoldsPrevious,
    RemembersWeights,
    ShowsMemory,
    ShowsStaged,
    SupportsOverwrite,
    SupportsPartial,
    SupportsReadback,
    SupportsSpareBuffer,
    SupportsWarming,
)
from refitkit.testing import oracles
from refitkit.testing.breach import Breach, refusal, skip
from refitkit.testing.engine_base import (
    A,
    B,
    C,
    EngineBase,
    RefusalChecks,
    SlotChecks,
    StagingChecks,
    TransactionChecks,
)
from refitkit.testing.oracles import NewMemory, of_other_dtypes, of_other_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from refitkit.model import Slot
    from refitkit.protocols import Places


# MERGED engine_abilities: Checks of what an engine says it can do: readback, partial, a spare
# buffer, warming, memory.

_READ = "SupportsReadback.read"
_REMEMBERED = "RemembersWeights.remembered"
_STAGED = "ShowsStaged.staged"
_SIDES = "ShowsMemory.side_by_side"
_PARTIAL = "SupportsPartial.stage_partial"
_SPARE = "SupportsSpareBuffer.free_spare"
_WARM = "SupportsWarming.warm"
_MEMORY = "Engine.memory"
_SLACK = 512  # bytes for each slot: alignment
_REFITS = 6  # so many that a leak of one set of weights each is more than any engine declares


def _require_shape(contract: str, slot: Slot, value: torch.Tensor) -> None:
    if slot.shape is not None and tuple(value.shape) != slot.shape:
        found = f"{slot.name!r} is given as {tuple(value.shape)}, and is {slot.shape}."
        raise Breach(contract, found, "Give it in the shape of its slot.")


def _at(memory: torch.Tensor, places: Places) -> dict[str, oracles.Bits]:
    """What lies at the places of slots."""
    return {
        one.slot: oracles.bits(
            memory[one.offset : one.offset + one.count * one.dtype.itemsize].view(one.dtype)
        )
        for one in places.all
    }


class AbilityChecks(EngineBase):
    """Each declared capability is true; what is not declared is skipped."""

    # -- readback ---------------------------------------------------------------------------

    def test_slots_say_whether_they_can_be_read(self) -> None:
        """``Slot.readable`` is so exactly where the engine has ``read``."""
        engine = self.make_engine()
        can = isinstance(engine, SupportsReadback)
        wrong = sorted(name for name, slot in engine.slots.items() if slot.readable is not can)
        if wrong:
            has = "has" if can else "lacks"
            found = f"the engine {has} read, and slots say otherwise: {oracles.shown(wrong)}."
            raise Breach("Slot.readable", found, "Say of each slot what is so.")

    def test_what_is_read_is_what_is_held(self) -> None:
        """At first, once staged, after a commit, and after a rollback; in the slot's shape."""
        engine = self._engine_that(SupportsReadback, "read")
        self._require_read(engine, "at first")
        staged = self.stage(engine, self.make_values(engine, B))
        self._require_read(engine, "once values are staged")
        staged.commit()
        self._require_read(engine, "after a commit")
        staged.rollback()
        self._require_read(engine, "after a rollback")

    def _require_read(self, engine: Any, when: str) -> None:
        held = self.snapshot(engine)
        for name, slot in engine.slots.items():
            read = engine.read(name)
            if oracles.bits(read) != held[name]:
                found = f"{when}, what is read of {name!r} is not what the engine holds."
                raise Breach(_READ, found, "Read the live value, always.")
            if slot.shape is not None and tuple(read.shape) != slot.shape:
                found = f"{when}, {name!r} is read as {tuple(read.shape)}, and is {slot.shape}."
                raise Breach(_READ, found, "Give it in the shape of its slot.")

    def test_reading_copies_nothing(self) -> None:
        """What is read is an alias: read twice, it is the same memory."""
        engine = self._engine_that(SupportsReadback, "read")
        for name, slot in engine.slots.items():
            if slot.count and engine.read(name).data_ptr() != engine.read(name).data_ptr():
                found = f"{name!r} is copied whenever it is read."
                raise Breach(_READ, found, "Give an alias of the live value; who keeps it copies.")

    # -- what is not read, and what is not live yet -----------------------------------------

    def test_what_is_remembered_is_held(self) -> None:
        """At first, once staged, after a commit, a rollback and a discard; None is no lie."""
        engine = self.make_engine()
        if not isinstance(engine, RemembersWeights):
            skip("the engine has no RemembersWeights.remembered")
        self._require_remembered(engine, "at first")
        self.stage(engine, self.make_values(engine, A)).discard()
        self._require_remembered(engine, "after a discard")
        self.commit(engine, self.make_values(engine, A))
        self._require_remembered(engine, "after a commit", known=True)
        staged = self.stage(engine, self.make_values(engine, B))
        self._require_remembered(engine, "once values are staged")
        staged.commit()
        self._require_remembered(engine, "after another commit", known=True)
        staged.rollback()
        self._require_remembered(engine, "after a rollback")

    def _require_remembered(self, engine: Any, when: str, *, known: bool = False) -> None:
        held = self.snapshot(engine)
        for name, slot in engine.slots.items():
            value = engine.remembered(name)
            if value is None and not known:
                continue
            if value is None or oracles.bits(value) != held[name]:
                found = f"{when}, what it says of {name!r} is not what the engine holds."
                raise Breach(_REMEMBERED, found, "Say None where it is not known.")
            _require_shape(_REMEMBERED, slot, value)

    def test_what_is_staged_is_shown(self) -> None:
        """Each new value, before it is live, and as an alias; the live ones stay."""
        engine = self.ready()
        values = self.make_values(engine, B)
        before, wanted = self.snapshot(engine), oracles.snapshot(values)
        staged = self.stage(engine, values)
        if not isinstance(staged, ShowsStaged):
            skip("what is staged has no ShowsStaged.staged")
        for name, slot in engine.slots.items():
            value = staged.staged(name)
            if oracles.bits(value) != wanted[name]:
                found = f"what it shows of {name!r} is not the value that was given."
                raise Breach(_STAGED, found, "Show what would be live after commit.")
            if slot.count and value.data_ptr() != staged.staged(name).data_ptr():
                found = f"{name!r} is copied whenever it is shown."
                raise Breach(_STAGED, found, "Give an alias; who keeps it copies.")
            _require_shape(_STAGED, slot, value)
        advice = "Show, and change nothing."
        self.require_held(engine, before, _STAGED, "after it", advice)
        staged.commit()
        self.require_held(engine, wanted, _STAGED, "after it and a commit", advice)

    def test_both_sets_lie_side_by_side(self) -> None:
        """Each slot once, live and new values where places say; nothing while none is known."""
        engine = self.ready()
        values = self.make_values(engine, B)
        before, wanted = self.snapshot(engine), oracles.snapshot(values)
        staged = self.stage(engine, values)
        if not isinstance(staged, ShowsMemory):
            skip("what is staged has no ShowsMemory.side_by_side")
        both = staged.side_by_side()
        if both is None:
            found = "nothing is shown after a refit."
            raise Breach(_SIDES, found, "Show both; None is for live values that nobody knows.")
        named = sorted(one.slot for one in both.places.all)
        if named != sorted(engine.slots):
            found = f"there are places for {oracles.shown(named)}."
            raise Breach(_SIDES, found, "Have one place for each slot.")
        for what, memory, held in (("live", both.live, before), ("staged", both.staged, wanted)):
            there = _at(memory, both.places)
            wrong = sorted(name for name, value in there.items() if value != held[name])
            if wrong:
                found = f"the {what} memory has something else for {oracles.shown(wrong)}."
                raise Breach(_SIDES, found, "Say where each slot lies in both, in bytes.")
        staged.commit()
        again = self.stage(engine, self.make_values(engine, C))
        shown = again.side_by_side() if isinstance(again, ShowsMemory) else None
        if shown is not None and shown.places is not both.places:
            found = "the next refit brings other places."
            raise Breach(_SIDES, found, "Keep one Places: what follows from it is kept with it.")

    # -- in part ----------------------------------------------------------------------------

    def test_a_partial_refit_leaves_all_other_slots(self) -> None:
        """One slot after another, each between other refits: the others keep every bit."""
        engine = self._engine_that(SupportsPartial, "stage_partial")
        for name, slot in engine.slots.items():
            before = self.snapshot(engine)
            value = self.make_values(engine, C)[name]
            staged = self.partly(engine, [oracles.given(slot, value)])
            advice = "Keep new values beside the live ones until commit."
            self.require_held(engine, before, _PARTIAL, f"once {name!r} is staged", advice)
            staged.commit()
            wanted = {**before, name: oracles.bits(value)}
            advice = "Change what is given, and bring what is not along from the live values."
            self.require_held(engine, wanted, _PARTIAL, f"after a refit of {name!r} alone", advice)
            self.commit(engine, self.make_values(engine, B))

    def test_a_partial_refit_can_be_taken_back(self) -> None:
        """After its rollback every bit is as before, and so after one more refit in part."""
        engine = self._engine_that(SupportsPartial, "stage_partial")
        for name, slot in engine.slots.items():
            before = self.snapshot(engine)
            staged = self.partly(engine, [oracles.given(slot, self.make_values(engine, C)[name])])
            staged.commit()
            staged.rollback()
            advice = "Keep the old values of what was given."
            when = f"after a rollback of a refit of {name!r} alone"
            self.require_held(engine, before, "StagedRefit.rollback", when, advice)

    def test_a_partial_refit_follows_one_that_was_discarded(self) -> None:
        """What was staged and discarded does not come back with the next refit in part."""
        engine = self._engine_that(SupportsPartial, "stage_partial")
        before = self.snapshot(engine)
        for name, slot in engine.slots.items():
            self.stage(engine, self.make_values(engine, B)).discard()
            value = self.make_values(engine, C)[name]
            self.partly(engine, [oracles.given(slot, value)]).commit()
            before = {**before, name: oracles.bits(value)}
            when = f"after a refit of {name!r} alone that followed a discarded one"
            advice = "Slots that are not given keep their live values, not staged ones."
            self.require_held(engine, before, _PARTIAL, when, advice)

    def test_a_partial_refit_refuses_what_does_not_fit(self) -> None:
        """As a whole one does: dtype, shape, unknown names, a name given twice."""
        engine = self._engine_that(SupportsPartial, "stage_partial")
        before = self.snapshot(engine)
        for name, slot in engine.slots.items():
            value = self.make_values(engine, B)[name]
            good, unknown = oracles.given(slot, value), slot.model_copy(update={"name": "no such"})
            odd = [("given twice", [good, good]), ("unknown", [oracles.given(unknown, value)])]
            for other in (*of_other_dtypes(value), *of_other_shapes(slot, value)):
                what = f"{other.dtype} {tuple(other.shape)}"
                odd.append((what, [oracles.given(slot, other)]))
            for what, values in odd:
                shown = f"for {name!r}, a value that is {what}"
                with refusal(_PARTIAL, shown, "Check as stage does."):
                    self.partly(engine, values).commit()
                advice = "Check before anything is written."
                self.require_held(engine, before, _PARTIAL, f"after {shown} was refused", advice)

    # -- the spare buffer -------------------------------------------------------------------

    def test_the_spare_buffer_can_be_freed(self) -> None:
        """It tells its bytes, then 0; live values stay; the next refit and its rollback are right.

        After two refits there is one to free.
        """
        engine = self._engine_that(SupportsSpareBuffer, "free_spare")
        self.commit(engine, self.make_values(engine, B))
        before = self.snapshot(engine)
        freed, again = engine.free_spare(), engine.free_spare()
        if not isinstance(freed, int) or freed <= 0 or again != 0:
            found = f"after two refits it returned {freed!r}, and then {again!r}."
            advice = "Return the bytes that are given back: more than 0, then 0."
            raise Breach(_SPARE, found, advice)
        advice = "Free what is not live."
        self.require_held(engine, before, _SPARE, "after it", advice)
        values = self.make_values(engine, C)
        wanted = oracles.snapshot(values)
        staged = self.commit(engine, values)
        advice = "Allocate it again when it is needed."
        self.require_held(engine, wanted, _SPARE, "in the refit after it", advice)
        staged.rollback()
        self.require_held(engine, before, _SPARE, "after a rollback of that refit", advice)

    # -- warming ----------------------------------------------------------------------------

    def test_warming_changes_nothing(self) -> None:
        """Not the weights, whether they were ever refitted or not; refits after it are right."""
        for engine, what in (
            (self.make_engine(), "a new engine"),
            (self.ready(), "a refitted one"),
        ):
            if not isinstance(engine, SupportsWarming):
                skip("the engine does not say that it can be warmed")
            before = self.snapshot(engine)
            told: list[Any] = []
            engine.warm(told.append)
            odd = [text for text in told if not isinstance(text, str)]
            if odd:
                found = f"it tells {odd[0]!r} of {what}."
                raise Breach(_WARM, found, "Tell of progress in words.")
            advice = "Write nothing that is not live already."
            self.require_held(engine, before, _WARM, f"after it, of {what}", advice)
            values = self.make_values(engine, C)
            wanted = oracles.snapshot(values)
            self.commit(engine, values)
            when = f"in the refit after it, of {what}"
            self.require_held(engine, wanted, _WARM, when, "Leave nothing behind.")

    # -- memory -----------------------------------------------------------------------------

    def test_staging_keeps_no_more_than_it_says(self) -> None:
        """What torch holds once values are staged: those, and the declared way back."""
        engine = self.ready()
        limit = self._limit(engine)
        values = self.make_values(engine, B)
        with NewMemory() as memory:
            staged = self.stage(engine, values)
        kept = memory.kept()
        staged.discard()
        if kept > limit:
            found = f"once staged, {kept} bytes are kept; declared are {limit} with the new values."
            raise Breach(_MEMORY, found, "Keep less, or declare it.")

    def test_refits_do_not_pile_up(self) -> None:
        """After many refits no more is kept than after one."""
        engine = self.ready()
        limit = self._limit(engine)
        sets = [self.make_values(engine, seed) for seed in (A, B)]
        with NewMemory() as memory:
            for number in range(_REFITS):
                self.commit(engine, sets[number % 2])
        kept = memory.kept()
        if kept > limit:
            found = f"after {_REFITS} refits {kept} bytes are kept; declared are {limit} with the "
            raise Breach(_MEMORY, f"{found}new values.", "Let go of what earlier refits needed.")

    @staticmethod
    def _limit(engine: Any) -> int:
        slots = engine.slots.values()
        new: int = sum(slot.nbytes + _SLACK for slot in slots)
        held: int = engine.memory.bytes
        return held + new

    def _engine_that(self, ability: type, method: str) -> Any:
        engine = self.ready()
        if not isinstance(engine, ability):
            skip(f"the engine has no {method}")
        return engine


# MERGED engine_past: Checks of engines that hold earlier values, or can do without a way back.

_PREVIOUS = "HoldsPrevious.previous"
_OVER = "SupportsOverwrite.stage_over"


class PastChecks(EngineBase):
    """What is said of values that are, or were, live is true; what is not declared is skipped."""

    # -- previous values ------------------------------------------------------------------------

    def test_previous_values_are_those_before_the_last_commit(self) -> None:
        """After a commit all of them; then whatever is told is true, or nothing is."""
        engine = self._that(HoldsPrevious, "previous")
        before = self.snapshot(engine)
        staged = self.commit(engine, self.make_values(engine, B))
        lacking = sorted(before.keys() - engine.previous().keys())
        if lacking:
            found = f"after a commit, slots that it changed are lacking: {oracles.shown(lacking)}."
            raise Breach(_PREVIOUS, found, "Give all, or do not declare it.")
        self._require_true(engine, before, "after a commit")
        self.stage(engine, self.make_values(engine, C)).discard()
        self._require_true(engine, before, "after something else was staged and discarded")
        self.stage(engine, self.make_values(engine, B)).commit()
        staged = self.commit(engine, self.make_values(engine, C))
        self._require_true(engine, oracles.snapshot(self.make_values(engine, B)), "one refit later")
        staged.rollback()
        self._require_nothing(engine, "after a rollback")

    def test_no_previous_values_where_there_are_none(self) -> None:
        """Of an engine that was never refitted, and once the spare buffer is freed."""
        engine: Any = self.make_engine()
        if not isinstance(engine, HoldsPrevious):
            skip("the engine has no previous")
        self._require_nothing(engine, "before any refit")
        if isinstance(engine, SupportsSpareBuffer):
            for seed in (A, B):
                self.commit(engine, self.make_values(engine, seed))
            engine.free_spare()
            self._require_nothing(engine, "once the spare buffer is freed")

    def test_previous_values_can_be_staged(self) -> None:
        """Given back to the engine they are live again, bit for bit: that is how refits are undone.

        So it is done twice: from B back to A, and from A back to B.
        """
        engine = self._that(HoldsPrevious, "previous")
        first = self.snapshot(engine)
        self.commit(engine, self.make_values(engine, B))
        second = self.snapshot(engine)
        for wanted in (first, second):
            self.commit(engine, engine.previous())
            advice = "They must last until the stage that they are given to returns: copy them."
            self.require_held(engine, wanted, _PREVIOUS, "after they were staged", advice)

    def _require_true(self, engine: Any, wanted: Mapping[str, oracles.Bits], when: str) -> None:
        told = oracles.snapshot(engine.previous())
        wrong = [name for name, found in told.items() if found != wanted.get(name)]
        if wrong:
            found = f"{when}, it tells of values that were not live before: {oracles.shown(wrong)}."
            raise Breach(_PREVIOUS, found, "Tell nothing of what was overwritten since.")

    @staticmethod
    def _require_nothing(engine: Any, when: str) -> None:
        told = sorted(engine.previous())
        if told:
            found = f"{when}, it tells of {oracles.shown(told)}."
            raise Breach(_PREVIOUS, found, "Tell nothing where there was no commit to go back on.")

    # -- without a way back ---------------------------------------------------------------------

    def test_overwriting_begins_at_the_commit(self) -> None:
        """Until then nothing has changed, and it can be left; then all slots have their values."""
        engine = self._that(SupportsOverwrite, "stage_over")
        before = self.snapshot(engine)
        values = self.make_values(engine, B)
        advice = "Write at the commit, not before it."
        self._over(engine, values).discard()
        self.require_held(engine, before, _OVER, "after what it gave was discarded", advice)
        staged = self._over(engine, values)
        self.require_held(engine, before, _OVER, "once values are staged", advice)
        staged.rollback()
        self.require_held(engine, before, _OVER, "after a rollback without a commit", advice)
        staged = self._over(engine, values)
        staged.commit()
        wanted = oracles.snapshot(values)
        self.require_held(engine, wanted, _OVER, "after a commit", "Write what was given.")
        with refusal("StagedRefit.rollback", "a rollback after overwriting", "There is no way."):
            staged.rollback()

    def test_overwriting_some_leaves_the_others(self) -> None:
        """One slot after another; then whole refits, and their rollbacks, are right as ever."""
        engine = self._that(SupportsOverwrite, "stage_over")
        for name, slot in engine.slots.items():
            value = self.make_values(engine, C)[name]
            wanted = {**self.snapshot(engine), name: oracles.bits(value)}
            engine.stage_over([oracles.given(slot, value)]).commit()
            when = f"after {name!r} alone was written over"
            self.require_held(engine, wanted, _OVER, when, "Leave what is not given.")
        before = self.snapshot(engine)
        staged = self.commit(engine, self.make_values(engine, B))
        staged.rollback()
        when = "after a refit that followed, and its rollback"
        self.require_held(engine, before, _OVER, when, "Leave nothing behind.")

    def test_overwriting_refuses_names_that_are_not_its_own(self) -> None:
        """Unknown ones, and those given twice, before anything is written."""
        engine = self._that(SupportsOverwrite, "stage_over")
        before = self.snapshot(engine)
        name, slot = next(iter(engine.slots.items()))
        good = oracles.given(slot, self.make_values(engine, B)[name])
        strange = oracles.given(slot.model_copy(update={"name": "no such"}), good.load())
        for what, values in (("a name given twice", [good, good]), ("an unknown name", [strange])):
            with refusal(_OVER, what, "Check names as stage does."):
                engine.stage_over(values)
            self.require_held(engine, before, _OVER, f"after {what} was refused", "Check first.")

    def test_overwriting_needs_no_second_set(self) -> None:
        """Less than one set of weights more than what is live, then and afterwards."""
        engine = self._that(SupportsOverwrite, "stage_over")
        if isinstance(engine, SupportsSpareBuffer):
            engine.free_spare()
        values = self.make_values(engine, B)
        limit = max(slot.nbytes for slot in engine.slots.values()) + sum(
            slot.nbytes // 4 + _SLACK for slot in engine.slots.values()
        )
        with NewMemory() as memory:
            self._over(engine, values).commit()
        kept = memory.kept()
        if kept > limit:
            found = f"{kept} bytes more are kept after it; one set has {self._size(engine)}."
            raise Breach(_OVER, found, "Free the second set, and allocate none.")

    @staticmethod
    def _size(engine: Any) -> int:
        size: int = sum(slot.nbytes for slot in engine.slots.values())
        return size

    @staticmethod
    def _over(engine: Any, values: Mapping[str, Any]) -> Any:
        return engine.stage_over(oracles.slot_values(engine.slots, values))

    def _that(self, ability: type, method: str) -> Any:
        engine = self.ready()
        if not isinstance(engine, ability):
            skip(f"the engine has no {method}")
        return engine


class EngineSuite(
    SlotChecks, StagingChecks, RefusalChecks, TransactionChecks, AbilityChecks, PastChecks
):
    """Every contract of :class:`refitkit.protocols.Engine` and of what engines may be able to do.

    Write ``make_engine`` and ``held``. Where any values will not do, write ``make_values``. With
    ``commit_fault`` and ``rollback_fault`` the way back is tried from where it is hardest.
    """
