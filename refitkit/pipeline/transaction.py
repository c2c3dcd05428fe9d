"""The transaction of a refit: stage, commit, verify and, if anything fails, roll back.

Read ``Transaction`` first. It holds one ``ModuleTransaction`` for each module, and drives all of
them through the same steps. Either ``run`` returns, and all modules have their new weights and were
verified; or it raises, and all modules have their old weights again. The one exception is a
``ModuleLostError``: the old weights of a module could not be restored, so it refuses calls.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

from refitkit.errors import (
    EngineError,
    ModuleLostError,
    NotRefittableError,
    RefitError,
    VerificationError,
    WeightMismatchError,
    raised_as,
)
from refitkit.model import EngineRoute
from refitkit.pipeline.changes import measured
from refitkit.pipeline.checks import FiniteCheck
from refitkit.pipeline.gate import in_lock_order, inside_all, lost_error, restoring
from refitkit.pipeline.history import NO_ROLLBACK, History, SnapshotBuilder
from refitkit.pipeline.mapping import grouped
from refitkit.pipeline.stage import Staged, publishes
from refitkit.pipeline.transform import require_accurate
from refitkit.pipeline.verify import problems_of
from refitkit.protocols import OpensStaged, OrdersCalls, TellsRoute

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from refitkit.model import KeptWeights
    from refitkit.pipeline.context import Context
    from refitkit.pipeline.gate import Gate
    from refitkit.pipeline.history import WeightState
    from refitkit.pipeline.mapping import SlotMapping
    from refitkit.pipeline.module import CompiledModule
    from refitkit.pipeline.report import Outcome, ReportDraft
    from refitkit.pipeline.verify import Judge
    from refitkit.protocols import OpenedModule, StagedRefit
    from refitkit.recipe import RefitPlan

Failure = TypeVar("Failure", bound=RefitError)

_CHANGED = "refitkit_weights_changed"
_FAILED_WORK = "Pending work of the module failed"
_COMPLETE = "The refit was complete when it was interrupted: the new weights are live."
_LAST_ATTEMPT = (False, False, True)
"""An interrupted rollback is tried three times: users often press Ctrl-C twice."""


@dataclass(frozen=True)
class Prepared:
    """All that is known of one module's refit before anything is staged.

    Attributes:
        draft: The facts for the report. Its ``mapping`` has the values to write.
        plan: The plan that is followed.
        judge: Verifies the module after the commit; None if nothing verifies it.
        all_values: Gives values of all slots, also of unchanged ones, for engines that lost those.
        state_after: Gives the module's state, but for the history, once these values are live.
        require_read: Called once all is staged. Raises if the source changed while it was read.
        partial: Whether slots without a value keep theirs.
        rollback: Whether the old weights are kept until the verdict.
        check_finite: Whether new values have to be finite wherever the present ones are.
        name_weights: Raises if weights do not fit; names them. Called if an engine refuses a slot.
        done: Called once, after the commit or the failure. Nothing is read after it.
        received: Gives what engines staged as values arrived, by their names.
    """

    draft: ReportDraft
    plan: RefitPlan
    judge: Judge | None
    all_values: Callable[[], SlotMapping]
    state_after: Callable[[SlotMapping], WeightState]
    require_read: Callable[[], None] = lambda: None
    partial: bool = False
    rollback: bool = True
    check_finite: bool = False
    name_weights: Callable[[], None] = lambda: None
    done: Callable[[], None] = lambda: None
    received: Callable[[], Mapping[str, StagedRefit]] = dict


class Transaction:
    """Staged modules on their way to their new weights, or back to the old ones."""

    def __init__(self, modules: Sequence[ModuleTransaction]) -> None:
        """Take modules whose values are staged, in the order in which they are committed."""
        self._modules = modules

    def run(self) -> None:
        """Commit and verify all modules.

        Calls wait meanwhile, unless there is one module that publishes and no hook is notified.
        A module that publishes was verified before, so calls wait for commits and hooks alone, and
        running calls go on.

        From the first commit until it is certain which weights are live, closed gates are poisoned.
        An interrupt in that time restores the old weights. An interrupt during the restoring starts
        it again; if all attempts are interrupted, the modules refuse calls.

        Raises:
            EngineError: An engine failed to commit; the old weights are live.
            VerificationError: The verdict was bad; the old weights are live.
            ModuleLostError: Rolling back failed; the modules concerned refuse calls.
            BaseException: A plugin or the keyboard; the old weights are live, unless a note says
                that the refit was complete.
        """
        passages = self._passages()
        for one in self._modules:
            one.named(one.drain)
        start = perf_counter()
        try:
            inside_all(passages, self._run)
        finally:
            pause = perf_counter() - start if passages else 0.0
            for one in self._modules:
                one.draft.pause_seconds = pause
        self._settle()

    def _settle(self) -> None:
        """Wait until all commits have ended. An interrupt is raised then, and says what is live."""
        interrupt: BaseException | None = None
        for one in self._modules:
            for last in _LAST_ATTEMPT:
                try:
                    one.settle()
                    break
                except Exception:
                    raise
                except BaseException as exc:
                    if last:
                        raise
                    interrupt = exc
        if interrupt is not None:
            interrupt.add_note(_COMPLETE)
            raise interrupt

    def _passages(self) -> list[Callable[[Callable[[], None]], None]]:
        """How the gates are entered; none if no call has to wait."""
        if len(self._modules) == 1 and not self._modules[0].stops_calls:
            return []
        by_gate = {one.gate: one for one in self._modules}
        # all gates before the first commit: no call may see one module new and another one old
        gates = in_lock_order(by_gate)
        return [gate.closed if by_gate[gate].publishes else gate.exclusive for gate in gates]

    def _run(self) -> None:
        try:
            self._forward()
        except BaseException as exc:
            # Nothing is called here but _back: CPython could raise an interrupt behind a call.
            interrupt: BaseException | None = None
            for last in _LAST_ATTEMPT:
                try:
                    self._back(exc, last=last)
                    break
                except Exception:
                    raise
                except BaseException as again:  # noqa: BLE001 - raised once the weights are back
                    interrupt = again
            if interrupt is not None:
                raise interrupt from exc
            raise

    def _forward(self) -> None:
        for one in self._modules:
            # all modules before any commit: pending work can fail, and nothing has changed yet
            one.named(one.synchronize)
        if self._passages():
            for one in self._modules:  # an interrupt from here on must leave none half changed
                one.gate.poison("a commit was interrupted")
        for one in self._modules:
            one.named(one.commit)
        for one in self._modules:
            one.named(one.committed)
        for one in self._modules:  # all have their new weights, so plugins can compare them
            one.named(one.conclude)
        for one in self._modules:
            one.gate.heal()

    def _back(self, cause: BaseException, *, last: bool) -> None:
        """Restore all old weights; poison each module where that fails.

        Args:
            cause: Why.
            last: Whether an interrupt counts as a failure. Otherwise it is raised, to begin again.
        """
        lost: list[ModuleLostError] = []
        for one in reversed(self._modules):
            failure = one.roll_back(last=last)
            if failure is None:
                one.gate.heal()
                continue
            one.gate.poison(failure)
            lost.append(one.naming(lost_error(failure)))
        if lost:
            for error in lost:
                error.add_note(f"The rollback was because of: {type(cause).__name__}: {cause}")
            if len(lost) > 1:
                names = ", ".join(one.name for one in self._modules if one.gate.lost)
                lost[0].add_note(f"{len(lost)} modules were lost: {names}.")
            # keeps its own cause, the failure of the rollback; the note has the other one
            raise lost[0] from lost[0].__cause__


class ModuleTransaction:
    """One module's part in a transaction.

    Attributes:
        name: Name of the module in errors; empty if the transaction has one module only.
        draft: The facts for the report, closed once the verdict is good.
    """

    def __init__(
        self, context: Context, compiled: CompiledModule, prepared: Prepared, name: str = ""
    ) -> None:
        """Stage nothing yet."""
        self.name, self.draft = name, prepared.draft
        self._host, self._config = context.host, context.config
        self._compiled, self._module, self._prepared = compiled, compiled.opened, prepared
        self._orders = self._module if isinstance(self._module, OrdersCalls) else None
        self._before = compiled.state
        self._snapshot: SnapshotBuilder | None = None
        self._staged = Staged(self._module, partial(context.whose, self._module))
        self._touched: list[tuple[str, StagedRefit]] = []  # engines that may have new weights
        self._begun = False
        self._failure: BaseException | None = None
        self._finite: FiniteCheck | None = None
        if prepared.check_finite:
            overwrite = not prepared.rollback
            self._finite = FiniteCheck(self._module, prepared.plan, overwrite=overwrite)

    @property
    def gate(self) -> Gate:
        """The module's gate."""
        return self._compiled.gate

    @property
    def publishes(self) -> bool:
        """Whether running calls are not affected by the commit; see ``OpensStaged``."""
        return publishes(self._module) and not self._staged.overwrites

    @property
    def stops_calls(self) -> bool:
        """Whether new calls have to wait for the commit, if no other module is committed."""
        return not self.publishes or self._host.has(_CHANGED)

    # -- errors -------------------------------------------------------------------------------

    def named(self, step: Callable[[], None]) -> None:
        """Take a step. If it raises a RefitError, name the module in it."""
        try:
            step()
        except RefitError as exc:
            self.naming(exc)
            raise

    def naming(self, error: Failure) -> Failure:
        """The error, with the module's name in its message and problems."""
        if self.name:
            error.message = f"{self.name[0].upper()}{self.name[1:]}: {error.message}"
            error.problems = tuple(
                replace(problem, subject=f"{self.name}: {problem.subject}")
                for problem in error.problems
            )
        return error

    # -- before the commit: the old weights serve ----------------------------------------------

    def stage(self) -> None:
        """Stage all new values, check them, and copy the old values that are kept.

        Raises:
            RefitError: An engine refuses or fails, or a computed value is too inexact or not
                finite.
        """
        draft = self.draft
        self.settle()  # an interrupt may have ended the last refit before its commit
        with draft.clock.stage("stage"):
            try:
                self._fill_all()
            except WeightMismatchError:
                self._prepared.name_weights()  # an engine can name slots only
                raise
            # after staging, which reads the source: all staged values must be of one version
            self._prepared.require_read()
            written = self._mapping.values
            if self._finite is not None:
                self._finite.require(self._staged, written)
            draft.changes = measured(self._config, self._module, self._staged, written)
            # if a measured slot differs, the two sets need no full comparison
            draft.changed = draft.changes.differ or self._staged.changed()
            draft.memory = self._staged.memory()
            if self._prepared.rollback:
                self._snapshot = SnapshotBuilder(
                    self._module,
                    self._before,
                    written,
                    self._config,
                    with_base=self._wants_base,
                )
        # only now: a transform computes, and measures its error, when an engine reads the value
        with self._reporting():
            require_accurate(draft.transforms())

    @property
    def _mapping(self) -> SlotMapping:
        mapping = self.draft.mapping
        if mapping is None:
            raise RuntimeError("nothing is staged before it is mapped")
        return mapping

    def _fill_all(self) -> None:
        """Stage what changed; everything if an engine lost what the others hold."""
        mapping = self._mapping
        keeping = {engine for engine, _ in (*mapping.unchanged, *mapping.kept)}
        try:
            self._fill_keeping(keeping)
        # the engine does not know its live values, so it cannot keep some of them
        except NotRefittableError:
            if self._prepared.partial or not mapping.unchanged:
                raise
            # engines before the one that refused have staged, and would stage twice
            self._staged.discard()
            self.draft.mapping = self._prepared.all_values()
            self._fill_keeping({engine for engine, _ in self._mapping.kept})

    def _fill_keeping(self, keeping: Collection[str]) -> None:
        """Stage all values. Engines of these names keep the slots that have no value."""
        mapping, partial = self._mapping, self._prepared.partial
        staged = self._prepared.received()
        for name, one in staged.items():
            self._staged.adopt(name, one)
        watched = None if self._finite is None else self._finite.watched(mapping.values)
        by_engine = mapping.by_engine if watched is None else grouped(watched)
        # those that keep some of their values come last, as they may refuse
        for name, values in sorted(by_engine.items(), key=lambda item: item[0] in keeping):
            if name in staged:
                continue
            self._staged.fill(
                name,
                values,
                partial=partial or name in keeping,
                overwrite=not self._prepared.rollback,
            )

    @property
    def _wants_base(self) -> bool:
        """Whether only copies can restore the first weights, and the settings ask for them."""
        elsewhere = self._compiled.base is not None or self._compiled.origin is not None
        return self._config.keep_base and self._prepared.rollback and not elsewhere

    def verify_staged(self) -> None:
        """Verify the staged values, if the module can be called with them before the commit.

        Raises:
            VerificationError: The verdict is bad.
        """
        module = self._module
        if self.publishes and isinstance(module, OpensStaged):
            self._verify(module.with_staged(dict(self._staged.waiting())), "were never live")

    def _verify(self, module: OpenedModule, otherwise: str) -> None:
        """Judge a module.

        Args:
            module: The module, with its new weights.
            otherwise: What happens to them if the verdict is bad.
        """
        judge = self._prepared.judge
        if judge is None:
            return
        with self._reporting():
            with self.draft.clock.stage("verify"):
                self.draft.verification = judge(module)
            if not self.draft.verification.ok:
                raise VerificationError(
                    f"The refitted module failed the verification; {otherwise}.",
                    problems=problems_of(self.draft.verification),
                )

    def discard(self) -> None:
        """Drop the values that are staged and were not committed, and the source."""
        self._staged.discard()
        self._prepared.done()

    # -- from the commit to the verdict: calls wait ----------------------------------------------

    def drain(self) -> None:
        """Wait for work that calls left pending, if that need not be done behind the gate."""
        if self._orders is not None and not self.publishes:
            with raised_as(EngineError, _FAILED_WORK):
                self._module.synchronize()

    def settle(self) -> None:
        """Wait until the commit has ended on the device, while calls go on.

        Raises:
            ModuleLostError: The device failed, so nobody knows what it holds.
        """
        if self._orders is not None:
            try:
                self._orders.settle()
            except Exception as exc:
                self.gate.poison(exc)
                raise self.naming(lost_error(exc)) from exc

    def synchronize(self) -> None:
        """Let the device's pending work end first, and copy the state that calls have written."""
        if self.publishes:
            return
        with raised_as(EngineError, _FAILED_WORK):
            if self._orders is not None:
                self._orders.order()
            else:
                self._module.synchronize()
        with raised_as(EngineError, "The state that calls have written cannot be copied"):
            if self._snapshot is not None:
                self._snapshot.copy_mutable()

    def commit(self) -> None:
        """Make the staged values live, engine by engine."""
        with self.draft.clock.stage("commit"):
            for name, one in self._staged.take():
                self._begun = True
                # noted before the call: an engine that fails half-way must be rolled back, too
                self._touched.append((name, one))
                with raised_as(EngineError, f"The engine {name!r} failed to commit"):
                    one.commit()

    def committed(self) -> None:
        """Have the device make later calls wait for the commit."""
        if self._orders is not None:
            with raised_as(EngineError, "The commit cannot be put in order"):
                self._orders.committed()

    def conclude(self) -> None:
        """Notify plugins, verify what was not verified yet, and store the module's new state.

        Raises:
            VerificationError: The verdict is bad.
        """
        # also if nothing was committed: plugins that are notified must be notified of a rollback
        self._begun = True
        # computed before plugins are notified: their report names the versions that can be restored
        after = self._state_after()
        self.draft.kept = self._restorable(after.history)
        if self._wants_base and not self._before.history.base_lost:
            self.draft.base_lost = after.history.base_lost
        self._notify("committed")
        if not self.publishes:
            self._verify(self._module, "its old weights are back")
        self.draft.routes = routes_of(self._module)
        if isinstance(self._module, OpensStaged) and not self.publishes:
            self.draft.waited_for = self._written_by_calls()
        # the last two steps: an exception after them finds a completed refit
        self.draft.close()
        self._compiled.state = after

    def _written_by_calls(self) -> tuple[str, ...]:
        slots = self._compiled.slots
        return tuple(slot.name for slot in slots if slot.mutable)

    def _state_after(self) -> WeightState:
        state = self._prepared.state_after(self._mapping)
        return replace(state, source=self.draft.source, history=self._history_after())

    def _history_after(self) -> History:
        if self._snapshot is not None:
            return self._snapshot.after(self._prepared.plan)
        before = self._before.history
        return History(
            base_lost=NO_ROLLBACK,
            written=before.written | self._mapping.values.keys(),
            plan=self._prepared.plan,
            overridden=before.overridden,
            label=before.label,
        )

    # -- rollback ----------------------------------------------------------------------------

    def roll_back(self, *, last: bool) -> BaseException | None:
        """Restore the old weights.

        After an interrupt it continues where it was: an engine is tried again unless its rollback
        returned or failed.

        Args:
            last: Whether an interrupt counts as a failure. Otherwise it is raised.

        Returns:
            The last failure; None if all went well.
        """
        while self._touched:
            try:
                self._touched[-1][1].rollback()
            except BaseException as exc:
                if not last and not isinstance(exc, Exception):
                    raise
                self._failure = exc
            # popped only now: an interrupt in rollback() has to try the same engine again
            self._touched.pop()
        # after a failed rollback the weights are unknown, so nothing is reported as restored
        if self._failure is None and self._begun:
            try:
                restoring(self._restored)
            except BaseException as exc:
                if not last and not isinstance(exc, Exception):
                    raise
                self._failure = exc
            else:
                self._begun = False
        return self._failure

    def _restored(self) -> None:
        """Store the old state again, and notify plugins."""
        self._compiled.state = self._before
        self._note_old_history()
        self._notify("rolled-back")

    def _note_old_history(self) -> None:
        """Report the old history, without what engines had: the attempt has used that up."""
        self.draft.kept = self._restorable(self._before.history, engines_spent=True)
        self.draft.base_lost = ""

    def _restorable(
        self, history: History, *, engines_spent: bool = False
    ) -> tuple[KeptWeights, ...]:
        return history.restorable(
            self._compiled.origin,
            has_named_base=self._compiled.base is not None,
            engines_spent=engines_spent,
        )

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Attach the report of the attempt to a VerificationError."""
        try:
            yield
        except VerificationError as exc:
            self._note_old_history()
            exc.report = self.draft.report("rolled-back")
            raise

    def _notify(self, outcome: Outcome) -> None:
        if self._host.has(_CHANGED):  # a report takes time, and most pipelines lack the hook
            self._host.call(_CHANGED, module=self._module, report=self.draft.report(outcome))


def routes_of(module: OpenedModule) -> tuple[EngineRoute, ...]:
    """The ways in which engines get their weights, of those that have several and can tell."""
    found = []
    for name, engine in module.engines.items():
        # what a report says must not fail a refit
        with suppress(Exception):
            if isinstance(engine, TellsRoute):
                way, why = engine.route
                found.append(EngineRoute(engine=name, name=way, why=why))
    return tuple(found)
