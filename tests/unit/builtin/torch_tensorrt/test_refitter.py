"""The wrapper of ``tensorrt.Refitter``."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from refitkit.builtin.torch_tensorrt.refitter import (
    DeserializedEngine,
    PersistentRefitter,
    serialize_engine,
)
from refitkit.errors import EngineError, NotRefittableError
from tests.fakes import Tripwire, same_state, slot_for
from tests.unit.builtin.torch_tensorrt.fake_trt import (
    DataType,
    FakeCudaEngine,
    FakeRefitter,
    Flags,
    OldFlags,
    Refusal,
    TellingRefitter,
    engine_from,
    fake_trt,
)
from tests.unit.builtin.torch_tensorrt.scenes import CPU

VALUES = {
    "w": torch.arange(6.0),
    "h": torch.ones(3).half(),
    "i": torch.arange(4),
    "f8": torch.ones(2).to(torch.float8_e4m3fn),
    "one": torch.tensor([7.0]),
    "none": torch.zeros(0),
}


def made(kind: type[FakeRefitter] = TellingRefitter, *groups: Any) -> tuple[Any, Any]:
    wire = Tripwire()
    engine = FakeCudaEngine.of(VALUES, wire, *groups)
    return PersistentRefitter(engine, fake_trt(wire, kind), CPU), engine


def specs_as_tuples(specs: Any) -> Any:
    return {name: (spec.dtype, spec.count) for name, spec in specs.items()}


WANTED = {name: (str(v.dtype)[6:], v.numel()) for name, v in VALUES.items()}


def test_facts_come_from_prototypes() -> None:
    refitter, _ = made()
    assert specs_as_tuples(refitter.specs({})) == WANTED


def test_shapes_come_from_what_is_known_where_it_fits() -> None:
    refitter, _ = made()
    known = {"w": slot_for("w", torch.zeros(2, 3)), "h": slot_for("h", torch.zeros(9))}
    specs = refitter.specs(known)
    assert (specs["w"].shape, specs["h"].shape) == ((2, 3), None)
    assert specs_as_tuples(specs) == WANTED


def test_old_versions_are_asked_by_trying() -> None:
    refitter, _ = made(FakeRefitter)
    specs = refitter.specs({})
    assert specs_as_tuples(specs) == WANTED


def test_types_that_are_taken_with_a_warning_are_not_believed() -> None:
    class Lax(FakeRefitter):
        deaf = False

        def set_named_weights(self, name: str, weights: Any, location: Any) -> bool:
            kind, _ = self.engine.held[name]
            if kind is DataType.HALF and weights.dtype is DataType.FLOAT:
                if not self.deaf:
                    self.say(1 + 1, "types different than those used to build: deprecated")
                weights = type(weights)(kind, weights.address, weights.size)
            return super().set_named_weights(name, weights, location)

    refitter, _ = made(Lax)
    assert specs_as_tuples(refitter.specs({})) == WANTED
    refitter._refitter.deaf = True
    with pytest.raises(NotRefittableError, match="h: unknown"):
        refitter.specs({})


def test_old_versions_believe_what_is_known() -> None:
    refitter, engine = made(FakeRefitter)
    engine.held = {"w": engine.held["w"]}
    specs = refitter.specs({"w": slot_for("w", torch.zeros(2, 3))})
    assert specs["w"].shape == (2, 3)
    assert not [label for label in engine.wire.calls if label.startswith("set")]


def test_what_nobody_knows_is_named() -> None:
    class Mute(FakeRefitter):
        def set_named_weights(self, *args: Any) -> bool:
            return False

    refitter, _ = made(Mute)
    with pytest.raises(NotRefittableError, match="plan") as info:
        refitter.specs({})
    assert [problem.subject for problem in info.value.problems] == list(VALUES)


def test_types_of_half_a_byte_are_kept_in_bytes() -> None:
    refitter, engine = made()

    class Half:
        dtype, size = DataType.FP4, 5

    engine.held = {"q": (DataType.INT8, b"abc")}
    refitter._refitter.get_weights_prototype = lambda name: Half
    spec = refitter.specs({})["q"]
    assert (spec.dtype, spec.count, spec.trt_type, spec.trt_count) == ("uint8", 3, "FP4", 5)


def test_types_that_torch_lacks_are_refused() -> None:
    refitter, engine = made()
    engine.held["c"] = (DataType.COMPLEX, b"\0" * 8)
    with pytest.raises(NotRefittableError, match="c: dtype, found TensorRT's COMPLEX"):
        refitter.specs({})


def bound(kind: type[FakeRefitter] = TellingRefitter) -> tuple[Any, Any, Any]:
    refitter, engine = made(kind)
    buffers = {name: v.clone() for name, v in VALUES.items()}
    refitter.bind(refitter.specs({}), buffers)
    return refitter, engine, buffers


@pytest.mark.parametrize("kind", [TellingRefitter, FakeRefitter])
def test_names_are_set_once_for_many_refits(kind: type[FakeRefitter]) -> None:
    refitter, engine, buffers = bound(kind)
    sets = refitter._refitter.sets
    for fill in (1, 2, 3):
        buffers["w"].fill_(fill)
        refitter.refit()
        assert same_state(engine.values(), buffers)
    assert refitter._refitter.sets == sets


def test_what_tensorrt_refuses_is_listed_with_its_reasons() -> None:
    refitter, _ = made()
    specs = refitter.specs({})
    bad = {**VALUES, "w": torch.arange(6)}
    specs["w"] = type(specs["w"])("w", "int64", 6, "INT64", 6)
    specs["h"] = type(specs["h"])("h", "float16", 2, "HALF", 2)
    with pytest.raises(EngineError, match=r"prototype data type FLOAT.*prototype count 3") as info:
        refitter.bind(specs, bad)
    assert [(p.subject, p.kind) for p in info.value.problems] == [
        ("w", "refused"),
        ("h", "refused"),
    ]
    assert "chatter" not in str(info.value)
    assert "registered" not in str(info.value)


def test_missing_weights_of_a_group_are_listed() -> None:
    refitter, _ = made(TellingRefitter, ("w", "h"))
    specs = refitter.specs({})
    with pytest.raises(EngineError) as info:
        refitter.bind(specs, {"w": VALUES["w"].clone()})
    assert [(p.subject, p.kind) for p in info.value.problems] == [("h", "missing")]
    with pytest.raises(EngineError, match="needed Weights") as info:
        refitter.refit()
    assert [(p.subject, p.kind) for p in info.value.problems] == [("h", "missing")]


def test_a_failed_refit_tells_why() -> None:
    refitter, engine, _ = bound()
    engine.wire.arm({0: Refusal()})
    with pytest.raises(EngineError, match="TensorRT reports: could not refit"):
        refitter.refit()


def test_engines_without_the_flag_are_refused() -> None:
    wire = Tripwire()
    engine = FakeCudaEngine(wire, {}, refittable=False)
    with pytest.raises(NotRefittableError, match="immutable_weights=False"):
        PersistentRefitter(engine, fake_trt(wire), CPU)


@pytest.mark.parametrize("flags", [Flags, OldFlags])
def test_bytes_hold_the_weights_and_can_be_refitted_again(flags: Any) -> None:
    wire = Tripwire()
    trt = fake_trt(wire, flags=flags)
    engine = FakeCudaEngine.of(VALUES, wire)
    data = serialize_engine(engine, trt)
    again = DeserializedEngine(data, trt).engine
    assert same_state(again.values(), engine.values())
    assert again.refittable is (flags is Flags)
    assert same_state(engine_from(data, wire).values(), engine.values())


@pytest.mark.parametrize("label", ["set_flag", "serialize", "deserialize"])
def test_refusals_of_bytes_are_errors(label: str) -> None:
    wire = Tripwire()
    trt, engine = fake_trt(wire), FakeCudaEngine.of(VALUES, wire)
    data = serialize_engine(engine, trt)
    DeserializedEngine(data, trt)
    faults = {wire.calls.index(label): Refusal()}
    wire.arm(faults)
    with pytest.raises(EngineError, match=r"serialize|no such engine"):
        DeserializedEngine(serialize_engine(engine, trt), trt)


def test_a_flag_that_does_not_go_away_is_an_error() -> None:
    wire = Tripwire()
    engine = FakeCudaEngine.of(VALUES, wire)
    config = engine.create_serialization_config()
    config.clear_flag = lambda flag: False
    engine.create_serialization_config = lambda: config
    with pytest.raises(EngineError, match="EXCLUDE_WEIGHTS"):
        serialize_engine(engine, fake_trt(wire))


@pytest.mark.parametrize("idle", [True, False])
def test_what_is_waited_for(monkeypatch: pytest.MonkeyPatch, idle: bool) -> None:
    """A wait for the whole device grows with every refitter, so it is left out where it can be."""
    done: list[str] = []
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: done.append("own stream"))
    pending = SimpleNamespace(synchronize=lambda: done.append("current stream"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: done.append("device"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: pending)
    refitter, _ = made()
    refitter.bind(refitter.specs({}), VALUES)
    refitter._stream, refitter._device = stream, torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(
        refitter._refitter,
        "refit_cuda_engine_async",
        lambda given: done.append(f"refit on {given}") or True,
        raising=False,
    )
    refitter.refit(idle=idle)
    assert done == ["current stream" if idle else "device", "refit on 7", "own stream"]
