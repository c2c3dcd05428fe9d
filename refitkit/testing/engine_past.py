"""Checks of engines that hold earlier values, or can do without a way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.protocols import HoldsPrevious, SupportsOverwrite, SupportsSpareBuffer
from refitkit.testing import oracles
from refitkit.testing.breach import Breach, refusal, skip
from refitkit.testing.engine_base import A, B, C, EngineBase
from refitkit.testing.memory import NewMemory

if TYPE_CHECKING:
    from collections.abc import Mapping

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


