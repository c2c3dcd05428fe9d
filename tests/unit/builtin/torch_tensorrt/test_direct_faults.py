"""Refits past the refitter: sequences after which the engine could hold other weights unnoticed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.builtin.torch_tensorrt.direct import known, route
from refitkit.builtin.torch_tensorrt.direct.arena import PlacedArena
from refitkit.builtin.torch_tensorrt.weight_buffers import WeightBuffers
from refitkit.errors import EngineError
from tests.fakes import same_state
from tests.unit.builtin.torch_tensorrt.fake_trt import PlacedEngine, Refusal, engine_from
from tests.unit.builtin.torch_tensorrt.scenes import slot_values
from tests.unit.builtin.torch_tensorrt.test_direct import Built, engine_with, refit

if TYPE_CHECKING:
    from collections.abc import Iterator

Values = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Nothing is known of any engine."""
    known._of_process.clear()
    yield
    known._of_process.clear()


def values_of(seed: int, **more: torch.Tensor) -> Values:
    """``flags`` are fixed; TensorRT writes them first, and they lie behind all that is written."""
    g = torch.Generator().manual_seed(seed)
    return {
        "linear": torch.randn(6, 8, generator=g),
        "half": torch.randn(10, generator=g).half(),
        "one": torch.randn(1, generator=g),
        "z_flags": torch.tensor([True, False, True]),
        **more,
    }


OTHER = torch.tensor([False, True, True])
A, B, C = map(values_of, range(3))
C_OTHER = values_of(2, z_flags=OTHER)


def flat(values: Values) -> Values:
    return {name: value.reshape(-1) for name, value in values.items()}


def opened(kind: type[PlacedEngine] = PlacedEngine, values: Values = A, **more: Any) -> Any:
    engine, handle = engine_with(kind, values, **more)
    engine.adopt(slot_values(engine, values))
    return engine, handle


def stage(engine: Any, values: Values) -> Any:
    return engine.stage(slot_values(engine, values))


def holds(handle: Any) -> Values:
    return handle.engine.values()


def test_warming_after_a_discarded_refit_changes_nothing() -> None:
    engine, handle = opened()
    refit(engine, B)
    stage(engine, C).discard()
    engine.warm(lambda _: None)
    assert same_state(holds(handle), flat(B))


def test_freeing_the_spare_after_a_discarded_refit_and_warming_changes_nothing() -> None:
    engine, handle = opened()
    refit(engine, B)
    stage(engine, C).discard()
    engine.free_spare()
    engine.warm(lambda _: None)
    assert same_state(holds(handle), flat(B))


def test_a_rollback_reaches_the_engine_that_tensorrt_refitted() -> None:
    """The engine that can be written waits to be put in place."""
    engine, handle = opened()
    stage(engine, B).discard()
    staged = stage(engine, C_OTHER)
    staged.commit()
    assert same_state(holds(handle), flat(C_OTHER))
    staged.rollback()
    assert same_state(holds(handle), flat(A))


@pytest.mark.parametrize("where", ["refit half", "refit linear", "refit one"])
@pytest.mark.parametrize("fault", [Refusal(), KeyboardInterrupt()])
def test_a_rollback_after_a_refit_of_tensorrt_that_stopped_half_way(
    where: str, fault: BaseException
) -> None:
    engine, handle = opened()
    refit(engine, B)
    staged = stage(engine, C_OTHER)
    wire, old = handle.wire, type(handle.wire).__call__

    def trip(self: Any, label: str) -> None:
        if label == where:
            type(wire).__call__ = old
            raise fault
        old(self, label)

    type(wire).__call__ = trip
    try:
        with pytest.raises((EngineError, KeyboardInterrupt)):
            staged.commit()
    finally:
        type(wire).__call__ = old
    assert not same_state(holds(handle), flat(B))
    staged.rollback()
    assert same_state(holds(handle), flat(B))


def test_an_interrupt_between_a_refit_of_tensorrt_and_its_note() -> None:
    engine, handle = opened()
    refit(engine, B)
    staged = stage(engine, C_OTHER)
    noted = engine._direct.refitted

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    engine._direct.refitted = interrupted
    with pytest.raises(KeyboardInterrupt):
        staged.commit()
    engine._direct.refitted = noted
    staged.rollback()
    assert same_state(holds(handle), flat(B))


def test_an_interrupt_right_after_the_engine_was_put_in_place() -> None:
    engine, handle = opened()
    staged = stage(engine, B)
    put = handle.put

    def interrupted(one: Any) -> None:
        put(one)
        handle.put = put
        raise KeyboardInterrupt

    handle.put = interrupted
    with pytest.raises(KeyboardInterrupt):
        staged.commit()
    staged.rollback()
    assert same_state(holds(handle), flat(A))
    refit(engine, C_OTHER)
    assert same_state(holds(handle), flat(C_OTHER))
    refit(engine, B)
    assert same_state(holds(handle), flat(B))


class Gathering(PlacedEngine):
    """One weight lies in the order that integers tell, as where a gather of it was folded."""

    def write(self, name: str, data: bytes) -> None:
        super().write(name, data)
        if name in {"a", "order"}:
            self.given = {**getattr(self, "given", {}), name: data}
        if name in {"a", "order"} and len(self.given) > 1:
            a = torch.frombuffer(bytearray(self.given["a"]), dtype=torch.float32)
            order = torch.frombuffer(bytearray(self.given["order"]), dtype=torch.int32)
            place = self.places["a"]
            place.copy_(a[order.long()].view(place.shape))


@pytest.mark.parametrize("cached", [True, False])
def test_integers_that_move_weights(cached: bool) -> None:
    def values(seed: int, *order: int) -> Values:
        a = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        return {"a": a, "order": torch.tensor(order, dtype=torch.int32)}

    first = values(0, 0, 1, 2, 3)
    engine, handle = opened(Gathering, first)
    refit(engine, values(1, 0, 1, 2, 3))
    assert engine.route == ("direct", "")
    if cached:
        engine, handle = opened(Gathering, first)
    refit(engine, values(2, 3, 2, 0, 1))
    new = values(3, 3, 2, 0, 1)
    refit(engine, new)
    assert "stays fixed" in engine.route[1]
    # the engine of before has no such gather
    wanted = new["a"] if cached else new["a"][new["order"].long()]
    assert torch.equal(holds(handle)["a"], wanted)


class Epsilon(PlacedEngine):
    """Folds a norm with the eps that it was built with."""

    def write(self, name: str, data: bytes) -> None:
        self.given = {**getattr(self, "given", {}), name: data}
        kept = {"n_weight", "n_bias", "n_running_mean", "n_running_var", "n_eps"}
        if name not in kept:
            super().write(name, data)
        elif kept <= self.given.keys():
            w, b, mean, var = (
                torch.frombuffer(bytearray(self.given[f"n_{end}"]), dtype=torch.float32)
                for end in ("weight", "bias", "running_mean", "running_var")
            )
            scale = w / (var + 1e-5).double().sqrt().float()
            shift = (b.double() - mean.double() * scale.double()).float()
            for end, value in (("weight", scale), ("bias", shift)):
                place = self.places[f"n_{end}"]
                place.copy_(value.view(place.shape))


def test_an_eps_that_no_answer_shows() -> None:
    """Beside large variances, an eps is lost in rounding: that proves nothing of it."""

    def values(seed: int, eps: float) -> Values:
        g = torch.Generator().manual_seed(seed)
        found = {
            f"n_{end}": torch.rand(4, generator=g) + 1 for end in ("weight", "bias", "running_mean")
        }
        return {
            **found,
            "n_running_var": 1e4 * (torch.rand(4, generator=g) + 1),
            "n_eps": torch.tensor([eps]),
        }

    engine, handle = opened(Epsilon, values(0, 1e-5))
    refit(engine, values(1, 1e-5))
    new = values(2, 100.0)
    refit(engine, new)
    assert "other memory" in engine.route[1]
    assert same_state(holds(handle), flat(new))


def test_a_fixed_zero_that_changes_its_sign() -> None:
    engine, handle = opened(Built, {**A, "one": torch.tensor([0.0])})
    refit(engine, {**B, "one": torch.tensor([0.0])})
    assert "one" in engine._direct.writer.layout.fixed
    refit(engine, {**C, "one": torch.tensor([-0.0])})
    assert torch.signbit(holds(handle)["one"]).all()


@pytest.mark.parametrize("before", [True, False])
def test_an_engine_that_the_user_put_in_place_after_staging(before: bool) -> None:
    """As the refitter's way does, it fails and leaves that engine alone."""
    engine, handle = opened()
    if before:
        refit(engine, B)
    staged = stage(engine, C)
    mine = engine_from(handle.stored, handle.wire)
    handle.engine = mine
    with pytest.raises(EngineError):
        staged.commit()
    assert handle.engine is mine


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("committed", [True, False])
def test_an_engine_that_the_user_put_in_place_before_a_rollback(
    direct: bool, committed: bool
) -> None:
    engine, handle = opened(direct=direct)
    refit(engine, B)
    staged = stage(engine, C)
    if committed:
        staged.commit()
    handle.engine = engine_from(handle.stored, handle.wire)
    if not committed:
        with pytest.raises(EngineError):
            staged.commit()
    with pytest.raises(EngineError):
        staged.rollback()
    assert same_state(holds(handle), flat(A))


def test_bytes_that_are_stored_after_a_rollback() -> None:
    engine, handle = opened()
    stage(engine, B).discard()  # prepares an engine, of these bytes
    refit(engine, C_OTHER)
    handle.engine_bytes()
    staged = stage(engine, B)
    staged.commit()
    staged.rollback()
    assert same_state(holds(handle), flat(C_OTHER))
    assert same_state(engine_from(handle.engine_bytes(), handle.wire).values(), flat(C_OTHER))


class Late(PlacedEngine):
    """Only a call with a large input writes between the weights."""

    def answer(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.abs().max()) > 100:
            self.gap().add_(1)
        return super().answer(x)

    def gap(self) -> torch.Tensor:
        return self.pieces[1][256 + 64 : 256 + 64 + 8]


def test_what_an_unusual_call_has_written_between_the_weights() -> None:
    engine, handle = opened(Late)
    refit(engine, B)
    assert engine.route == ("direct", "")
    handle.engine.answer(torch.tensor([1000.0, 0.0, 0.0]))
    refit(engine, C)
    assert handle.engine.gap().tolist() == [1] * 8


# -- memory that runs out --------------------------------------------------------------------------


def test_without_memory_to_stage_in_the_refitter_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, handle = opened()

    def refused(*_: Any, **__: Any) -> Any:
        raise MemoryError("none left")

    monkeypatch.setattr(WeightBuffers, "moved", refused)
    for values in (B, C, A):
        refit(engine, values)
        assert engine.route[0] == "refitter"
        assert "none left" in engine.route[1]
        assert same_state(holds(handle), flat(values))


@pytest.mark.parametrize("what", ["refitted", "take_between"])
def test_a_rollback_of_tensorrt_needs_no_memory_to_compare(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, handle = opened()
    refit(engine, B)

    def refused(*_: Any) -> Any:
        raise MemoryError("none left")

    owner = route.DirectWriter if what == "refitted" else PlacedArena
    monkeypatch.setattr(owner, what, refused)
    staged = stage(engine, C_OTHER)
    staged.commit()
    assert same_state(holds(handle), flat(C_OTHER))
    staged.rollback()
    assert same_state(holds(handle), flat(B))
    for values in (C, C_OTHER, A):  # by TensorRT, whose values lie as in the engine still
        refit(engine, values)
        assert engine.route[0] == "refitter"
        assert same_state(holds(handle), flat(values))
    staged = engine.stage_partial(slot_values(engine, {"one": B["one"]}))
    staged.commit()
    assert same_state(holds(handle), flat({**A, "one": B["one"]}))
    staged.rollback()
    assert same_state(holds(handle), flat(A))
