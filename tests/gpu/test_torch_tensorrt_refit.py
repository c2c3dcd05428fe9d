"""The backend ``torch_tensorrt``: refits through the public API, compared with eager models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from tests.gpu.trt_helpers import (
    PIPELINE,
    close,
    compiled_by_us,
    eager,
    export,
    needs_trt,
    same,
)
from tests.gpu.trt_models import (
    Convolutions,
    Fallback,
    Several,
    Twins,
    Words,
    inputs_of,
    randomized,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = needs_trt
RUNTIMES = ["python", "cpp"]
CONVOLUTION = "torch.ops.aten.convolution.default"


def resnet18() -> torch.nn.Module:
    models = pytest.importorskip("torchvision.models")
    return models.resnet18(weights=None)  # type: ignore[no-any-return]


def inputs_for(kind: Callable[[], torch.nn.Module]) -> tuple[torch.Tensor, ...]:
    if kind is resnet18:
        torch.manual_seed(99)
        return (torch.randn(1, 3, 224, 224, device="cuda"),)
    return inputs_of(kind)


def answers_of(compiled: Any, kind: Callable[[], torch.nn.Module]) -> Any:
    return compiled(*inputs_for(kind))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", [Convolutions, Words, Several, Twins, Fallback])
def test_a_to_b_to_a(kind: Callable[[], torch.nn.Module], runtime: str) -> None:
    compiled = compiled_by_us(kind, runtime)
    inputs = inputs_of(kind)
    a, b = randomized(kind, 0), randomized(kind, 1)
    assert close(compiled(*inputs), a(*inputs))
    PIPELINE.refit(compiled, a, inputs=inputs)
    first = compiled(*inputs)
    result = PIPELINE.refit(compiled, b.state_dict(), inputs=inputs)
    assert result.report.verification
    assert result.report.verification.ok
    assert close(compiled(*inputs), b(*inputs))
    assert not close(compiled(*inputs), a(*inputs))
    PIPELINE.refit(compiled, a.state_dict(), inputs=inputs)
    assert same(compiled(*inputs), first)


def test_a_real_convolutional_network() -> None:
    inputs = inputs_for(resnet18)
    program = export(randomized(resnet18, 0), inputs)
    compiled = PIPELINE.compile(program, "torch_tensorrt", {"min_block_size": 1}, prove=False)
    new = randomized(resnet18, 1)
    PIPELINE.refit(compiled, new, inputs=inputs)
    assert close(compiled(*inputs), new(*inputs))


def test_defaults_pass_their_own_verification() -> None:
    inputs = inputs_of(Convolutions)
    program = export(randomized(Convolutions, 0), inputs)
    compiled = refitkit.compile(program, "torch_tensorrt")
    result = refitkit.refit(compiled, randomized(Convolutions, 1), inputs=inputs)
    assert result.report.verification
    assert result.report.verification.ok


def test_every_slot_of_every_engine_is_planned() -> None:
    compiled = compiled_by_us(Convolutions)
    assert compiled.plan
    planned = {(row.slot.engine, row.slot.name): row for row in compiled.plan.ledger}
    held = {(slot.engine, slot.name): slot for slot in compiled.slots}
    assert planned.keys() == held.keys()
    for key, slot in held.items():
        row = planned[key].slot
        assert (row.dtype, row.count) == (slot.dtype, slot.count)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_several_engines_with_torch_between(runtime: str) -> None:
    compiled = compiled_by_us(Convolutions, runtime, torch_executed_ops={CONVOLUTION})
    assert len(compiled.engines) > 2
    PIPELINE.refit(compiled, randomized(Convolutions, 1), inputs=inputs_of(Convolutions))
    assert close(answers_of(compiled, Convolutions), eager(Convolutions, 1))


def test_a_model_that_was_moved_off_the_gpu_for_compiling() -> None:
    compiled = compiled_by_us(Convolutions, offload_module_to_cpu=True)
    PIPELINE.refit(compiled, randomized(Convolutions, 1), inputs=inputs_of(Convolutions))
    assert close(answers_of(compiled, Convolutions), eager(Convolutions, 1))


def test_what_torch_executes_is_refitted_too() -> None:
    executed = {"torch.ops.aten.mul.Tensor", "torch.ops.aten.cumsum.default"}
    compiled = compiled_by_us(Fallback, torch_executed_ops=executed)
    assert any(slot.readable for slot in compiled.slots)
    new = randomized(Fallback, 0)
    with torch.no_grad():
        new.scale.mul_(3)  # type: ignore[operator, union-attr]
    inputs = inputs_of(Fallback)
    before = compiled(*inputs)
    PIPELINE.refit(compiled, new, inputs=inputs)
    assert not close(compiled(*inputs), before)
    assert close(compiled(*inputs), new(*inputs))


def test_weights_of_the_host_and_of_a_file(tmp_path: Path) -> None:
    compiled = compiled_by_us(Several)
    state = {name: v.cpu() for name, v in randomized(Several, 1).state_dict().items()}
    PIPELINE.refit(compiled, state, inputs=inputs_of(Several))
    from_host = answers_of(compiled, Several)
    assert close(from_host, eager(Several, 1))
    torch.save(state, tmp_path / "b.pt")
    PIPELINE.refit(compiled, randomized(Several, 2), inputs=inputs_of(Several))
    PIPELINE.refit(compiled, tmp_path / "b.pt", inputs=inputs_of(Several))
    assert same(answers_of(compiled, Several), from_host)


def test_equal_values_are_told_apart() -> None:
    """The layers c and d begin with equal values; only the names say which is which."""
    compiled = compiled_by_us(Twins)
    new = randomized(Twins, 1)
    with torch.no_grad():
        new.c.weight.mul_(2)  # type: ignore[operator, union-attr]
    PIPELINE.refit(compiled, new, inputs=inputs_of(Twins))
    assert close(answers_of(compiled, Twins), new(*inputs_of(Twins)))


def test_weights_that_are_no_longer_tied_are_refused() -> None:
    compiled = compiled_by_us(Twins)
    before = answers_of(compiled, Twins)
    state = randomized(Twins, 1).state_dict()
    state["b.weight"] = state["b.weight"] + 1
    with pytest.raises(refitkit.WeightMismatchError, match="tie"):
        PIPELINE.refit(compiled, state)
    assert same(answers_of(compiled, Twins), before)


def test_partial_refits() -> None:
    compiled = compiled_by_us(Several)
    inputs = inputs_of(Several)
    PIPELINE.refit(compiled, randomized(Several, 0), inputs=inputs)
    new = randomized(Several, 0)
    with torch.no_grad():
        new.b.bias.add_(5)  # type: ignore[operator, union-attr]
    part = {"b.bias": new.state_dict()["b.bias"]}
    if not any(getattr(engine, "name_map", None) for engine in compiled.engines.values()):
        with pytest.raises(refitkit.UnmappedSlotError):  # until recipes are recorded
            PIPELINE.refit(compiled, part, partial=True, inputs=inputs, reference=new)
        return
    PIPELINE.refit(compiled, part, partial=True, inputs=inputs, reference=new)
    assert close(compiled(*inputs), new(*inputs))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_hundred_refits_in_a_row(runtime: str) -> None:
    compiled = compiled_by_us(Several, runtime)
    inputs = inputs_of(Several)
    states = [randomized(Several, seed).state_dict() for seed in (0, 1)]
    wanted = []
    for state in states:
        PIPELINE.refit(compiled, state, verify="none")
        wanted.append(compiled(*inputs))
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    for number in range(100 if runtime == "python" else 20):
        PIPELINE.refit(compiled, states[number % 2], verify="none")
        assert same(compiled(*inputs), wanted[number % 2])
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= held + (1 << 20)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_warming_changes_nothing(runtime: str) -> None:
    compiled = compiled_by_us(Several, runtime)
    before = answers_of(compiled, Several)
    told: list[str] = []
    compiled.warm(told.append)
    assert told
    assert same(answers_of(compiled, Several), before)


def test_a_refused_refit_changes_nothing() -> None:
    compiled = compiled_by_us(Several)
    before = answers_of(compiled, Several)
    bad = randomized(Several, 1).state_dict()
    bad["a.weight"] = bad["a.weight"].half()
    bad["b.bias"] = bad["b.bias"][:3]
    with pytest.raises(refitkit.WeightMismatchError) as info:
        PIPELINE.refit(compiled, bad)
    assert {problem.subject for problem in info.value.problems} == {"a.weight", "b.bias"}
    assert same(answers_of(compiled, Several), before)


@pytest.mark.parametrize("known", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_bad_verdict_changes_nothing(runtime: str, known: bool) -> None:
    compiled = compiled_by_us(Fallback, runtime)
    inputs = inputs_of(Fallback)
    if known:
        PIPELINE.refit(compiled, randomized(Fallback, 2), inputs=inputs)
    before = compiled(*inputs)
    wrong = randomized(Fallback, 3)
    with pytest.raises(refitkit.VerificationError):
        PIPELINE.refit(compiled, randomized(Fallback, 1), inputs=inputs, reference=wrong)
    assert same(compiled(*inputs), before)
    PIPELINE.refit(compiled, randomized(Fallback, 1), inputs=inputs)
    assert close(compiled(*inputs), eager(Fallback, 1))


class Faulty:
    """A staged refit whose commit fails, before or after it has done its work."""

    def __init__(self, real: Any, when: str) -> None:
        self.real, self.when = real, when

    def commit(self) -> None:
        if self.when == "after":
            self.real.commit()
        raise RuntimeError("on purpose")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("known", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_engine_that_fails_takes_all_others_back(
    runtime: str, known: bool, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = compiled_by_us(Fallback, runtime)
    inputs = inputs_of(Fallback)
    if known:
        PIPELINE.refit(compiled, randomized(Fallback, 2), inputs=inputs)
    before = compiled(*inputs)
    last = [engine for engine in compiled.engines.values() if engine.slots][-1]
    real = last.stage
    with monkeypatch.context() as patched:
        patched.setattr(last, "stage", lambda values: Faulty(real(values), when))
        with pytest.raises(refitkit.EngineError, match="on purpose"):
            PIPELINE.refit(compiled, randomized(Fallback, 1), inputs=inputs)
    assert same(compiled(*inputs), before)
    PIPELINE.refit(compiled, randomized(Fallback, 1), inputs=inputs)
    assert close(compiled(*inputs), eager(Fallback, 1))


def test_saving_and_loading_after_a_refit(tmp_path: Path) -> None:
    compiled = compiled_by_us(Several, "cpp")
    inputs = inputs_of(Several)
    PIPELINE.refit(compiled, randomized(Several, 1), inputs=inputs)
    compiled.save(tmp_path / "b.refitkit")
    loaded = PIPELINE.load(tmp_path / "b.refitkit")
    assert close(loaded(*inputs), eager(Several, 1))
    PIPELINE.refit(loaded, randomized(Several, 2), inputs=inputs)
    assert close(loaded(*inputs), eager(Several, 2))
    assert close(compiled(*inputs), eager(Several, 1))


def test_a_copy_is_refitted_on_its_own() -> None:
    compiled = compiled_by_us(Several)
    inputs = inputs_of(Several)
    before = compiled(*inputs)
    result = PIPELINE.refit(compiled, randomized(Several, 1), inputs=inputs, copy=True)
    assert same(compiled(*inputs), before)
    assert close(result.module(*inputs), eager(Several, 1))


def test_the_callers_tensors_and_model_are_left_alone() -> None:
    compiled = compiled_by_us(Several)
    state = randomized(Several, 1).state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    PIPELINE.refit(compiled, state, inputs=inputs_of(Several))
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    answer = answers_of(compiled, Several)
    for value in state.values():
        value.zero_()
    assert same(answers_of(compiled, Several), answer)
    assert torch.is_grad_enabled()
