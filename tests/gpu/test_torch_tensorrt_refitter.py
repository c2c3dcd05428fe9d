"""The persistent refitter on real engines of TensorRT: its rules are what the fakes say."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.refitter import PersistentRefitter
from refitkit.errors import EngineError, NotRefittableError
from tests.gpu.trt_helpers import needs_trt
from tests.gpu.trt_raw import CUDA, WIDTH, build, engine_on, reference, slot_values, values_of

pytestmark = needs_trt
A, B, C = (values_of(seed) for seed in range(3))
RUNTIMES = ["python", "cpp"]


@pytest.fixture(scope="module")
def trt() -> Any:
    return upstream.tensorrt()


@pytest.fixture(scope="module")
def data(trt: Any) -> bytes:
    return build(trt, A)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(1, 3, int(WIDTH**0.5), int(WIDTH**0.5), device=CUDA)


def right(answer: torch.Tensor, values: Any, x: torch.Tensor) -> bool:
    return torch.allclose(answer.cpu().double(), reference(values, x), atol=2e-2, rtol=2e-2)


def refit(engine: Any, values: Any) -> Any:
    staged = engine.stage(slot_values(engine, values))
    staged.commit()
    return staged


def on_gpu(values: Any) -> Any:
    return {name: value.cuda() for name, value in values.items()}


def test_facts_of_prototypes_and_of_refusals_agree(trt: Any, data: bytes) -> None:
    """What an engine says when it is asked, where it can be, and when it is tried."""
    told, _ = engine_on(data, trt)
    wanted = {name: ("float32", value.numel()) for name, value in A.items()}
    refitter = PersistentRefitter(told.handle.cuda_engine(), trt, CUDA)
    assert sorted(refitter.names()) == sorted(A)
    found = {name: refitter._probed_spec(name) for name in refitter.names()}
    assert {n: (f.dtype, f.count) if f else None for n, f in found.items()} == wanted
    if hasattr(refitter._refitter, "get_weights_prototype"):
        specs = refitter.specs({})
        assert {n: (f.dtype, f.count) for n, f in specs.items()} == wanted


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_there_and_back(trt: Any, data: bytes, x: torch.Tensor, runtime: str) -> None:
    engine, handle = engine_on(data, trt, runtime)
    assert right(handle(x), A, x)
    for values in (A, on_gpu(B)):  # from the host, from the device
        refit(engine, values)
        assert right(handle(x), values if values is A else B, x)
    answer_b = handle(x)
    refit(engine, on_gpu(A))
    answer_a = handle(x)
    refit(engine, B)
    assert torch.equal(handle(x), answer_b)
    refit(engine, A)
    assert torch.equal(handle(x), answer_a)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_rollback(trt: Any, data: bytes, x: torch.Tensor, runtime: str) -> None:
    engine, handle = engine_on(data, trt, runtime)
    built = handle(x)
    refit(engine, B).rollback()
    assert torch.equal(handle(x), built)  # by engine bytes
    refit(engine, B)
    before = handle(x)
    refit(engine, C).rollback()
    assert torch.equal(handle(x), before)
    staged = engine.stage_partial(slot_values(engine, {"conv BIAS": C["conv BIAS"]}))
    assert staged.changed()
    staged.commit()
    assert right(handle(x), {**B, "conv BIAS": C["conv BIAS"]}, x)
    staged.rollback()
    assert torch.equal(handle(x), before)


def test_warming_with_known_weights_keeps_the_answer(
    trt: Any, data: bytes, x: torch.Tensor
) -> None:
    engine, handle = engine_on(data, trt)
    before = handle(x)
    engine.adopt(slot_values(engine, A))
    engine.warm(lambda _: None)
    assert torch.equal(handle(x), before)
    refit(engine, B)
    assert right(handle(x), B, x)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_warming_with_unknown_weights_keeps_the_answer(
    trt: Any, data: bytes, x: torch.Tensor, runtime: str
) -> None:
    engine, handle = engine_on(data, trt, runtime)
    before = handle(x)
    engine.warm(lambda _: None)
    assert torch.equal(handle(x), before)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_stored_bytes_hold_refitted_weights_and_can_be_refitted(
    trt: Any, data: bytes, x: torch.Tensor, runtime: str
) -> None:
    engine, handle = engine_on(data, trt, runtime)
    refit(engine, B)
    again, other = engine_on(handle.engine_bytes(), trt, runtime)
    assert right(other(x), B, x)
    refit(again, C)
    assert right(other(x), C, x)
    assert right(handle(x), B, x)


def test_big_weights_of_the_host_come_in_chunks(
    trt: Any, data: bytes, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, handle = engine_on(data, trt)
    monkeypatch.setattr(engine._filler._uploader, "_chunk_bytes", 1000)
    refit(engine, B)
    assert right(handle(x), B, x)
    refit(engine, {**B, "dense CONSTANT": B["dense CONSTANT"].T.contiguous().T})
    assert right(handle(x), B, x)


def test_what_is_missing_is_refused_and_named(trt: Any, data: bytes) -> None:
    engine, handle = engine_on(data, trt)
    refitter = PersistentRefitter(handle.cuda_engine(), trt, CUDA)
    some = {"conv KERNEL": on_gpu(B)["conv KERNEL"].reshape(-1)}
    with suppress(EngineError):
        refitter.bind(engine.specs, some)
    missing = refitter._refitter.get_missing_weights()
    if not missing:
        pytest.skip("this engine merges nothing with the kernel")
    with pytest.raises(EngineError) as info:
        refitter.refit()
    assert {problem.subject for problem in info.value.problems} == set(missing)


def test_a_failed_rollback_by_bytes_is_an_error(trt: Any, data: bytes) -> None:
    engine, handle = engine_on(data, trt)
    staged = refit(engine, B)
    handle.fail = "replace"
    with pytest.raises(EngineError, match="on purpose"):
        staged.rollback()


def test_engines_without_the_flag_are_refused(trt: Any) -> None:
    fixed = build(trt, A, flag="TF32")
    engine, _ = engine_on(fixed, trt)
    with pytest.raises(NotRefittableError, match="immutable_weights=False"):
        assert engine.slots


def test_bytes_that_are_no_engine_are_refused(trt: Any) -> None:
    with pytest.raises(EngineError, match="TensorRT reports"):
        engine_on(b"no engine", trt)
