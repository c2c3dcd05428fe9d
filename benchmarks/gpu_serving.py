"""Calls beside refits on a GPU: the longest gaps, the throughput, and torn answers.

Callers make so many calls without refits, and then as many beside them. Each answer has to be that
of one of the two sets of weights, bit for bit.

usage: python benchmarks/gpu_serving.py MODEL DTYPE FILE [--calls N] [--every MS] [--way WAY]
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_direct import DEVICE, Measured, noted
from gpu_models import DTYPES, MODELS

from refitkit.builtin.torch_tensorrt import upstream

if TYPE_CHECKING:
    from collections.abc import Callable

WAYS = ("calls", "streams", "graphs")
STREAMS, CONTEXTS = 4, 2


class Context:
    """A context of an engine with outputs of its own, on one stream."""

    def __init__(self, measured: Measured, stream: Any, *, captured: bool) -> None:
        """Make it, and capture a call of it.

        Args:
            measured: The model; it has one engine.
            stream: The stream.
            captured: Whether calls replay a CUDA graph.
        """
        ((_, engine),) = measured.engines()
        self._compiled, self._stream = measured.compiled, stream
        cuda_engine, trt = engine.handle.cuda_engine(), upstream.tensorrt()
        self._context = cuda_engine.create_execution_context()
        names = [cuda_engine.get_tensor_name(i) for i in range(cuda_engine.num_io_tensors)]
        given = iter(measured.inputs)
        self._kept = []
        for name in names:
            if cuda_engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                value = next(given).clone()
                self._context.set_input_shape(name, tuple(value.shape))
            else:
                shape = tuple(self._context.get_tensor_shape(name))
                value = torch.empty(shape, dtype=measured.answer().dtype, device=DEVICE)
                self.output = value
            self._context.set_tensor_address(name, value.data_ptr())
            self._kept.append(value)
        self._graph = torch.cuda.CUDAGraph() if captured else None
        with torch.cuda.stream(stream):
            self._launch()
            stream.synchronize()
            if self._graph is not None:
                with torch.cuda.graph(self._graph, stream=stream):
                    self._launch()

    def _launch(self) -> None:
        assert self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream)

    def call(self) -> torch.Tensor:
        """Its output, once the device is done."""
        with torch.cuda.stream(self._stream):
            self._compiled.run_as_call(self._launch if self._graph is None else self._graph.replay)
            self._stream.synchronize()
        return self.output


class Service:
    """Threads that call until they have made so many calls."""

    def __init__(self, measured: Measured, way: str, calls: int) -> None:
        """Make what they call, and note the answers that are right.

        Args:
            measured: The model.
            way: One of ``WAYS``.
            calls: Calls of all threads together.
        """
        self._measured, self._calls = measured, calls
        self._callers: list[list[Callable[[], torch.Tensor]]]
        if way == "calls":
            self._callers = [[self._call]]
        else:
            streams = [torch.cuda.Stream() for _ in range(STREAMS)]
            self._callers = [
                [Context(measured, s, captured=way == "graphs").call for _ in range(CONTEXTS)]
                for s in streams
            ]
        self._right = []
        for number in (0, 1):
            measured.refit(number)
            self._right.append(self._callers[0][0]().clone())
        assert not torch.equal(*self._right)

    def _call(self) -> torch.Tensor:
        found: torch.Tensor = self._measured.compiled(*self._measured.inputs)
        torch.cuda.current_stream().synchronize()
        return found

    def run(self, every: float | None, calls: int = 0) -> dict[str, float]:
        """Make all calls.

        Args:
            every: Seconds from one refit to the next; None for no refits.
            calls: Another number of calls.
        """
        calls = (calls or self._calls) // len(self._callers)
        gaps: list[float] = []
        torn: list[torch.Tensor] = []
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._caller, args=(some, calls, gaps, torn))
            for some in self._callers
        ]
        refits: list[float] = []
        pauses: list[float] = []
        refitter = threading.Thread(target=self._refitter, args=(every, stop, refits, pauses))
        start = time.perf_counter()
        if every is not None:
            refitter.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - start
        stop.set()
        if every is not None:
            refitter.join()
        gaps.sort()
        counts = [int(one) for one in torn]
        found = {
            "calls": len(gaps),
            "calls_a_second": len(gaps) / took,
            "p50_ms": 1e3 * gaps[len(gaps) // 2],
            "p99_ms": 1e3 * gaps[int(len(gaps) * 0.99)],
            "p999_ms": 1e3 * gaps[int(len(gaps) * 0.999)],
            "max_ms": 1e3 * gaps[-1],
            "torn": sum(counts),
        }
        if refits:
            refits.sort()
            pauses.sort()
            found |= {
                "refits": len(refits),
                "refits_a_second": len(refits) / took,
                "refit_ms": 1e3 * refits[len(refits) // 2],
                "pause_p50_ms": 1e3 * pauses[len(pauses) // 2],
                "pause_max_ms": 1e3 * pauses[-1],
            }
        return found

    def _caller(
        self,
        some: list[Callable[[], torch.Tensor]],
        calls: int,
        gaps: list[float],
        torn: list[torch.Tensor],
    ) -> None:
        a, b = self._right
        wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
        last = time.perf_counter()
        with torch.cuda.stream(torch.cuda.Stream()):
            for number in range(calls):
                answer = some[number % len(some)]()
                now = time.perf_counter()
                gaps.append(now - last)
                # without a wait, and outside of what is timed
                wrong += ~((answer == a).all() | (answer == b).all())
                torch.cuda.current_stream().synchronize()
                last = time.perf_counter()
        torn.append(wrong)

    def _refitter(
        self, every: float | None, stop: threading.Event, refits: list[float], pauses: list[float]
    ) -> None:
        number, due = 0, time.perf_counter()
        while not stop.is_set():
            start = time.perf_counter()
            report = self._measured.refit(number % 2)
            refits.append(time.perf_counter() - start)
            pauses.append(report.pause_seconds)
            number += 1
            due = max(due + (every or 0), time.perf_counter())
            stop.wait(due - time.perf_counter())


def main() -> None:
    """Measure one model and write the results to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("dtype", choices=list(DTYPES))
    parser.add_argument("file", type=Path)
    parser.add_argument("--calls", type=int, default=10_000, help="calls of all threads together")
    parser.add_argument("--every", type=float, default=20, help="milliseconds between refits")
    parser.add_argument("--way", nargs="*", choices=WAYS, default=WAYS)
    given = parser.parse_args()
    if given.file.exists():
        return
    found: dict[str, Any] = {"model": given.model, "dtype": given.dtype}

    def measure() -> None:
        measured = Measured(given.model, given.dtype, found)
        for way in given.way:
            service = Service(measured, way, given.calls)
            service.run(None, 400)  # warms up
            alone, beside = service.run(None), service.run(given.every / 1e3)
            found[way] = {
                "alone": alone,
                "beside": beside,
                "p999_more_ms": beside["p999_ms"] - alone["p999_ms"],
                "throughput": beside["calls_a_second"] / alone["calls_a_second"],
            }

    noted(given.file, found, measure)


if __name__ == "__main__":
    main()
