"""Checks of the way in and the way back: changed, commit, rollback, discard."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from refitkit.errors import ModuleLostError, RefitError
from refitkit.testing import oracles
from refitkit.testing.breach import Breach, skip
from refitkit.testing.engine_base import B, C, EngineBase
from refitkit.testing.scenes import EngineScene

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
