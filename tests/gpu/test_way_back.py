"""Undo, restore, refits without a way back, and several modules as one, on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from tests.gpu.trt_helpers import PIPELINE, close, compiled_by_us, needs_trt, same
from tests.gpu.trt_models import Convolutions, Fallback, Several, inputs_of, randomized

if TYPE_CHECKING:
    from collections.abc import Callable

KEEPING = refitkit.Pipeline(PIPELINE.config.model_copy(update={"keep_base": True}))

KINDS = [Convolutions, Several, Fallback]
RUNTIMES = ["python", "cpp"]


def state(kind: Callable[[], torch.nn.Module], seed: int) -> dict[str, torch.Tensor]:
    return randomized(kind, seed).state_dict()


@needs_trt
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_back_to_the_last_and_to_the_first(
    kind: Callable[[], torch.nn.Module], runtime: str
) -> None:
    """TensorRT cannot be read: what it was given is kept, and at first what it was built from."""
    compiled, inputs = compiled_by_us(kind, runtime), inputs_of(kind)
    KEEPING.refit(compiled, state(kind, 0))  # the builder may have chosen other kernels
    first = compiled(*inputs)
    KEEPING.refit(compiled, state(kind, 1))
    middle = compiled(*inputs)
    result = KEEPING.refit(compiled, state(kind, 2))
    assert not close(compiled(*inputs), middle)
    result.undo()
    assert same(compiled(*inputs), middle)
    KEEPING.restore(compiled)
    assert same(compiled(*inputs), first)
    assert compiled.version == 5


@needs_trt
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_given_up(kind: Callable[[], torch.nn.Module]) -> None:
    compiled, inputs = compiled_by_us(kind), inputs_of(kind)
    KEEPING.refit(compiled, state(kind, 1))
    wanted = compiled(*inputs)
    KEEPING.refit(compiled, state(kind, 2))
    report = KEEPING.refit(compiled, state(kind, 1), rollback=False).report
    assert same(compiled(*inputs), wanted)
    assert "none" in {row.kind for row in report.memory}
    with pytest.raises(refitkit.NotRefittableError):
        compiled.restore()
    KEEPING.refit(compiled, state(kind, 2)).undo()
    assert same(compiled(*inputs), wanted)


@needs_trt
def test_two_runtimes_and_aotinductor_as_one() -> None:
    """The last one fails its verdict: all three answer as before."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(8, 4).cuda().eval(), torch.randn(2, 8, device="cuda")
    linear = refitkit.compile(torch.export.export(model, (x,)), prove=False)
    modules: list[Any] = [compiled_by_us(Convolutions, r) for r in RUNTIMES]
    inputs = inputs_of(Convolutions)
    before = [*(one(*inputs) for one in modules), linear(x)]
    jobs: list[Any] = [(one, state(Convolutions, 1)) for one in modules]
    later = torch.nn.Linear(8, 4).cuda().state_dict()
    wrong = {"inputs": (x,), "reference": torch.zeros(1, device="cuda")}
    with pytest.raises(refitkit.VerificationError):
        PIPELINE.refit_all([*jobs, (linear, later, wrong)])
    after = [*(one(*inputs) for one in modules), linear(x)]
    assert all(same(a, b) for a, b in zip(after, before, strict=True))
    results = PIPELINE.refit_all([*jobs, (linear, later)])
    assert all(close(one(*inputs), randomized(Convolutions, 1)(*inputs)) for one in modules)
    results.undo()
    assert same(linear(x), before[2])


def test_aotinductor_on_cuda_goes_back() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Linear(8, 4).cuda().eval(), torch.randn(2, 8, device="cuda")
    compiled = refitkit.compile(torch.export.export(model, (x,)), prove=False)
    first = compiled(x)
    one, two = (torch.nn.Linear(8, 4).cuda().state_dict() for _ in "ab")
    refitkit.refit(compiled, one)
    middle = compiled(x)
    refitkit.refit(compiled, two, rollback=False)
    with pytest.raises(refitkit.NotRefittableError):
        compiled.restore()
    refitkit.refit(compiled, one).undo()
    refitkit.refit(compiled, one)
    assert same(compiled(x), middle)
    assert not same(first, middle)
