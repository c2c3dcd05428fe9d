"""Live updates on a GPU: bit-equal to a refit, with buffers that are used again, beside calls."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from tests.gpu.trt_helpers import PIPELINE, compiled_by_us, needs_trt, same
from tests.gpu.trt_models import Convolutions, Fallback, Several, inputs_of, randomized

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS = [Convolutions, Several, Fallback]


def state(kind: Callable[[], torch.nn.Module], seed: int) -> dict[str, torch.Tensor]:
    return randomized(kind, seed).state_dict()


def push(receiver: refitkit.WeightReceiver, weights: dict[str, torch.Tensor], label: str) -> Any:
    """Send tensors from a side stream, all of one size through the same memory of the device."""
    stream = torch.cuda.Stream()
    buffers: dict[Any, torch.Tensor] = {}
    receiver.start_weight_update(label)
    for name, value in weights.items():
        key = value.shape, value.dtype
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)  # the copy below is not done when it is sent
            buffer = buffers.setdefault(key, torch.empty_like(value, device="cuda"))
            buffer.copy_(value, non_blocking=True)
            receiver.update_weights(weights={name: buffer})
    return receiver.finish_weight_update()


@needs_trt
@pytest.mark.parametrize("runtime", ["python", "cpp"])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_equal_refits(kind: Callable[[], torch.nn.Module], runtime: str) -> None:
    updated, refitted = (compiled_by_us(kind, runtime) for _ in range(2))
    inputs = inputs_of(kind)
    for module in (updated, refitted):
        PIPELINE.refit(module, state(kind, 0))
    receiver = refitkit.WeightReceiver(updated)
    for seed in (1, 2, 3):
        PIPELINE.refit(refitted, state(kind, seed))
        (result,) = push(receiver, state(kind, seed), f"seed-{seed}")
        assert same(updated(*inputs), refitted(*inputs))
        assert updated.label == f"seed-{seed}"
    before = updated(*inputs)
    result.undo()
    assert not same(updated(*inputs), before)


@needs_trt
@pytest.mark.parametrize("end", ["abort", "missing", "nan"])
def test_an_update_that_ends_early_changes_no_bit(end: str) -> None:
    compiled, inputs = compiled_by_us(Convolutions), inputs_of(Convolutions)
    PIPELINE.refit(compiled, state(Convolutions, 1))
    before = compiled(*inputs)
    receiver = refitkit.WeightReceiver(compiled)
    for _ in range(2):
        weights = {name: value.cuda() for name, value in state(Convolutions, 2).items()}
        last = next(name for name, t in reversed(weights.items()) if t.is_floating_point())
        receiver.start_weight_update()
        if end == "nan":
            weights[last] = torch.full_like(weights[last], float("nan"))
        else:
            del weights[last]
        receiver.update_weights(weights=weights)
        if end == "abort":
            assert receiver.abort_weight_update()
        else:
            with pytest.raises(refitkit.WeightMismatchError):
                receiver.finish_weight_update()
        assert same(compiled(*inputs), before)
    PIPELINE.refit(compiled, state(Convolutions, 1))
    assert same(compiled(*inputs), before)


@needs_trt
def test_no_call_sees_a_mixture() -> None:
    compiled, inputs = compiled_by_us(Convolutions), inputs_of(Convolutions)
    wanted = []
    for seed in (1, 2):
        PIPELINE.refit(compiled, state(Convolutions, seed))
        wanted.append([t.clone() for t in torch.utils._pytree.tree_leaves(compiled(*inputs))])
    stop, torn, calls = threading.Event(), list[Any](), list[int]()

    def call() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            while not stop.is_set():
                found = [t.clone() for t in torch.utils._pytree.tree_leaves(compiled(*inputs))]
                stream.synchronize()
                calls.append(1)
                if not any(same(found, one) for one in wanted):
                    torn.append(found)

    # one caller: engines of torch_tensorrt are not for several threads
    threads = [threading.Thread(target=call)]
    for thread in threads:
        thread.start()
    receiver = refitkit.WeightReceiver(compiled)
    for number in range(20):
        push(receiver, state(Convolutions, 1 + number % 2), str(number))
    stop.set()
    for thread in threads:
        thread.join()
    assert calls
    assert not torn


@pytest.mark.parametrize("kind", [Convolutions, Several])
def test_updates_of_aotinductor(kind: Callable[[], torch.nn.Module]) -> None:
    inputs = inputs_of(kind)
    model = randomized(kind, 0).cuda()
    compiled = refitkit.compile(torch.export.export(model, inputs), prove=False)
    receiver = refitkit.WeightReceiver(compiled)
    for seed in (1, 2):
        weights = {name: value.cuda() for name, value in state(kind, seed).items()}
        push(receiver, weights, str(seed))
        held = {slot.name: compiled.read(slot.name) for slot in compiled.slots}
        assert all(torch.equal(held[n], weights[n]) for n in held if n in weights)
