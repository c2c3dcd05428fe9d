"""Models to serve, threads that call them, and refits: what the parts of ``serving.py`` share.

All weights are one of two constant sets. Every layer computes ``x`` with set 0, and ``2 * x + 1``
with set 1. Inputs are ones. So every output is 1 with set 0 and ``2 ** (layers + 1) - 1`` with
set 1, exactly, and a call that mixed two sets gives a number between them.

As a script, this file computes with torch alone, without refitkit: a control.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import threading
import time
from bisect import bisect_right
from typing import TYPE_CHECKING, Self

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import TracebackType

    from refitkit import CompiledModule

State = dict[str, torch.Tensor]

MODELS = 2
"""Calls that a module runs side by side: one for each core of the machine of the targets."""
SHAPES = {"small": (3, 16), "large": (4, 2048), "wide": (12, 2048)}
"""Number of linear layers and their width, by model: 3 kB, 67 MB and 201 MB of weights."""
CALL_S = 0.1
"""Length of a long call."""
PATIENCE_S = 60.0

torch.set_num_threads(1)


# -- models -----------------------------------------------------------------------------------


def linear(name: str) -> torch.nn.Module:
    """A model without values."""
    layers, width = SHAPES[name]
    with torch.device("meta"):
        return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers))).eval()


def state(name: str, one: int) -> State:
    """A new copy of one of the two weight sets; powers of two, so that sums are exact."""
    value = {"weight": (1 + one) / SHAPES[name][1], "bias": float(one)}
    shapes = linear(name).state_dict()
    return {fqn: torch.full(t.shape, value[fqn.rpartition(".")[2]]) for fqn, t in shapes.items()}


def output(name: str, one: int, batch: int = 1) -> torch.Tensor:
    """The output with one of the two sets."""
    layers, width = SHAPES[name]
    return torch.full((batch, width), float(2 ** (layers + 1) - 1 if one else 1))


def inputs(name: str, batch: int = 1) -> torch.Tensor:
    return torch.ones(batch, SHAPES[name][1])


def nbytes(some: State) -> int:
    return sum(tensor.nbytes for tensor in some.values())


def build(name: str, folder: Path) -> CompiledModule:
    """Compile a model with set 0 and save it."""
    import refitkit

    model = linear(name)
    model.load_state_dict(state(name, 0), assign=True)
    batch = torch.export.Dim("batch", min=1, max=65536)
    program = torch.export.export(model, (inputs(name, 8),), dynamic_shapes=({0: batch},))
    compiled = refitkit.compile(program, prove=False)
    compiled.save(folder / f"{name}.refitkit")
    return compiled


def batch_for(call: Callable[[torch.Tensor], object], seconds: float) -> int:
    """The batch with which a call of the large model takes about so long."""
    probe = 64
    times = [timed(lambda: call(inputs("large", probe))) for _ in range(7)]
    return max(1, round(probe * seconds / statistics.median(times)))


# -- times ------------------------------------------------------------------------------------


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def quantile(times: Sequence[float], share: float) -> float:
    """The smallest time that at least this share of all does not exceed."""
    return sorted(times)[max(0, math.ceil(share * len(times)) - 1)]


def spread(count: int) -> list[float]:
    """Shares of a call from 2 to 95 %: one from each of ``count`` equal parts, in random order."""
    shares = 0.02 + 0.93 * (torch.arange(count) + torch.rand(count)) / max(count, 1)
    found: list[float] = shares[torch.randperm(count)].tolist()
    return found


# -- callers ----------------------------------------------------------------------------------


class Callers:
    """Threads that call all the time, while a ``with`` block runs.

    Attributes:
        times: Seconds of each call, by thread.
    """

    def __init__(self, call: Callable[[], object], count: int) -> None:
        """Start nothing yet."""
        self._call = call
        self._threads = [threading.Thread(target=self._loop, args=(n,)) for n in range(count)]
        self._starts: list[list[float]] = [[] for _ in range(count)]
        self._last = 0.0  # when the last call began
        self._begins = threading.Event()
        self._error: BaseException | None = None
        self._stop = False
        self.times: list[list[float]] = [[] for _ in range(count)]

    def __enter__(self) -> Self:
        """Return once every thread has made three calls."""
        for thread in self._threads:
            thread.start()
        while any(len(times) < 3 for times in self.times) and self._error is None:
            time.sleep(0.01)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _loop(self, me: int) -> None:
        starts, times = self._starts[me], self.times[me]
        try:
            while not self._stop:
                start = time.perf_counter()
                starts.append(start)
                self._last = start
                self._begins.set()
                self._call()
                times.append(time.perf_counter() - start)
        except BaseException as exc:  # noqa: BLE001 - raised by the thread that measures
            self._error = exc

    @property
    def calls(self) -> int:
        """Calls that have ended, of all threads."""
        return sum(map(len, self.times))

    def wait_inside(self, share: float) -> float:
        """Wait for a moment inside a call, and return its time.

        A measurement starts at that time, also if this thread could not run then and returns later.

        Args:
            share: Share of the call that has passed then, 0 to 1.
        """
        if not self._threads:
            time.sleep(0.02 * share)
            return time.perf_counter()
        length = statistics.median(one for times in self.times for one in times)
        self._begins.clear()
        if not self._begins.wait(PATIENCE_S) or self._error is not None:
            raise RuntimeError("the callers have stopped") from self._error
        moment = self._last + share * length
        time.sleep(max(0.0, moment - time.perf_counter()))
        return moment

    def were_inside(self, moment: float) -> bool:
        """Whether all callers were inside a call at a time."""
        for starts, times in zip(self._starts, self.times, strict=True):
            last = bisect_right(starts, moment) - 1
            if last < 0 or (last < len(times) and starts[last] + times[last] < moment):
                return False
        return True

    def during(self, seconds: float) -> list[list[float]]:
        """Times of the calls that end in the next seconds, by thread."""
        before = [len(times) for times in self.times]
        time.sleep(seconds)
        if self._error is not None:
            raise RuntimeError("the callers have stopped") from self._error
        return [times[n:] for times, n in zip(self.times, before, strict=True)]


def rate(times: Sequence[Sequence[float]]) -> float:
    """Calls per second of threads that call without a break."""
    return sum(len(some) / sum(some) for some in times if some)


class Every:
    """A thread that does something every 100 ms while a ``with`` block runs.

    Attributes:
        done: How often it was done.
        busy: Cores that it kept busy, by its CPU time.
    """

    def __init__(self, work: Callable[[], object] | None, period: float = 0.1) -> None:
        """Start nothing yet.

        Args:
            work: What is done; None: nothing.
            period: Seconds from one start to the next. If the work takes longer, starts are left
                out.
        """
        self._work, self._period = work, period
        self._thread = threading.Thread(target=self._loop)
        self._end = threading.Event()
        self._error: BaseException | None = None
        self.done, self.busy = 0, 0.0

    def __enter__(self) -> Self:
        if self._work is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        if self._work is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _loop(self) -> None:
        assert self._work is not None
        start, cpu = time.perf_counter(), time.thread_time()
        try:
            while not self._end.is_set():
                self._work()
                self.done += 1
                self._end.wait(-(time.perf_counter() - start) % self._period)
        except BaseException as exc:  # noqa: BLE001 - raised by the thread that measures
            self._error = exc
        self.busy = (time.thread_time() - cpu) / (time.perf_counter() - start)


# -- a control: torch alone -------------------------------------------------------------------


class Load:
    """Processes that call the large model with torch alone, while a ``with`` block runs.

    Attributes:
        rate: Calls per second of all, afterwards.
    """

    def __init__(self, batch: int, count: int) -> None:
        """Start nothing yet."""
        self._command = [sys.executable, __file__, str(batch)]
        self._count = count
        self.rate = 0.0

    def __enter__(self) -> Self:
        pipe = subprocess.PIPE
        self._processes = [
            subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True)  # noqa: S603
            for _ in range(self._count)
        ]
        for process in self._processes:
            assert process.stdout is not None
            process.stdout.readline()
        for process in self._processes:
            assert process.stdin is not None
            print("go", file=process.stdin, flush=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:  # all at once: each stops counting when its input ends
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            assert process.stdout is not None
            self.rate += float(process.stdout.read())
            process.wait()


def _compute(batch: int) -> None:
    model = linear("large")
    model.load_state_dict(state("large", 0), assign=True)
    given = inputs("large", batch)
    with torch.no_grad():
        model(given)
        print("ready", flush=True)
        sys.stdin.readline()
        ended = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.read(), ended.set())).start()
        calls, start = 0, time.perf_counter()
        while not ended.is_set():
            model(given)
            calls += 1
    print(calls / (time.perf_counter() - start))


if __name__ == "__main__":
    _compute(int(sys.argv[1]))
