"""Broken engines, at least one for each check of ``EngineSuite``."""

from __future__ import annotations

import contextlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from refitkit.errors import WeightMismatchError
from refitkit.model import EngineMemory
from refitkit.testing.fakes import FakeStaged, OpenEngine, Tripwire
from refitkit.testing.oracles import bits
from tests.conformance.bites import Bite
from tests.conformance.test_fakes import TestOpenEngine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from refitkit.protocols import SlotValue

VALUES = {
    "matrix": torch.arange(6.0).reshape(2, 3),
    "half": torch.zeros(3).half(),
    "complex": torch.zeros(2, 2, dtype=torch.complex64),
    "whole": torch.zeros(2, 4, dtype=torch.int8),
}


class Open(OpenEngine):
    """A correct engine whose steps subclasses break one by one."""

    Staged: type[FakeStaged] = FakeStaged

    def __init__(self) -> None:
        super().__init__("engine", VALUES, Tripwire())

    def remembered(self, slot: str) -> torch.Tensor | None:
        return self.live[slot]

    def require_new(self, name: str, copies: dict[str, Any]) -> None:
        if name in copies or name not in self.slots:
            raise WeightMismatchError(f"{name} is given twice, or is no slot.")

    def copied(self, slot: Any, tensor: torch.Tensor) -> torch.Tensor:
        if (str(tensor.dtype), tuple(tensor.shape)) != (f"torch.{slot.dtype}", slot.shape):
            raise WeightMismatchError(f"{slot.name} does not fit.")
        plain = tensor.detach().resolve_conj().resolve_neg()
        return plain.clone(memory_format=torch.contiguous_format)

    def begin_staging(self, slots: Any) -> Filling:
        return Filling(self, slots)

    def _stage(self, values: Sequence[SlotValue]) -> FakeStaged:
        copies: dict[str, torch.Tensor] = {}
        for value in values:
            self.require_new(value.slot.name, copies)
            copies[value.slot.name] = self.copied(self.slots[value.slot.name], value.load())
        return self.Staged(self, copies)


class Filling:
    """What has arrived for an ``Open`` engine."""

    def __init__(self, engine: Open, slots: Any) -> None:
        self.engine, self.slots = engine, set(slots)
        self.copies: dict[str, torch.Tensor] = {}

    def add(self, values: Sequence[SlotValue]) -> None:
        for value in values:
            self.copies[value.slot.name] = self.engine.copied(value.slot, value.load())

    def finish(self) -> Any:
        return self.engine.Staged(self.engine, self.copies)

    def discard(self) -> None:
        self.copies.clear()


class Good(TestOpenEngine):
    """The suite for ``Open`` and its subclasses."""

    engine: type[Open] = Open

    def make_engine(self) -> Any:
        return self.engine()


BITES: list[Bite] = []


def breaks(check: str, says: str, good: type[Good] = Good) -> Any:
    """Add a bite for a check; decorates a broken engine or a broken ``StagedRefit``."""

    def note(thing: type) -> type:
        engine = thing
        if issubclass(thing, FakeStaged):
            engine = type(thing.__name__, (Open,), {"Staged": thing})
        suite = type(thing.__name__, (good,), {"engine": engine})
        BITES.append(Bite(f"test_{check}", suite, says, good))
        return thing

    return note


# -- slots ------------------------------------------------------------------------------------


@breaks(
    "slots_are_listed_under_their_own_names",
    r"slots\['my matrix'\] .* has the key .'engine', 'matrix'",
)
class Renames(Open):
    def __init__(self) -> None:
        super().__init__()
        self.slots = {f"my {name}": slot for name, slot in self.slots.items()}


@breaks("slots_are_listed_under_their_own_names", "has the key .'another', 'matrix'")
class OfAnother(Open):
    def __init__(self) -> None:
        super().__init__()
        self.slots = {
            name: slot.model_copy(update={"engine": "another"}) for name, slot in self.slots.items()
        }


@breaks("slots_are_listed_under_their_own_names", "is a tuple. Return refitkit.model.Slot")
class Tuples(Open):
    def __init__(self) -> None:
        super().__init__()
        self.slots = {name: (slot.dtype, slot.shape) for name, slot in self.slots.items()}  # type: ignore[misc]


@breaks("slots_are_the_same_each_time", "slots differ after a refit: 'matrix'")
class LosesShapes(Open):
    def _stage(self, values: Any) -> Any:
        staged = super()._stage(values)
        self.slots = {
            **self.slots,
            "matrix": self.slots["matrix"].model_copy(update={"shape": None}),
        }
        return staged


@breaks("slots_are_the_same_each_time", "slots differ in a second engine of the same kind")
class Counts(Open):
    made = 0

    def __init__(self) -> None:
        super().__init__()
        Counts.made += 1
        odd = self.slots["half"].model_copy(update={"device": f"cuda:{Counts.made}"})
        self.slots = {**self.slots, "half": odd}


@breaks("slots_tell_what_the_engine_holds", "weights that are not in slots: 'whole'")
class Hides(Open):
    def __init__(self) -> None:
        super().__init__()
        del self.slots["whole"]


@breaks("slots_tell_what_the_engine_holds", r"'half' says float32 x 3, but holds float16 x 3")
class Lies(Open):
    def __init__(self) -> None:
        super().__init__()
        self.slots["half"] = self.slots["half"].model_copy(update={"dtype": "float32"})


@breaks("slots_tell_what_the_engine_holds", r"'matrix' has the shape \(3, 3\), but 6 elements")
class Misshapes(Open):
    def __init__(self) -> None:
        super().__init__()
        self.slots["matrix"] = self.slots["matrix"].model_copy(update={"shape": (3, 3)})


@breaks("memory_is_told", "Engine.memory: before a refit the engine .* returns .*bytes=-1")
class Negative(Open):
    @property
    def memory(self) -> EngineMemory:
        return EngineMemory(engine=self.name, kind="none", bytes=-1)


@breaks("memory_is_told", "is a int. Return a refitkit.model.EngineMemory")
class Numbers(Open):
    memory = 5  # type: ignore[assignment]


# -- staging ----------------------------------------------------------------------------------


@breaks("every_slot_is_written", "after a refit, 1 of 4 slots are wrong: 'whole'")
class Skips(FakeStaged):
    def commit(self) -> None:
        del self.values["whole"]  # type: ignore[attr-defined]
        super().commit()


@breaks("every_slot_is_written", "changes only the last element of 'matrix', 1 of 4 slots are wr")
class KnowsBeginnings(Open):
    """Keeps a live value whose first bytes are those of the new one."""

    def copied(self, slot: Any, tensor: torch.Tensor) -> torch.Tensor:
        copy, live = super().copied(slot, tensor), self.live[slot.name]
        return live if bits(live)[1][:4] == bits(copy)[1][:4] else copy


@breaks("staging_changes_nothing_live", "after stage and before commit, 4 of 4 slots are wrong")
class Eager(Open):
    def _stage(self, values: Any) -> Any:
        staged = super()._stage(values)
        self.live.update(staged.values)
        return staged


@breaks("twice_equals_once", "after the same refit twice, 4 of 4")
class Toggles(FakeStaged):
    def commit(self) -> None:
        live = self.engine.live
        same = [name for name, value in self.values.items() if torch.equal(live[name], value)]
        super().commit()
        live.update({name: torch.zeros_like(live[name]) for name in same})


@breaks("there_and_back_is_bit_equal", "after refits to B and back to A, 4 of 4")
class RemembersTheFirst(Open):
    """Skips values that are equal to those of the first refit."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def _stage(self, values: Any) -> Any:
        staged = super()._stage(values)
        if not self.first:
            self.first = dict(staged.values)
        else:
            kept = {n: v for n, v in staged.values.items() if not torch.equal(v, self.first[n])}
            staged.values = kept
        return staged


@breaks("any_layout_is_copied_exactly", "for values that are views with an offset")
class CopiesMemory(Open):
    def copied(self, slot: Any, tensor: torch.Tensor) -> torch.Tensor:
        right = super().copied(slot, tensor)
        raw = tensor.detach().resolve_conj().resolve_neg().untyped_storage()
        flat = torch.frombuffer(bytearray(raw), dtype=right.dtype)[: right.numel()]
        return flat.reshape(right.shape) if flat.numel() == right.numel() else right


@breaks("any_layout_is_copied_exactly", "lazy negations")
class ForgetsSigns(Open):
    def copied(self, slot: Any, tensor: torch.Tensor) -> torch.Tensor:
        right = super().copied(slot, tensor)
        return -right if tensor.is_neg() else right


@breaks("any_layout_is_copied_exactly", "leaves that require grad raised RuntimeError")
class NeedsNumpy(Open):
    def copied(self, slot: Any, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.requires_grad:
            tensor.numpy()
        return super().copied(slot, tensor)


@breaks("the_same_values_load_other_tensors_later", "of an earlier one, 4 of 4 slots are wrong")
class KnowsThem(Open):
    """Takes what the same object has loaded before."""

    loaded: Any = (None, {})

    def _stage(self, values: Any) -> Any:
        if self.loaded[0] is not values:
            self.loaded = values, {v.slot.name: v.load().clone() for v in values}
        slots = [v._replace(load=lambda n=v.slot.name: self.loaded[1][n]) for v in values]
        return super()._stage(slots)


@breaks("values_are_free_once_staged", "overwrote its tensors between stage and commit, 4 of 4")
class Aliases(Open):
    def copied(self, slot: Any, tensor: torch.Tensor) -> torch.Tensor:
        super().copied(slot, tensor)
        return tensor.detach()


@breaks("values_are_not_kept", "the caller's tensors stay alive after stage: 'complex', 'half'")
class Hoards(Open):
    def _stage(self, values: Any) -> Any:
        self.views = [value.load().view(-1)[:1] for value in values]
        return super()._stage(values)


@breaks("values_are_not_kept", "freed its tensors between stage and commit, 4 of 4")
class LosesThem(Open):
    """Reads freed memory at commit, as an engine that keeps bare addresses does."""

    def _stage(self, values: Any) -> Any:
        staged = super()._stage(values)
        staged.values = {name: torch.zeros_like(value) for name, value in staged.values.items()}
        return staged


@breaks("values_are_not_written_to", "wrote to tensors of the caller: 'complex'")
class Empties(Open):
    def copied(self, slot: Any, tensor: torch.Tensor) -> torch.Tensor:
        copy = super().copied(slot, tensor)
        with torch.no_grad():
            tensor.zero_()
        return copy


@breaks("each_value_is_loaded_once", "load was not called exactly once for 'complex'")
class LoadsTwice(Open):
    def _stage(self, values: Any) -> Any:
        for value in values:
            value.load()
        return super()._stage(values)


@breaks("a_fault_at_any_value_leaves_all_as_it_was", "after value 1, 'half', failed to load")
class Streams(Open):
    def copied(self, slot: Any, tensor: torch.Tensor) -> torch.Tensor:
        self.live[slot.name] = super().copied(slot, tensor)
        return self.live[slot.name]


@breaks("a_fault_at_any_value_leaves_all_as_it_was", "value 0, 'matrix', failed to load, but")
class Swallows(Open):
    def _stage(self, values: Any) -> Any:
        try:
            return super()._stage(values)
        except Exception:  # noqa: BLE001
            return FakeStaged(self, {})


# -- refusals ---------------------------------------------------------------------------------


@breaks("a_wrong_dtype_is_refused", r"a value of torch.float16 for slot 'matrix' .* was accepted")
class Casts(Open):
    def copied(self, slot: Any, tensor: torch.Tensor) -> torch.Tensor:
        return super().copied(slot, tensor.to(getattr(torch, slot.dtype)))


@breaks("a_wrong_dtype_is_refused", "raised ValueError.* Raise an error of refitkit.errors")
class Raises(Open):
    def copied(self, slot: Any, tensor: torch.Tensor) -> torch.Tensor:
        try:
            return super().copied(slot, tensor)
        except WeightMismatchError as exc:
            raise ValueError("no") from exc


@breaks("a_wrong_shape_is_refused", r"of shape \(1,\) for slot 'matrix' .* was accepted")
class Broadcasts(Open):
    def copied(self, slot: Any, tensor: torch.Tensor) -> torch.Tensor:
        return super().copied(slot, tensor.expand(slot.shape) if tensor.numel() == 1 else tensor)


@breaks("a_wrong_shape_is_refused", r"of shape \(3, 2\) for slot 'matrix'")
class CountsElements(Open):
    def copied(self, slot: Any, tensor: torch.Tensor) -> torch.Tensor:
        fits = tensor.numel() == slot.count
        return super().copied(slot, tensor.reshape(slot.shape) if fits else tensor)


@breaks("an_unknown_name_is_refused", "a value for a slot that does not exist was accepted")
class Ignores(Open):
    def stage(self, values: Any) -> Any:
        return super().stage([value for value in values if value.slot.name in self.slots])


@breaks("an_unknown_name_is_refused", "slot that does not exist raised KeyError")
class LooksUp(Open):
    def stage(self, values: Any) -> Any:
        for value in values:
            self.slots[value.slot.name]
        return super().stage(values)


@breaks("a_missing_value_is_refused", "a refit without 'matrix' was accepted")
class TakesSome(Open):
    def stage(self, values: Any) -> Any:
        return self._stage(values)


@breaks("a_slot_that_is_given_twice_is_refused", "two values for 'matrix' was accepted")
class TakesTheLast(Open):
    def stage(self, values: Any) -> Any:
        return super().stage(list({value.slot.name: value for value in values}.values()))


@breaks("a_wrong_shape_is_refused", "was refused, 1 of 4 slots are wrong: 'matrix'")
class ChecksLate(Open):
    def copied(self, slot: Any, tensor: torch.Tensor) -> torch.Tensor:
        self.live[slot.name] = torch.zeros_like(self.live[slot.name])
        return super().copied(slot, tensor)


# -- the transaction --------------------------------------------------------------------------


@breaks("a_rollback_brings_the_old_values_back", "after a rollback, 1 of 4 slots are wrong: 'half'")
class Forgets(FakeStaged):
    def rollback(self) -> None:
        self._before.pop("half", None)
        super().rollback()


@breaks(
    "a_rollback_brings_the_old_values_back", "refit after a rollback, after stage, 4 of 4 slots are"
)
class StagesIntoTheSpare(Open):
    """Has two sets of memory, and forgets which one is live after a rollback."""

    class Staged(FakeStaged):  # type: ignore[assignment]
        def commit(self) -> None:
            super().commit()
            self.engine.free = dict(self._before)  # type: ignore[attr-defined]

    free: ClassVar[dict[str, torch.Tensor]] = {}

    def copied(self, slot: Any, tensor: torch.Tensor) -> torch.Tensor:
        copy = super().copied(slot, tensor)
        return self.free[slot.name].copy_(copy) if slot.name in self.free else copy


@breaks("a_rollback_can_be_repeated", "after a second rollback, 4 of 4")
class UndoesTheUndoing(FakeStaged):
    def rollback(self) -> None:
        live = dict(self.engine.live)
        super().rollback()
        self._before = live


@breaks("the_first_refit_can_be_taken_back", "after a rollback of a first refit, 4 of 4")
class KnowsRefitsOnly(Open):
    class Staged(FakeStaged):  # type: ignore[assignment]
        def rollback(self) -> None:
            if self.engine.refits > 1:  # type: ignore[attr-defined]
                super().rollback()

        def commit(self) -> None:
            self.engine.refits += 1  # type: ignore[attr-defined]
            super().commit()

    refits = 0


@breaks("a_rollback_right_after_staging_changes_nothing", "without a commit, 4 of 4")
class GoesTooFarBack(FakeStaged):
    def rollback(self) -> None:
        self.engine.live.update(self.engine.spare)


@breaks(
    "a_failed_commit_can_be_taken_back", "after rollback of a failed commit, 2 of 4 .*'half', 'ma"
)
class NotesAtTheEnd(FakeStaged):
    def commit(self) -> None:
        before = dict(self.engine.live)
        for name, value in self.values.items():
            self.engine.live[name] = value
            self._trip(f"commit-{name}")
        self._before = self.engine.spare = before


@breaks("a_failed_commit_can_be_taken_back", "it returned, although commit_fault.. made it fail")
class HushesCommits(FakeStaged):
    def commit(self) -> None:
        with contextlib.suppress(OSError):
            super().commit()


@breaks("a_discard_leaves_the_live_values", "after a discard, 4 of 4")
class CommitsDiscarded(FakeStaged):
    def discard(self) -> None:
        super().commit()


@breaks("changed_tells_the_truth", "it returned False, but 'complex' differs")
class NeverChanged(FakeStaged):
    def changed(self) -> bool:
        return False


@breaks("changed_tells_the_truth", "it returned True for values that equal the live ones")
class AlwaysChanged(FakeStaged):
    def changed(self) -> bool:
        return True


@breaks("changed_tells_the_truth", "it returned False, but 'half' differs")
class LooksAtOne(FakeStaged):
    def changed(self) -> bool:
        others = {name: value for name, value in self.values.items() if name != "half"}
        return FakeStaged(self.engine, others).changed() or False


@breaks("changed_compares_bits", "it returned False, but a zero of 'matrix' changed its sign")
class ComparesValues(FakeStaged):
    def changed(self) -> bool:
        live = self.engine.live
        return not all(torch.equal(live[name], value) for name, value in self.values.items())


@breaks(
    "a_refit_that_is_judged_wrong_is_taken_back", "after a refit that the verifier rejected, 4 of 4"
)
class OneWay(FakeStaged):
    def rollback(self) -> None:
        pass


@breaks(
    "the_module_is_lost_where_the_way_back_fails", "made it fail, but the refit raised EngineError"
)
class HushesRollbacks(FakeStaged):
    def rollback(self) -> None:
        with contextlib.suppress(OSError):
            super().rollback()


@breaks(
    "the_module_is_lost_where_the_way_back_fails",
    "made it fail, but the module still answers calls",
)
class HushesAll(HushesRollbacks):
    def commit(self) -> None:
        with contextlib.suppress(OSError):
            super().commit()


# -- abilities --------------------------------------------------------------------------------


@breaks("slots_say_whether_they_can_be_read", "the engine has read, but slots say otherwise")
class Modest(Open):
    def __init__(self) -> None:
        super().__init__()
        for name, slot in list(self.slots.items()):
            self.slots[name] = slot.model_copy(update={"readable": False})


@breaks(
    "what_is_read_is_what_is_held",
    "after a rollback, the value read from 'matrix' is not the live value",
)
class ReadsWhatWasStaged(Open):
    class Staged(FakeStaged):  # type: ignore[assignment]
        def commit(self) -> None:
            super().commit()
            self.engine.shown = dict(self.engine.live)  # type: ignore[attr-defined]

    shown: ClassVar[dict[str, Any]] = {}

    def read(self, slot: str) -> torch.Tensor:
        return self.shown[slot]


@breaks("what_is_read_is_what_is_held", r"the value of 'matrix' has shape \(6,\), not \(2, 3\)")
class ReadsFlat(Open):
    def read(self, slot: str) -> torch.Tensor:
        return self.live[slot].reshape(-1)


@breaks("reading_copies_nothing", "SupportsReadback.read: each read copies 'matrix'")
class ReadsCopies(Open):
    def read(self, slot: str) -> torch.Tensor:
        self.copies = [*getattr(self, "copies", []), self.live[slot].clone()]
        return self.copies[-1]


class _Inactive(Open):
    """Merges a partial refit with the values staged last instead of the live ones."""

    last: Any = MappingProxyType({})

    def _stage(self, values: Any) -> Any:
        staged = super()._stage(values)
        self.last = {**self.last, **staged.values}
        staged.values = self.last
        return staged


breaks("a_partial_refit_follows_one_that_was_discarded", "that followed a discarded one, 3 of 4")(
    _Inactive
)


@breaks("a_partial_refit_leaves_all_other_slots", "after a refit of 'matrix' alone, 3 of 4")
class ClearsOthers(FakeStaged):
    def commit(self) -> None:
        super().commit()
        for name in self.engine.live.keys() - self.values.keys():
            self.engine.live[name] = torch.zeros_like(self.engine.live[name])


@breaks("a_partial_refit_leaves_all_other_slots", "after 'matrix' was staged, 1 of 4")
class EagerInPart(Open):
    def stage_partial(self, values: Any) -> Any:
        staged = super().stage_partial(values)
        self.live.update(staged.values)
        return staged


@breaks(
    "a_partial_refit_can_be_taken_back", "after a rollback of a refit of 'matrix' alone, 1 of 4"
)
class NoWayBackInPart(FakeStaged):
    def rollback(self) -> None:
        if len(self.values) == len(self.engine.slots):
            super().rollback()


@breaks("a_partial_refit_refuses_what_does_not_fit", "a refit with two values for 'matrix' was acc")
class TrustsInPart(Open):
    def stage_partial(self, values: Any) -> Any:
        return super().stage_partial(list({value.slot.name: value for value in values}.values()))


@breaks(
    "a_partial_refit_refuses_what_does_not_fit",
    "the value of 'matrix' under an unknown name was accepted",
)
class SkipsInPart(Open):
    def stage_partial(self, values: Any) -> Any:
        return super().stage_partial([value for value in values if value.slot.name in self.slots])


@breaks("the_spare_buffer_can_be_freed", "after two refits it returned 0, and then 0")
class KeepsTheSpare(Open):
    def free_spare(self) -> int:
        return 0


@breaks("the_spare_buffer_can_be_freed", "after the call, 4 of 4 slots are wrong")
class FreesTheWrongOne(Open):
    def free_spare(self) -> int:
        freed = super().free_spare()
        self.live = {name: torch.zeros_like(value) for name, value in self.live.items()}
        return freed


@breaks("warming_changes_nothing", "after warming a new engine, 1 of 4 slots are wrong: 'half'")
class WarmsWithOnes(Open):
    def warm(self, progress: Any) -> None:
        self.live["half"] = torch.ones_like(self.live["half"])


@breaks("warming_changes_nothing", "with a new engine it called progress with None")
class TellsNothing(Open):
    def warm(self, progress: Any) -> None:
        progress(None)


@breaks("staging_keeps_no_more_than_it_says", "staging allocated .* bytes; the limit is")
class Triples(Open):
    def __init__(self) -> None:
        super().__init__()
        self.live["matrix"] = torch.zeros(300, 300)
        self.slots["matrix"] = self.slots["matrix"].model_copy(
            update={"shape": (300, 300), "count": 90000}
        )

    def _stage(self, values: Any) -> Any:
        staged = super()._stage(values)
        staged.more = [value.clone() for value in staged.values.values() for _ in range(3)]
        return staged


@breaks("refits_do_not_pile_up", "the last 4 of 6 refits kept .* bytes more; one set of weights")
class PilesUp(Triples):
    def _stage(self, values: Any) -> Any:
        staged = Open._stage(self, values)
        self.all = [*getattr(self, "all", []), staged.values]
        return staged


@breaks("refits_do_not_pile_up", "6 refits kept .* bytes; the limit is")
class HoardsAtOnce(Open):
    def _stage(self, values: Any) -> Any:
        self.hoard = torch.zeros(1_000_000)
        return super()._stage(values)


@breaks("refits_do_not_pile_up", "the last 4 of 6 refits kept .* bytes more; one set of weights")
class KeepsHistory(Open):
    """Keeps every set of weights: few bytes, but more with each refit."""

    def _stage(self, values: Any) -> Any:
        self.history = [*getattr(self, "history", []), dict(self.live)]
        return super()._stage(values)


# -- earlier values, and no way back ----------------------------------------------------------

_BEFORE = "previous_values_are_those_before_the_last_commit"


@breaks(_BEFORE, "lacks changed slots: 'complex', 'half', 'matrix' and 1 more")
class RemembersNothing(Open):
    def previous(self) -> Any:
        return {}


@breaks(_BEFORE, "after a commit, it returned values that were not live before")
class RemembersTheLive(Open):
    def previous(self) -> Any:
        return dict(self.live) if self.spare else {}


@breaks(_BEFORE, "staged and discarded, it returned values that were not live before: 'half'")
class StagesOverThePast(Open):
    def _stage(self, values: Any) -> Any:
        staged = super()._stage(values)
        if self.spare:
            self.spare["half"] = staged.values["half"]
        return staged


@breaks(_BEFORE, "after a rollback, it returned values for")
class RemembersAfterARollback(FakeStaged):
    def rollback(self) -> None:
        super().rollback()
        self.engine.spare = dict(self.values)


@breaks("no_previous_values_where_there_are_none", "before any refit, it returned values for")
class BornWithAPast(Open):
    def __init__(self) -> None:
        super().__init__()
        self.spare = dict(self.live)


@breaks(
    "no_previous_values_where_there_are_none",
    "after the spare buffer was freed, it returned values for",
)
class RemembersTheFreed(Open):
    def free_spare(self) -> int:
        return sum(value.nbytes for value in self.spare.values())


@breaks("previous_values_can_be_staged", "after they were staged, 4 of 4 slots are wrong")
class LendsItsStagingSet(Open):
    """Stages in the memory that the previous values are in."""

    def _stage(self, values: Any) -> Any:
        for value in self.spare.values():
            value.zero_()
        return super()._stage(values)


@breaks("overwriting_begins_at_the_commit", "after a discard, 4 of 4")
class WritesAtOnce(Open):
    def stage_over(self, values: Any) -> Any:
        staged = super().stage_over(values)
        staged.commit()
        return staged


@breaks("overwriting_begins_at_the_commit", "a rollback after overwriting was accepted")
class HasNoRegrets(Open):
    def stage_over(self, values: Any) -> Any:
        staged = super().stage_over(values)
        staged.rollback = lambda: None  # type: ignore[method-assign]
        return staged


@breaks("overwriting_some_leaves_the_others", "after 'matrix' alone was overwritten, 3 of 4")
class ClearsTheRest(Open):
    def _write_over(self, values: Any) -> None:
        self.live = {name: torch.zeros_like(value) for name, value in self.live.items()}
        super()._write_over(values)


@breaks("overwriting_refuses_names_that_are_not_its_own", "a repeated name was accepted")
class WritesTwice(Open):
    def stage_over(self, values: Any) -> Any:
        return super().stage_over(list({value.slot.name: value for value in values}.values()))


@breaks("overwriting_needs_no_second_set", "it kept .* more bytes; one set of weights has")
class OverwritesWithASpare(Triples):
    def _write_over(self, values: Any) -> None:
        super()._write_over(values)
        self.more = [value.clone() for value in self.live.values()]


# -- what is remembered, and what is shown before it is live ------------------------------------


@breaks("what_is_remembered_is_held", "before any refit, the value remembered for 'matrix' is not")
class RemembersOnes(Open):
    def remembered(self, slot: str) -> torch.Tensor | None:
        return torch.ones_like(self.live[slot])


@breaks("what_is_remembered_is_held", "after a discard, the value remembered for 'matrix' is not")
class RemembersWhatWasStaged(Open):
    def _stage(self, values: Any) -> Any:
        staged = super()._stage(values)
        self.last = staged.values
        return staged

    def remembered(self, slot: str) -> torch.Tensor | None:
        return self.last[slot] if hasattr(self, "last") else None


@breaks("what_is_remembered_is_held", "after a commit, the value remembered for 'matrix' is not")
class NeverRemembers(Open):
    def remembered(self, slot: str) -> torch.Tensor | None:
        return None


@breaks("what_is_remembered_is_held", "after a rollback, the value remembered for 'matrix' is not")
class RemembersWhatWasCommitted(FakeStaged):
    def commit(self) -> None:
        super().commit()
        last = dict(self.values)
        self.engine.remembered = last.get  # type: ignore[attr-defined]


@breaks("what_is_remembered_is_held", r"RemembersWeights.*'matrix' has shape \(6,\), not")
class RemembersFlat(Open):
    def remembered(self, slot: str) -> torch.Tensor | None:
        return self.live[slot].reshape(-1)


@breaks("what_is_staged_is_shown", "the value returned for 'matrix' is not the one that was staged")
class ShowsTheLive(FakeStaged):
    def staged(self, slot: str) -> torch.Tensor:
        return self.engine.live[slot]


@breaks("what_is_staged_is_shown", "ShowsStaged.staged: each call copies 'matrix'")
class ShowsCopies(FakeStaged):
    def staged(self, slot: str) -> torch.Tensor:
        self.all = [*getattr(self, "all", []), self.values[slot].clone()]
        return self.all[-1]


@breaks("what_is_staged_is_shown", r"ShowsStaged.*'matrix' has shape \(6,\), not \(2, 3\)")
class ShowsFlat(FakeStaged):
    def staged(self, slot: str) -> torch.Tensor:
        return self.values[slot].reshape(-1)


@breaks("what_is_staged_is_shown", "after the calls, 4 of 4 slots are wrong")
class CommitsToShow(FakeStaged):
    def staged(self, slot: str) -> torch.Tensor:
        self.engine.live.update(self.values)
        return self.values[slot]


@breaks("what_is_staged_is_shown", "after the calls and a commit, 4 of 4 slots are wrong")
class TakesAway(FakeStaged):
    def staged(self, slot: str) -> torch.Tensor:
        self.gone = {**getattr(self, "gone", {}), slot: self.values[slot]}
        return self.gone[slot]

    def commit(self) -> None:
        gone = getattr(self, "gone", {})
        self.values = {name: v for name, v in self.values.items() if name not in gone}
        super().commit()


# -- values that arrive -----------------------------------------------------------------------


class _Arriving(Open):
    filling: type[Filling] = Filling

    def begin_staging(self, slots: Any) -> Filling:
        return self.filling(self, slots)


def fills(check: str, says: str) -> Any:
    """Add a bite for a check; decorates a broken filling."""

    def note(filling: type) -> type:
        breaks(check, says)(type(filling.__name__, (_Arriving,), {"filling": filling}))
        return filling

    return note


@fills("values_that_arrive_one_by_one_are_those_of_one_refit", "returns other values for")
class KeepsTensors(Filling):
    def add(self, values: Any) -> None:
        self.copies |= {value.slot.name: value.load() for value in values}


@fills("values_that_arrive_one_by_one_are_those_of_one_refit", "returns other values for")
class TakesThemInOrder(Filling):
    def add(self, values: Any) -> None:
        name = list(self.engine.slots)[len(self.copies)]
        found = self.engine.live[name].clone()
        self.copies[name] = found
        if values[0].slot.name == name:
            super().add(values)


@fills("values_that_arrive_one_by_one_are_those_of_one_refit", "before the commit")
class WritesLive(Filling):
    def add(self, values: Any) -> None:
        super().add(values)
        self.engine.live |= self.copies


@fills("values_that_arrive_one_by_one_are_those_of_one_refit", "has no staged")
class ShowsNothing(Filling):
    def finish(self) -> Any:
        staged = super().finish()

        class Blind:
            commit, rollback = staged.commit, staged.rollback
            discard, changed = staged.discard, staged.changed

        return Blind()


@fills("some_values_that_arrive_leave_the_other_slots", "gradual refit of 'matrix' alone")
class ZeroesTheRest(Filling):
    def finish(self) -> Any:
        rest = {n: torch.zeros_like(t) for n, t in self.engine.live.items()}
        self.copies = {**rest, **self.copies}
        return super().finish()


@fills("values_that_stopped_arriving_leave_nothing", "of 4 values and discard")
class CommitsOnDiscard(Filling):
    def discard(self) -> None:
        self.engine.live |= self.copies
