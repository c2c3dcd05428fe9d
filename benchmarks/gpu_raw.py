"""What refits are compared with: TensorRT's refitter used by hand, upstream's function, copies."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from gpu_models import exported

from refitkit.builtin.torch_tensorrt import upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.export import ExportedProgram

    import refitkit

Values = dict[str, torch.Tensor]
Slots = dict[str, Values]


def seconds(call: Callable[[], Any]) -> float:
    """Until the device has done all of it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def many(call: Callable[[int], Any], runs: int, limit: float = 4.0) -> list[float]:
    """Times of calls that get their number, after two that do not count.

    Args:
        call: What is timed.
        runs: So many, if there is time.
        limit: Stops after so many seconds, but not before the fifth.
    """
    for number in range(2):
        call(number)
    found: list[float] = []
    start = time.perf_counter()
    while len(found) < runs and (len(found) < 5 or time.perf_counter() - start < limit):
        found.append(seconds(lambda: call(len(found))))
    return found


def busy(limit: float = 0.4) -> None:
    """Keep the device busy, so that its clock is up: an idle one is slow for a while."""
    some = torch.ones(2048, 2048, device="cuda")
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        for _ in range(20):
            some = some @ some
        torch.cuda.synchronize()


def waiting() -> float:
    """Milliseconds of a wait for a device that has nothing to do; the median of 20."""
    return statistics.median(seconds(lambda: None) for _ in range(20)) * 1e3


def yardstick() -> float:
    """Milliseconds of a fixed piece of plain Python: how fast this process is just now.

    On shared machines it is three times as fast at one time as at another.
    """
    found = []
    for _ in range(5):
        start, kept = time.perf_counter(), dict[int, tuple[int, str]]()
        for number in range(10_000):
            kept[number & 255] = (number, str(number))
        found.append(time.perf_counter() - start)
    return statistics.median(found) * 1e3


def copies(nbytes: int) -> dict[str, float]:
    """Milliseconds of copies of so many bytes, each in one piece; medians of 20."""
    here = torch.ones(nbytes, dtype=torch.uint8, device="cuda")
    there = torch.empty_like(here)
    pinned = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)
    pageable = torch.ones(nbytes, dtype=torch.uint8)
    named = {"device_ms": here, "pinned_ms": pinned, "pageable_ms": pageable}
    return {
        name: statistics.median(
            many(lambda _, value=value: there.copy_(value, non_blocking=True), 20)  # type: ignore[misc]
        )
        * 1e3
        for name, value in named.items()
    }


class ByHand:
    """What somebody writes who knows all names: TensorRT's refitter, and buffers on the device."""

    def __init__(self, engine: Any, values: Mapping[str, torch.Tensor]) -> None:
        """Make a refitter and buffers, and set all names.

        Args:
            engine: An ``ICudaEngine``.
            values: A value for each weight, on the device.
        """
        self._trt = upstream.tensorrt()
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        self.refitter = self._trt.Refitter(engine, self._logger)
        self.buffers = {name: value.clone().contiguous() for name, value in values.items()}
        self._stream = torch.cuda.Stream()
        self.point(self.buffers)

    def point(self, values: Mapping[str, torch.Tensor]) -> None:
        """Set all names to these tensors."""
        from torch_tensorrt._enums import dtype

        for name, value in values.items():
            kind = dtype._from(value.dtype).to(self._trt.DataType)
            weights = self._trt.Weights(kind, value.data_ptr(), value.numel())
            assert self.refitter.set_named_weights(name, weights, self._trt.TensorLocation.DEVICE)

    def refit(self) -> None:
        """Refit to what the names point to."""
        self._stream.wait_stream(torch.cuda.current_stream())
        assert self.refitter.refit_cuda_engine_async(self._stream.cuda_stream)
        self._stream.synchronize()

    def copied(self, values: Mapping[str, torch.Tensor]) -> None:
        """Copy values into the buffers, and refit."""
        for name, value in values.items():
            self.buffers[name].copy_(value)
        self.refit()


def ready_values(compiled: refitkit.CompiledModule, state: Values) -> Slots:
    """Values of all slots, each in memory of its own on the device."""
    assert compiled.plan
    found = compiled.plan.materialize(state, device="cuda")
    return {
        engine: {name: value.clone().contiguous() for name, value in slots.items()}
        for engine, slots in found.items()
    }


def upstream_compiled(program: ExportedProgram, inputs: tuple[Any, ...], **options: Any) -> Any:
    """A module that upstream compiled, in the Python runtime."""
    chosen = {"use_python_runtime": True, "min_block_size": 1, **options}
    return upstream.torch_tensorrt().dynamo.compile(program, arg_inputs=inputs, **chosen)


def upstream_refit(module: Any, model: torch.nn.Module, inputs: Any, *, cached: bool) -> float:
    """Seconds from new weights in a model to a refitted module, in place: export and refit."""
    theirs = upstream.torch_tensorrt().dynamo.refit_module_weights
    return seconds(
        lambda: theirs(module, exported(model, inputs), use_weight_map_cache=cached, in_place=True)
    )
