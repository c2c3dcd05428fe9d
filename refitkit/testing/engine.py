"""The suite for engines: inherit :class:`EngineSuite`, and write a factory and an oracle.

The suite adds two groups to the checks of :mod:`refitkit.testing.engine_base`. Each check first
asks whether the engine declares the ability, and is skipped if it does not:

* :class:`AbilityChecks`: readback, remembered and staged values, partial refits, the spare buffer,
  warming, and memory.
* :class:`PastChecks`: previous values, and refits that overwrite weights without a rollback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.protocols import (
    HoldsPrevious,
    RemembersWeights,
    ShowsStaged,
    StagesGradually,
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
from refitkit.testing.oracles import NewMemory, other_dtypes, other_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from refitkit.model import Slot


_READ = "SupportsReadback.read"
_REMEMBERED = "RemembersWeights.remembered"
_STAGED = "ShowsStaged.staged"
_PARTIAL = "SupportsPartial.stage_partial"
_GRADUAL = "StagesGradually.begin_staging"
_SPARE = "SupportsSpareBuffer.free_spare"
_WARM = "SupportsWarming.warm"
_MEMORY = "Engine.memory"
_PREVIOUS = "HoldsPrevious.previous"
_OVER = "SupportsOverwrite.stage_over"
_SLACK = 512  # bytes for each slot: alignment
# A leak of one set of weights in each of six refits exceeds what any engine declares.
_REFITS = 6
_FIRST_REFITS = 2  # those after which an engine has all of its buffers


class AbilityChecks(EngineBase):
    """Abilities that the engine declares work; checks of other abilities are skipped."""

    # -- readback ---------------------------------------------------------------------------

    def test_slots_say_whether_they_can_be_read(self) -> None:
        """``Slot.readable`` is True exactly if the engine has ``read``."""
        engine = self.make_engine()
        readable = isinstance(engine, SupportsReadback)
        wrong = sorted(n for n, slot in engine.slots.items() if slot.readable is not readable)
        if wrong:
            has = "has" if readable else "lacks"
            found = f"the engine {has} read, but slots say otherwise: {oracles.quoted(wrong)}."
            raise Breach("Slot.readable", found, "Set it to whether the engine has read.")

    def test_what_is_read_is_what_is_held(self) -> None:
        """``read`` returns the live value in the slot's shape, in every state of a refit.

        The states: new, staged, committed and rolled back.
        """
        engine = self.ready_with(SupportsReadback, "read")
        self._require_read(engine, "before staging")
        staged = self.stage(engine, self.make_values(engine, B))
        self._require_read(engine, "after staging")
        staged.commit()
        self._require_read(engine, "after a commit")
        staged.rollback()
        self._require_read(engine, "after a rollback")

    def _require_read(self, engine: Any, when: str) -> None:
        held = self.snapshot(engine)
        for name, slot in engine.slots.items():
            read = engine.read(name)
            if oracles.bits(read) != held[name]:
                found = f"{when}, the value read from {name!r} is not the live value."
                raise Breach(_READ, found, "Always return the live value.")
            _require_shape(_READ, slot, read)

    def test_reading_copies_nothing(self) -> None:
        """``read`` returns an alias, but of slots that calls change: two reads are one memory."""
        engine = self.ready_with(SupportsReadback, "read")
        for name, slot in engine.slots.items():
            if slot.mutable:  # a copy is made between two calls; an alias could change in one
                continue
            # An alias has the same address each time. Empty tensors have none.
            if slot.count and engine.read(name).data_ptr() != engine.read(name).data_ptr():
                found = f"each read copies {name!r}."
                raise Breach(_READ, found, "Return an alias of the live value: callers copy it.")

    # -- remembered values, and staged values -----------------------------------------------

    def test_what_is_remembered_is_held(self) -> None:
        """``remembered`` returns the live value or None, in every state; after a commit, a value.

        The states: new, staged, committed, rolled back and discarded.
        """
        engine = self.make_engine()
        if not isinstance(engine, RemembersWeights):
            skip("the engine has no RemembersWeights.remembered")
        self._require_remembered(engine, "before any refit")
        self.stage(engine, self.make_values(engine, A)).discard()
        self._require_remembered(engine, "after a discard")
        self.commit(engine, self.make_values(engine, A))
        self._require_remembered(engine, "after a commit", known=True)
        staged = self.stage(engine, self.make_values(engine, B))
        self._require_remembered(engine, "after staging")
        staged.commit()
        self._require_remembered(engine, "after another commit", known=True)
        staged.rollback()
        self._require_remembered(engine, "after a rollback")

    def _require_remembered(self, engine: Any, when: str, *, known: bool = False) -> None:
        held = self.snapshot(engine)
        for name, slot in engine.slots.items():
            value = engine.remembered(name)
            # None is right until all slots are written, but not after a commit.
            if value is None and not known:
                continue
            if value is None or oracles.bits(value) != held[name]:
                found = f"{when}, the value remembered for {name!r} is not the live value."
                advice = "Return the live value; None only if you do not know it."
                raise Breach(_REMEMBERED, found, advice)
            _require_shape(_REMEMBERED, slot, value)

    def test_what_is_staged_is_shown(self) -> None:
        """``staged`` returns an alias of each new value before the commit; live values stay."""
        engine = self.ready()
        values = self.make_values(engine, B)
        before, wanted = self.snapshot(engine), oracles.snapshot(values)
        staged = self.stage(engine, values)
        if not isinstance(staged, ShowsStaged):
            skip("the StagedRefit has no ShowsStaged.staged")
        for name, slot in engine.slots.items():
            value = staged.staged(name)
            if oracles.bits(value) != wanted[name]:
                found = f"the value returned for {name!r} is not the one that was staged."
                raise Breach(_STAGED, found, "Return the value that commit would make live.")
            if slot.count and value.data_ptr() != staged.staged(name).data_ptr():
                found = f"each call copies {name!r}."
                raise Breach(_STAGED, found, "Return an alias: callers copy it.")
            _require_shape(_STAGED, slot, value)
        advice = "Return values without changing any."
        self.require_bits(engine, before, _STAGED, "after the calls", advice)
        staged.commit()
        self.require_bits(engine, wanted, _STAGED, "after the calls and a commit", advice)

    # -- partial refits ---------------------------------------------------------------------

    def test_a_partial_refit_leaves_all_other_slots(self) -> None:
        """A refit of any one slot leaves every bit of the others, also after other refits."""
        engine = self.ready_with(SupportsPartial, "stage_partial")
        for name, slot in engine.slots.items():
            before = self.snapshot(engine)
            value = self.make_values(engine, C)[name]
            staged = self.stage_partial(engine, [oracles.slot_value(slot, value)])
            advice = "Keep new values in memory of their own until commit."
            self.require_bits(engine, before, _PARTIAL, f"after {name!r} was staged", advice)
            staged.commit()
            wanted = {**before, name: oracles.bits(value)}
            advice = "Change the given slots only; copy the others from the live values."
            self.require_bits(engine, wanted, _PARTIAL, f"after a refit of {name!r} alone", advice)
            # A whole refit in between: an engine with two sets of weights must not revive the
            # old values of its inactive set.
            self.commit(engine, self.make_values(engine, B))

    def test_a_partial_refit_can_be_taken_back(self) -> None:
        """After a partial refit and its rollback every bit is as before, for each slot in turn."""
        engine = self.ready_with(SupportsPartial, "stage_partial")
        for name, slot in engine.slots.items():
            before = self.snapshot(engine)
            value = oracles.slot_value(slot, self.make_values(engine, C)[name])
            staged = self.stage_partial(engine, [value])
            staged.commit()
            staged.rollback()
            advice = "Save the old values of the given slots."
            when = f"after a rollback of a refit of {name!r} alone"
            self.require_bits(engine, before, "StagedRefit.rollback", when, advice)

    def test_a_partial_refit_follows_one_that_was_discarded(self) -> None:
        """Discarded values do not come back with the next partial refit."""
        engine = self.ready_with(SupportsPartial, "stage_partial")
        wanted = self.snapshot(engine)
        for name, slot in engine.slots.items():
            self.stage(engine, self.make_values(engine, B)).discard()
            value = self.make_values(engine, C)[name]
            self.stage_partial(engine, [oracles.slot_value(slot, value)]).commit()
            wanted = {**wanted, name: oracles.bits(value)}
            when = f"after a refit of {name!r} alone that followed a discarded one"
            advice = "Let the other slots keep their live values, not staged ones."
            self.require_bits(engine, wanted, _PARTIAL, when, advice)

    def test_a_partial_refit_refuses_what_does_not_fit(self) -> None:
        """Like ``stage``: wrong dtypes and shapes, unknown names, and repeated names."""
        engine = self.ready_with(SupportsPartial, "stage_partial")
        before = self.snapshot(engine)
        for name, slot in engine.slots.items():
            value = self.make_values(engine, B)[name]
            good = oracles.slot_value(slot, value)
            unknown = slot.model_copy(update={"name": "no such slot"})
            other_name = oracles.slot_value(unknown, value)
            refused = [
                (f"a refit with two values for {name!r}", [good, good]),
                (f"the value of {name!r} under an unknown name", [other_name]),
            ]
            for other in (*other_dtypes(value), *other_shapes(slot, value)):
                what = f"a value of {other.dtype} and shape {tuple(other.shape)} for {name!r}"
                refused.append((what, [oracles.slot_value(slot, other)]))
            for what, values in refused:
                with refusal(_PARTIAL, what, "Check values as stage does."):
                    self.stage_partial(engine, values).commit()
                advice = "Check all values before writing any."
                self.require_bits(engine, before, _PARTIAL, f"after {what} was refused", advice)

    # -- values that arrive -----------------------------------------------------------------

    def test_values_that_arrive_one_by_one_are_those_of_one_refit(self) -> None:
        """Values that are added in any order, and overwritten afterwards, are staged exactly."""
        engine = self.ready_with(StagesGradually, "begin_staging")
        for seed in (C, B):
            before, values = self.snapshot(engine), self.make_values(engine, seed)
            wanted = oracles.snapshot(values)
            filling = engine.begin_staging(list(engine.slots))
            for name in reversed(list(engine.slots)):
                filling.add([oracles.slot_value(engine.slots[name], values[name])])
                values[name].copy_(values[name].clone().zero_())
            advice = "Keep new values in memory of their own until commit."
            self.require_bits(engine, before, _GRADUAL, "before the commit", advice)
            staged: Any = filling.finish()
            commit, rollback = staged.commit, staged.rollback
            if not isinstance(staged, ShowsStaged):
                found = "what finish returns has no staged()."
                raise Breach(_GRADUAL, found, "Let it show its values: verifiers read them.")
            shown = staged.staged
            wrong = [n for n in engine.slots if oracles.bits(shown(n)) != wanted[n]]
            if wrong:
                found = f"staged() returns other values for {oracles.quoted(wrong)}."
                raise Breach(_GRADUAL, found, "Copy each value in add: its memory is used again.")
            commit()
            self.require_bits(engine, wanted, _GRADUAL, "after a gradual refit", advice)
            rollback()
            advice = "Save the old values of all slots."
            self.require_bits(engine, before, "StagedRefit.rollback", "after a rollback", advice)
            self.commit(engine, self.make_values(engine, A))

    def test_some_values_that_arrive_leave_the_other_slots(self) -> None:
        """Slots that ``begin_staging`` does not name keep their live values."""
        engine = self.ready_with(StagesGradually, "begin_staging")
        for name, slot in engine.slots.items():
            before, value = self.snapshot(engine), self.make_values(engine, C)[name]
            filling = engine.begin_staging([name])
            filling.add([oracles.slot_value(slot, value)])
            filling.finish().commit()
            wanted = {**before, name: oracles.bits(value)}
            advice = "Copy the slots that are not named from the live values."
            when = f"after a gradual refit of {name!r} alone"
            self.require_bits(engine, wanted, _GRADUAL, when, advice)
            self.commit(engine, self.make_values(engine, B))

    def test_values_that_stopped_arriving_leave_nothing(self) -> None:
        """After ``discard`` the live values are as before, and the next refit is exact."""
        engine = self.ready_with(StagesGradually, "begin_staging")
        before, values = self.snapshot(engine), self.make_values(engine, C)
        for count in range(len(engine.slots) + 1):
            filling = engine.begin_staging(list(engine.slots))
            for name in list(engine.slots)[:count]:
                filling.add([oracles.slot_value(engine.slots[name], values[name])])
            filling.discard()
            advice = "Keep new values in memory of their own until commit."
            when = f"after {count} of {len(engine.slots)} values and discard"
            self.require_bits(engine, before, _GRADUAL, when, advice)
        after = self.make_values(engine, B)
        wanted = oracles.snapshot(after)
        self.commit(engine, after)
        advice = "Drop what has arrived."
        self.require_bits(engine, wanted, _GRADUAL, "after the next refit", advice)

    # -- the spare buffer -------------------------------------------------------------------

    def test_the_spare_buffer_can_be_freed(self) -> None:
        """``free_spare`` after two refits returns the freed bytes, and 0 when called again.

        Live values stay, and the next refit and its rollback are right.
        """
        engine = self.ready_with(SupportsSpareBuffer, "free_spare")
        self.commit(engine, self.make_values(engine, B))
        before = self.snapshot(engine)
        # After two refits every engine with a spare buffer has allocated it.
        freed, again = engine.free_spare(), engine.free_spare()
        if not isinstance(freed, int) or freed <= 0 or again != 0:
            found = f"after two refits it returned {freed!r}, and then {again!r}."
            advice = "Return the number of freed bytes: more than 0, then 0."
            raise Breach(_SPARE, found, advice)
        advice = "Free only memory that has no live values."
        self.require_bits(engine, before, _SPARE, "after the call", advice)
        values = self.make_values(engine, C)
        wanted = oracles.snapshot(values)
        staged = self.commit(engine, values)
        advice = "Allocate the buffer again when a refit needs it."
        self.require_bits(engine, wanted, _SPARE, "in the next refit", advice)
        staged.rollback()
        self.require_bits(engine, before, _SPARE, "after a rollback of the next refit", advice)

    # -- warming ----------------------------------------------------------------------------

    def test_warming_changes_nothing(self) -> None:
        """``warm`` keeps the weights of a new and of a refitted engine; later refits are right."""
        # A new engine may not know its weights, so it may take another path than a refitted one.
        for engine, which in (
            (self.make_engine(), "a new engine"),
            (self.ready(), "a refitted engine"),
        ):
            if not isinstance(engine, SupportsWarming):
                skip("the engine has no warm")
            before = self.snapshot(engine)
            messages: list[Any] = []
            engine.warm(messages.append)
            wrong = [message for message in messages if not isinstance(message, str)]
            if wrong:
                found = f"with {which} it called progress with {wrong[0]!r}."
                raise Breach(_WARM, found, "Report progress as text.")
            advice = "Write only values that are live already."
            self.require_bits(engine, before, _WARM, f"after warming {which}", advice)
            values = self.make_values(engine, C)
            wanted = oracles.snapshot(values)
            self.commit(engine, values)
            when = f"in the refit after warming {which}"
            self.require_bits(engine, wanted, _WARM, when, "Leave no state behind.")

    # -- memory -----------------------------------------------------------------------------

    def test_staging_keeps_no_more_than_it_says(self) -> None:
        """Staging allocates at most the new values plus the bytes that ``memory`` declares."""
        engine = self.ready()
        limit = self._memory_limit(engine)
        values = self.make_values(engine, B)
        with NewMemory() as memory:
            staged = self.stage(engine, values)
        # Measure before discard: the staged values count, too.
        kept = memory.kept()
        staged.discard()
        if kept > limit:
            found = f"staging allocated {kept} bytes; the limit is {limit} (the declared bytes "
            found += "and the new values)."
            raise Breach(_MEMORY, found, "Allocate less, or declare more.")

    def test_refits_do_not_pile_up(self) -> None:
        """Six refits keep no more memory than one, and the last ones no more than the first."""
        engine = self.ready()
        limit = self._memory_limit(engine)
        sets = [self.make_values(engine, seed) for seed in (A, B)]
        with NewMemory() as memory:
            for number in range(_REFITS):
                self.commit(engine, sets[number % 2])
                if number + 1 == _FIRST_REFITS:
                    first = memory.kept()
        kept = memory.kept()
        # The slack of the limit hides a leak of small weights. What grows with each refit shows.
        size, more = sum(slot.nbytes for slot in engine.slots.values()), _REFITS - _FIRST_REFITS
        if kept - first > size * more // 2:
            found = f"the last {more} of {_REFITS} refits kept {kept - first} bytes more; one set "
            found += f"of weights has {size}."
            raise Breach(_MEMORY, found, "Free what only earlier refits needed.")
        if kept > limit:
            found = f"{_REFITS} refits kept {kept} bytes; the limit is {limit} (the declared "
            found += "bytes and the new values)."
            raise Breach(_MEMORY, found, "Free what only earlier refits needed.")

    @staticmethod
    def _memory_limit(engine: Any) -> int:
        new: int = sum(slot.nbytes + _SLACK for slot in engine.slots.values())
        declared: int = engine.memory.bytes
        return declared + new


def _require_shape(contract: str, slot: Slot, value: torch.Tensor) -> None:
    if slot.shape is not None and tuple(value.shape) != slot.shape:
        found = f"the value of {slot.name!r} has shape {tuple(value.shape)}, not {slot.shape}."
        raise Breach(contract, found, "Return it in the shape of its slot.")


class PastChecks(EngineBase):
    """Previous values are right, and overwriting works without a second set of weights.

    Checks of abilities that the engine does not declare are skipped.
    """

    # -- previous values --------------------------------------------------------------------

    def test_previous_values_are_those_before_the_last_commit(self) -> None:
        """After a commit ``previous`` returns all old values; later only right ones, or none."""
        engine = self.ready_with(HoldsPrevious, "previous")
        before = self.snapshot(engine)
        staged = self.commit(engine, self.make_values(engine, B))
        lacking = sorted(before.keys() - engine.previous().keys())
        if lacking:
            found = f"after a commit it lacks changed slots: {oracles.quoted(lacking)}."
            raise Breach(_PREVIOUS, found, "Return all old values, or do not implement it.")
        self._require_previous(engine, before, "after a commit")
        self.stage(engine, self.make_values(engine, C)).discard()
        self._require_previous(engine, before, "after other values were staged and discarded")
        self.stage(engine, self.make_values(engine, B)).commit()
        staged = self.commit(engine, self.make_values(engine, C))
        wanted = oracles.snapshot(self.make_values(engine, B))
        self._require_previous(engine, wanted, "one refit later")
        staged.rollback()
        self._require_no_previous(engine, "after a rollback")

    def test_no_previous_values_where_there_are_none(self) -> None:
        """``previous`` is empty for a new engine, and after the spare buffer is freed."""
        engine: Any = self.make_engine()
        if not isinstance(engine, HoldsPrevious):
            skip("the engine has no previous")
        self._require_no_previous(engine, "before any refit")
        if isinstance(engine, SupportsSpareBuffer):
            for seed in (A, B):
                self.commit(engine, self.make_values(engine, seed))
            engine.free_spare()
            # The previous values were in the spare buffer.
            self._require_no_previous(engine, "after the spare buffer was freed")

    def test_previous_values_can_be_staged(self) -> None:
        """Values of ``previous`` can be staged again and arrive bit for bit, twice in a row.

        Undo works this way: from B back to A, and then from A to B.
        """
        engine = self.ready_with(HoldsPrevious, "previous")
        first = self.snapshot(engine)
        self.commit(engine, self.make_values(engine, B))
        second = self.snapshot(engine)
        for wanted in (first, second):
            self.commit(engine, engine.previous())
            advice = "Copy values before reusing their memory: they must last until stage returns."
            self.require_bits(engine, wanted, _PREVIOUS, "after they were staged", advice)

    def _require_previous(self, engine: Any, wanted: Mapping[str, oracles.Bits], when: str) -> None:
        previous = oracles.snapshot(engine.previous())
        wrong = [name for name, found in previous.items() if found != wanted.get(name)]
        if wrong:
            found = f"{when}, it returned values that were not live before: "
            found += f"{oracles.quoted(wrong)}."
            raise Breach(_PREVIOUS, found, "Leave out values that were overwritten since.")

    @staticmethod
    def _require_no_previous(engine: Any, when: str) -> None:
        previous = sorted(engine.previous())
        if previous:
            found = f"{when}, it returned values for {oracles.quoted(previous)}."
            raise Breach(_PREVIOUS, found, "Return nothing if there is no commit to undo.")

    # -- overwriting without a rollback -----------------------------------------------------

    def test_overwriting_begins_at_the_commit(self) -> None:
        """``stage_over`` writes nothing before ``commit``, and can be discarded or rolled back.

        A rollback after the commit is refused.
        """
        engine = self.ready_with(SupportsOverwrite, "stage_over")
        before = self.snapshot(engine)
        values = self.make_values(engine, B)
        advice = "Write at the commit, not before it."
        self._stage_over(engine, values).discard()
        self.require_bits(engine, before, _OVER, "after a discard", advice)
        staged = self._stage_over(engine, values)
        self.require_bits(engine, before, _OVER, "after staging", advice)
        staged.rollback()
        self.require_bits(engine, before, _OVER, "after a rollback without a commit", advice)
        staged = self._stage_over(engine, values)
        staged.commit()
        wanted = oracles.snapshot(values)
        self.require_bits(engine, wanted, _OVER, "after a commit", "Write the given values.")
        advice = "Refuse it: the old values are gone."
        with refusal("StagedRefit.rollback", "a rollback after overwriting", advice):
            staged.rollback()

    def test_overwriting_some_leaves_the_others(self) -> None:
        """Overwriting any one slot leaves the others; later refits and rollbacks are right."""
        engine = self.ready_with(SupportsOverwrite, "stage_over")
        for name, slot in engine.slots.items():
            value = self.make_values(engine, C)[name]
            wanted = {**self.snapshot(engine), name: oracles.bits(value)}
            engine.stage_over([oracles.slot_value(slot, value)]).commit()
            when = f"after {name!r} alone was overwritten"
            self.require_bits(engine, wanted, _OVER, when, "Leave all other slots as they are.")
        before = self.snapshot(engine)
        staged = self.commit(engine, self.make_values(engine, B))
        staged.rollback()
        when = "after the next refit and its rollback"
        self.require_bits(engine, before, _OVER, when, "Leave no state behind.")

    def test_overwriting_refuses_names_that_are_not_its_own(self) -> None:
        """``stage_over`` refuses unknown and repeated names before it writes anything."""
        engine = self.ready_with(SupportsOverwrite, "stage_over")
        before = self.snapshot(engine)
        name, slot = next(iter(engine.slots.items()))
        good = oracles.slot_value(slot, self.make_values(engine, B)[name])
        unknown_slot = slot.model_copy(update={"name": "no such slot"})
        unknown = oracles.slot_value(unknown_slot, good.load())
        for what, values in (("a repeated name", [good, good]), ("an unknown name", [unknown])):
            with refusal(_OVER, what, "Check names as stage does."):
                engine.stage_over(values)
            advice = "Check all names before writing any value."
            self.require_bits(engine, before, _OVER, f"after {what} was refused", advice)

    def test_overwriting_needs_no_second_set(self) -> None:
        """Overwriting keeps no second set of weights in memory.

        The limit is the largest slot, plus a quarter of all weights, plus alignment.
        """
        engine = self.ready_with(SupportsOverwrite, "stage_over")
        # An engine could reuse its spare buffer, and NewMemory counts only new memory.
        if isinstance(engine, SupportsSpareBuffer):
            engine.free_spare()
        values = self.make_values(engine, B)
        slots = engine.slots.values()
        limit = max(slot.nbytes for slot in slots)
        limit += sum(slot.nbytes // 4 + _SLACK for slot in slots)
        with NewMemory() as memory:
            self._stage_over(engine, values).commit()
        kept = memory.kept()
        if kept > limit:
            size = sum(slot.nbytes for slot in slots)
            found = f"it kept {kept} more bytes; one set of weights has {size}."
            raise Breach(_OVER, found, "Free the second set, and allocate no other.")

    @staticmethod
    def _stage_over(engine: Any, values: Mapping[str, Any]) -> Any:
        return engine.stage_over(oracles.slot_values(engine.slots, values))


class EngineSuite(
    SlotChecks, StagingChecks, RefusalChecks, TransactionChecks, AbilityChecks, PastChecks
):
    """Every contract of :class:`refitkit.protocols.Engine` and of its optional abilities.

    Write ``make_engine`` and ``held``. Write ``make_values`` if the engine does not accept random
    values. Write ``commit_fault`` and ``rollback_fault`` to check rollbacks of failed commits.
    """
