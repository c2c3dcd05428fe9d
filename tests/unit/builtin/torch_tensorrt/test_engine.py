"""Engines of both runtimes: staging, partial refits, warming, memory, stored bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.builtin.torch_tensorrt.refitter import PersistentRefitter
from refitkit.builtin.torch_tensorrt.weight_buffers import Uploader
from refitkit.errors import EngineError, ModuleLostError, NotRefittableError, WeightMismatchError
from refitkit.protocols import SlotValue, SupportsPartial, SupportsSpareBuffer, SupportsWarming
from tests.fakes import Tripwire, same_state, slot_for
from tests.unit.builtin.torch_tensorrt.fake_trt import Refusal, engine_from, fake_trt
from tests.unit.builtin.torch_tensorrt.scenes import engine_of, slot_values, values_of

if TYPE_CHECKING:
    from collections.abc import Mapping

RUNTIMES = ["python", "cpp"]
A, B, C = (values_of("e", seed) for seed in range(3))
KERNEL = "[CONVOLUTION]-[e] KERNEL"


def flat(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.reshape(-1) for name, value in values.items()}


def refit(engine: Any, values: Mapping[str, torch.Tensor]) -> None:
    engine.stage(slot_values(engine, values)).commit()


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_slots_are_what_tensorrt_says(runtime: str) -> None:
    engine, _ = engine_of("e", A, runtime=runtime)
    assert list(engine.slots) == sorted(A)
    for name, slot in engine.slots.items():
        value = A[name]
        assert slot == slot_for(name, value, "e")
        assert not slot.readable
    assert engine.slots is engine.slots  # asked for once per row: never made anew
    assert isinstance(engine, SupportsPartial)
    assert isinstance(engine, SupportsSpareBuffer)
    assert isinstance(engine, SupportsWarming)
    assert not hasattr(engine, "read")


def test_all_problems_of_values_at_once(runtime: str) -> None:
    engine, handle = engine_of("e", A, runtime=runtime)
    names = sorted(A)
    bad = {
        names[0]: A[names[0]].T.contiguous(),
        names[1]: A[names[1]].float(),
        names[2]: torch.zeros(3),
    }
    with pytest.raises(WeightMismatchError) as info:
        engine.stage(slot_values(engine, bad))
    found = [(p.subject, p.kind) for p in info.value.problems]
    assert found == [
        (names[0], "shape"),
        (names[1], "dtype"),
        (names[2], "number of elements"),
    ]
    assert same_state(handle.engine.values(), flat(A))


def test_all_problems_of_names_at_once(runtime: str) -> None:
    engine, _ = engine_of("e", A, runtime=runtime)
    values = slot_values(engine, {KERNEL: A[KERNEL], "other": torch.zeros(1)})
    with pytest.raises(WeightMismatchError) as info:
        engine.stage([*values, values[0]])
    found = {(p.subject, p.kind) for p in info.value.problems}
    missing = {(name, "missing") for name in A if name != KERNEL}
    assert found == {("other", "unexpected"), (KERNEL, "given twice"), *missing}


def test_values_are_copied_in_logical_order_and_free_afterwards(runtime: str) -> None:
    engine, handle = engine_of("e", A, runtime=runtime)
    mine = {**B, KERNEL: B[KERNEL].T.contiguous().T}
    assert not mine[KERNEL].is_contiguous()
    mine = {name: value.clone() if name != KERNEL else value for name, value in mine.items()}
    staged = engine.stage(slot_values(engine, mine))
    for value in mine.values():
        value.fill_(99)
    staged.commit()
    assert same_state(handle.engine.values(), flat(B))


def test_values_with_gradients_and_put_off_signs() -> None:
    engine, handle = engine_of("e", A)
    signed = torch._neg_view(-B[KERNEL])
    values = {**B, KERNEL: signed.requires_grad_()}
    refit(engine, values)
    assert same_state(handle.engine.values(), flat(B))


def test_partial_refits_need_one_full_one(runtime: str) -> None:
    engine, handle = engine_of("e", A, runtime=runtime)
    with pytest.raises(NotRefittableError, match="fully once"):
        engine.stage_partial(slot_values(engine, {KERNEL: B[KERNEL]}))
    refit(engine, A)
    engine.stage_partial(slot_values(engine, {KERNEL: B[KERNEL]})).commit()
    assert same_state(handle.engine.values(), flat({**A, KERNEL: B[KERNEL]}))


@pytest.mark.parametrize("end", ["discard", "rollback", "refuse", "free"])
def test_partial_refits_after_one_that_did_not_last(runtime: str, end: str) -> None:
    engine, handle = engine_of("e", A, runtime=runtime)
    refit(engine, A)
    if end == "refuse":
        with pytest.raises(WeightMismatchError):
            engine.stage(slot_values(engine, {**B, KERNEL: B[KERNEL].half()}))
    else:
        staged = engine.stage(slot_values(engine, B))
        if end == "rollback":
            staged.commit()
            staged.rollback()
        else:
            staged.discard()
        if end == "free":
            assert engine.free_spare() > 0
    assert same_state(handle.engine.values(), flat(A))
    staged = engine.stage_partial(slot_values(engine, {KERNEL: C[KERNEL]}))
    staged.commit()
    assert same_state(handle.engine.values(), flat({**A, KERNEL: C[KERNEL]}))
    staged.rollback()
    assert same_state(handle.engine.values(), flat(A))


def test_adopted_weights_are_live_weights(runtime: str) -> None:
    engine, handle = engine_of("e", A, runtime=runtime)
    engine.adopt(slot_values(engine, A))
    staged = engine.stage_partial(slot_values(engine, {KERNEL: B[KERNEL]}))
    assert staged.changed()
    staged.commit()
    staged.rollback()
    assert same_state(handle.engine.values(), flat(A))
    with pytest.raises(WeightMismatchError, match="missing"):
        engine.adopt(slot_values(engine, {KERNEL: B[KERNEL]}))


def test_weights_that_were_badly_adopted_are_unknown(runtime: str) -> None:
    engine, _ = engine_of("e", A, runtime=runtime)
    refit(engine, A)
    with pytest.raises(WeightMismatchError, match="dtype"):
        engine.adopt(slot_values(engine, {**B, KERNEL: B[KERNEL].half()}))
    assert not engine.knows_live


def test_changed_compares_bits(runtime: str) -> None:
    engine, _ = engine_of("e", A, runtime=runtime)
    assert engine.stage(slot_values(engine, A)).changed() is None
    refit(engine, A)
    assert engine.stage(slot_values(engine, A)).changed() is False
    zero = {**A, "e CONSTANT": -A["e CONSTANT"]}
    assert engine.stage(slot_values(engine, zero)).changed() is True


def test_infinities_are_refused_where_numbers_were(runtime: str) -> None:
    held = {**A, "e CONSTANT": torch.tensor([float("-inf"), 1.0])}
    bad = {**B, "e CONSTANT": torch.tensor([float("nan"), float("inf")])}
    engine, handle = engine_of("e", held, runtime=runtime)
    refit(engine, held)
    refit(engine, held)
    with pytest.raises(WeightMismatchError, match="1 elements") as info:
        engine.stage(slot_values(engine, bad))
    assert [(p.subject, p.kind) for p in info.value.problems] == [("e CONSTANT", "non-finite")]
    assert same_state(handle.engine.values(), flat(held))
    lax, handle = engine_of("e", held, runtime=runtime, check_finite=False)
    refit(lax, held)
    refit(lax, bad)
    assert same_state(handle.engine.values(), flat(bad))


def test_infinities_of_eight_bit_floats() -> None:
    held = {"q": torch.ones(4).to(torch.float8_e4m3fn), "i": torch.arange(3)}
    engine, _ = engine_of("e", held)
    engine.adopt(slot_values(engine, held))
    bad = {**held, "q": torch.full((4,), float("nan")).to(torch.float8_e4m3fn)}
    with pytest.raises(WeightMismatchError, match="4 elements"):
        engine.stage(slot_values(engine, bad))


def test_memory_of_the_way_back() -> None:
    engine, handle = engine_of("e", A)
    assert engine.memory.kind == "engine-bytes"
    assert engine.memory.bytes == len(handle.stored)
    refit(engine, A)
    assert engine.memory.kind == "device"
    weights = sum(value.nbytes for value in A.values())
    assert weights <= engine.memory.bytes <= weights + 256 * len(A)
    assert engine.free_spare() == 0
    refit(engine, B)
    assert engine.free_spare() == engine.memory.bytes
    staged = engine.stage(slot_values(engine, C))
    staged.commit()
    staged.rollback()
    assert same_state(handle.engine.values(), flat(B))


def test_memory_of_the_way_back_in_the_cpp_runtime() -> None:
    engine, handle = engine_of("e", A, runtime="cpp")
    refit(engine, A)
    assert (engine.memory.kind, engine.memory.bytes) == ("device", len(handle.stored))


# -- warming ----------------------------------------------------------------------------------


def test_one_refitter_for_the_life_of_an_engine(runtime: str) -> None:
    trt = fake_trt(Tripwire())
    engine, _ = engine_of("e", A, runtime=runtime, trt=trt)
    engine.warm(lambda _: None)
    for values in (A, B, C):
        staged = engine.stage(slot_values(engine, values))
        staged.commit()
    staged.rollback()
    refit(engine, A)
    assert trt.Refitter.made == 1


def test_warming_refits_where_that_changes_nothing(runtime: str) -> None:
    wire = Tripwire()
    engine, handle = engine_of("e", A, wire, runtime=runtime)
    engine.adopt(slot_values(engine, A))
    told: list[str] = []
    engine.warm(told.append)
    assert "refit" in wire.calls
    assert "warm" in told[-1]
    assert same_state(handle.engine.values(), flat(A))
    assert engine.knows_live


def test_warming_an_engine_of_unknown_weights_leaves_it_alone() -> None:
    wire = Tripwire()
    engine, handle = engine_of("e", A, wire)
    told: list[str] = []
    engine.warm(told.append)
    assert "refit" not in wire.calls
    assert "not known" in told[-1]
    assert same_state(handle.engine.values(), flat(A))


def test_the_cpp_runtime_is_warmed_whatever_its_weights() -> None:
    wire = Tripwire()
    engine, handle = engine_of("e", A, wire, runtime="cpp")
    engine.warm(lambda _: None)
    assert "refit" in wire.calls
    assert not engine.knows_live
    assert same_state(handle.engine.values(), flat(A))


def test_warming_that_fails_leaves_all_as_it_was() -> None:
    wire = Tripwire()
    engine, handle = engine_of("e", A, wire)
    engine.adopt(slot_values(engine, A))
    wire.arm()
    engine.warm(lambda _: None)
    calls = [n for n, label in enumerate(wire.calls) if label.startswith("refit")]
    for number in calls:
        wire.arm({number: Refusal()})
        with pytest.raises(EngineError):
            engine.warm(lambda _: None)
        assert same_state(handle.engine.values(), flat(A))
    wire.arm({calls[0]: Refusal()})
    with pytest.raises(EngineError):
        engine.warm(lambda _: None)
    again = [n for n, label in enumerate(wire.calls) if label == "refit"]
    wire.arm(dict.fromkeys(again, Refusal()))
    with pytest.raises(ModuleLostError, match="half-way"):
        engine.warm(lambda _: None)
    wire.arm()
    with pytest.raises(EngineError, match="mixture"):
        handle.engine_bytes()


# -- stored bytes -----------------------------------------------------------------------------


def stored(handle: Any) -> dict[str, torch.Tensor]:
    return engine_from(handle.engine_bytes(), Tripwire()).values()


def test_stored_bytes_are_flushed_when_somebody_reads_them_and_once() -> None:
    engine, handle = engine_of("e", A)
    refit(engine, A)
    refit(engine, B)
    assert handle.flushes == 0
    assert same_state(stored(handle), flat(B))
    assert same_state(stored(handle), flat(B))
    assert handle.flushes == 1
    assert engine_from(handle.stored, Tripwire()).refittable


def test_a_rollback_of_a_first_refit_needs_no_flush() -> None:
    engine, handle = engine_of("e", A)
    engine.adopt(slot_values(engine, A))
    staged = engine.stage(slot_values(engine, B))
    staged.commit()
    staged.rollback()
    assert handle.pending is None
    assert same_state(stored(handle), flat(A))


def test_a_rollback_of_a_later_refit_flushes_old_weights() -> None:
    engine, handle = engine_of("e", A)
    refit(engine, B)
    staged = engine.stage(slot_values(engine, C))
    staged.commit()
    staged.rollback()
    assert same_state(stored(handle), flat(B))


def test_somebody_else_puts_another_engine_in_place() -> None:
    engine, handle = engine_of("e", A)
    refit(engine, B)
    handle.replace(engine_of("e", C)[1].stored)
    with pytest.raises(NotRefittableError):
        engine.stage_partial(slot_values(engine, {KERNEL: A[KERNEL]}))
    staged = engine.stage(slot_values(engine, A))
    staged.commit()
    assert same_state(handle.engine.values(), flat(A))
    staged.rollback()
    assert same_state(handle.engine.values(), flat(C))
    assert same_state(stored(handle), flat(C))


def test_values_are_loaded_once_each() -> None:
    engine, _ = engine_of("e", A)
    loads: list[str] = []

    def counted(value: SlotValue) -> SlotValue:
        def load() -> torch.Tensor:
            loads.append(value.slot.name)
            return value.load()

        return SlotValue(value.slot, value.strategy, value.sources, load)

    engine.stage([counted(value) for value in slot_values(engine, B)])
    assert sorted(loads) == sorted(B)


# -- constants --------------------------------------------------------------------------------

CONSTANT = "e CONSTANT"


def staged_with(engine: Any, values: Mapping[str, torch.Tensor], constant: torch.Tensor) -> Any:
    """Staged: weights of a source, and a constant of the plan's."""
    given = slot_values(engine, {**values, CONSTANT: constant})
    return engine.stage([v._replace(pinned=v.slot.name == CONSTANT) for v in given])


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What is copied, by the last element of each."""
    seen: list[float] = []
    real = Uploader.copy

    def copy(self: Uploader, room: torch.Tensor, value: torch.Tensor) -> None:
        seen.append(float(value.reshape(-1)[-1]))
        real(self, room, value)

    monkeypatch.setattr(Uploader, "copy", copy)
    return seen


def holds(handle: Any, values: Mapping[str, torch.Tensor], constant: torch.Tensor) -> bool:
    return same_state(handle.engine.values(), flat({**values, CONSTANT: constant}))


def test_constants_are_copied_once(runtime: str, copied: list[float]) -> None:
    engine, handle = engine_of("e", A, runtime=runtime)
    constant = torch.tensor([5.0, 77.0])
    for values in (A, B, C):
        staged_with(engine, values, constant.view(2)).commit()
        assert holds(handle, values, constant)
    assert copied.count(77.0) == 1


def test_another_constant_is_copied(runtime: str, copied: list[float]) -> None:
    engine, handle = engine_of("e", A, runtime=runtime)
    for last in (77.0, 78.0, 77.0):
        constant = torch.tensor([5.0, last])
        staged_with(engine, B, constant).commit()
        assert holds(handle, B, constant)
    assert (copied.count(77.0), copied.count(78.0)) == (2, 1)


def test_a_constant_that_was_written_to_is_copied_again(runtime: str) -> None:
    engine, handle = engine_of("e", A, runtime=runtime)
    constant = torch.tensor([5.0, 77.0])
    staged_with(engine, B, constant).commit()
    constant[1] = 1.0
    staged_with(engine, B, constant).commit()
    assert holds(handle, B, constant)


def test_another_part_of_the_same_memory_is_another_constant(runtime: str) -> None:
    engine, handle = engine_of("e", A, runtime=runtime)
    memory = torch.arange(8.0)
    turned = torch._neg_view(memory[:2])
    for constant in (memory[:2], turned, memory[:4:2], turned, memory[2:4], memory[:2]):
        staged_with(engine, B, constant).commit()
        assert holds(handle, B, constant)


def test_a_weight_in_a_constants_place_counts(runtime: str) -> None:
    """A source may override what the plan keeps."""
    engine, handle = engine_of("e", A, runtime=runtime)
    constant = torch.tensor([5.0, 77.0])
    staged_with(engine, B, constant).commit()
    refit(engine, A)
    assert same_state(handle.engine.values(), flat(A))
    staged_with(engine, B, constant).commit()
    assert holds(handle, B, constant)


@pytest.mark.parametrize("end", ["rollback", "discard"])
def test_constants_after_a_refit_that_did_not_last(runtime: str, end: str) -> None:
    engine, handle = engine_of("e", A, runtime=runtime)
    old, new = torch.tensor([5.0, 77.0]), torch.tensor([6.0, 78.0])
    staged_with(engine, B, old).commit()
    staged = staged_with(engine, C, new)
    if end == "rollback":
        staged.commit()
        staged.rollback()
        assert holds(handle, B, old)
    else:
        staged.discard()
    staged_with(engine, A, new).commit()
    assert holds(handle, A, new)
    staged_with(engine, A, old).commit()
    assert holds(handle, A, old)


def test_constants_that_did_not_arrive_are_copied_again(
    runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, handle = engine_of("e", A, runtime=runtime)
    old, new = torch.tensor([5.0, 77.0]), torch.tensor([6.0, 78.0])
    staged_with(engine, B, old).commit()
    with monkeypatch.context() as patch:
        patch.setattr(Uploader, "_copy_queue", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            staged_with(engine, C, new)
    staged_with(engine, A, new).commit()
    assert holds(handle, A, new)


def test_constants_without_a_count_of_changes_are_always_copied(runtime: str) -> None:
    engine, handle = engine_of("e", A, runtime=runtime)
    with torch.inference_mode():
        constant = torch.tensor([5.0, 77.0])
    staged_with(engine, B, constant).commit()
    with torch.inference_mode():
        constant[1] = 1.0
    staged_with(engine, B, constant).commit()
    assert holds(handle, B, constant)


# -- waiting ----------------------------------------------------------------------------------


def test_only_a_commit_knows_that_no_call_is_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline waits before a commit; rollbacks come after calls, and warming anywhere."""
    idle: list[bool] = []
    real = PersistentRefitter.refit

    def refitted(self: PersistentRefitter, *, idle: bool = False) -> None:
        found.append(idle)
        real(self, idle=idle)

    found = idle
    monkeypatch.setattr(PersistentRefitter, "refit", refitted)
    engine, _ = engine_of("e", A)
    engine.adopt(slot_values(engine, A))
    engine.warm(lambda _: None)
    assert idle == [False]
    staged = engine.stage(slot_values(engine, B))
    staged.commit()
    assert idle == [False, True]
    staged.rollback()
    assert idle == [False, True, False]
