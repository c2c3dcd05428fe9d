"""Live updates: what weights that arrive in buckets do to callers and to memory.

- ``throughput``: calls while 200 MB arrive in 20 buckets, over calls while nothing arrives. Both
  are measured in turns, in windows of equal length, from the start of an update to the arrival of
  its last bucket. ``paced``: a bucket every 100 ms, as from a network of 100 MB/s. ``unpaced``: one
  after another, as from memory. Torch uses one thread.
- ``pause``: the pause of each commit, and the longest calls with updates and without.
- ``torn``: outputs of these calls that mix two sets of weights; there should be none.
- ``memory``: growth of the process in an update of 2 GB in buckets. Bound: one more set of weights,
  in the first update only, and one bucket.

usage: python benchmarks/live.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from memory_probe import Probe
from rich.console import Console
from serving import table
from serving_callers import SHAPES, inputs, output, state

import refitkit

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = "wide"
BUCKETS = 20
EVERY_S = 0.1
CALL_BATCH = 24
SHAPES["huge"] = (30, 4096)


class Caller:
    """Threads that call all the time, and check every output."""

    def __init__(self, compiled: refitkit.CompiledModule, count: int) -> None:
        self._compiled, self._stop = compiled, threading.Event()
        self.times: list[list[tuple[float, float]]] = [[] for _ in range(count)]
        self.torn = 0
        self._x = inputs(MODEL, CALL_BATCH)
        self._whole = [output(MODEL, one, CALL_BATCH) for one in (0, 1)]
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(count)]

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            start = time.perf_counter()
            found = self._compiled(self._x)
            self.times[number].append((start, time.perf_counter()))
            if not any(torch.equal(found, one) for one in self._whole):
                self.torn += 1

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def calls(self, start: float, end: float) -> float:
        """Number of calls in a window. Those that cross its ends count for their share."""
        return sum(
            max(0.0, min(b, end) - max(a, start)) / (b - a)
            for times in self.times
            for a, b in times
            if b > start and a < end
        )

    def longest(self, start: float, end: float) -> float:
        """Seconds of the longest call that ended in a window."""
        return max(b - a for times in self.times for a, b in times if start < b <= end)


def buckets(weights: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The weights in buckets of about equal size; large tensors are a bucket of their own."""
    whole = sum(tensor.nbytes for tensor in weights.values())
    found: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in weights.items():
        if sum(t.nbytes for t in found[-1].values()) >= whole / BUCKETS:
            found.append({})
        found[-1][name] = tensor
    return found


def update(
    receiver: refitkit.WeightReceiver, weights: dict[str, torch.Tensor], *, paced: bool
) -> tuple[float, float, float]:
    """One update; returns when it began, when all had arrived, and its pause in seconds."""
    start = due = time.perf_counter()
    receiver.start_weight_update()
    for bucket in buckets(weights):
        if paced:
            due += EVERY_S
            time.sleep(max(0.0, due - time.perf_counter()))
        receiver.update_weights(weights=bucket)
    arrived = time.perf_counter()
    (result,) = receiver.finish_weight_update()
    return start, arrived, result.report.pause_seconds or 0.0


def throughput(
    compiled: refitkit.CompiledModule, *, callers: int, paced: bool, turns: int
) -> dict[str, Any]:
    """Calls with updates over calls without, in turns."""
    receiver = refitkit.WeightReceiver(compiled)
    sets = [state(MODEL, one) for one in (0, 1)]
    ratios, pauses, slow, quiet = [], [], [], []
    with Caller(compiled, callers) as caller:
        time.sleep(0.5)
        update(receiver, sets[1], paced=False)  # the first one makes the second set of weights
        for turn in range(turns):
            start, arrived, pause = update(receiver, sets[turn % 2], paced=paced)
            length = arrived - start
            time.sleep(0.1)
            idle = time.perf_counter()
            time.sleep(length + 0.5)  # calls that cross the end have ended then
            both = caller.calls(start, arrived), caller.calls(idle, idle + length)
            ratios.append(both[0] / both[1])
            pauses.append(pause)
            slow.append(caller.longest(start, arrived))
            quiet.append(caller.longest(idle, idle + length))
    calls = [b - a for times in caller.times for a, b in times]
    return {
        "callers": callers,
        "buckets": "paced" if paced else "unpaced",
        "arriving, ms": 1e3 * length,
        "call, ms": 1e3 * statistics.median(calls),
        "throughput, ratio": statistics.median(ratios),
        "quartiles": " ".join(f"{q:.3f}" for q in statistics.quantiles(ratios, n=4)[::2]),
        "largest pause, ms": 1e3 * max(pauses),
        "longest call, ms": 1e3 * statistics.median(slow),
        "without": 1e3 * statistics.median(quiet),
        "calls": len(calls),
        "torn": caller.torn,
    }


def generated(name: str, one: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights that are made when they are asked for, as those of a transport."""
    layers, width = SHAPES[name]
    for layer in range(layers):
        yield f"{layer}.weight", torch.full((width, width), (1.0 + one) / width)
        yield f"{layer}.bias", torch.full((width,), float(one))


def compiled_model(name: str) -> refitkit.CompiledModule:
    """A model with set 0. The compiler gets no second copy of its weights."""
    layers, width = SHAPES[name]
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers))).eval()
    model.load_state_dict(dict(generated(name, 0)), assign=True)
    program = torch.export.export(model, (torch.ones(CALL_BATCH, width),))
    return refitkit.compile(program, prove=False)


def memory(name: str) -> list[dict[str, Any]]:
    """Growth of the process in three updates."""
    with tempfile.TemporaryDirectory() as folder:
        compiled_model(name).save(Path(folder) / "m.refitkit")
        gc.collect()
        compiled = refitkit.load(Path(folder) / "m.refitkit")
        receiver = refitkit.WeightReceiver(compiled, verify="none")
        rows = []
        for turn in (1, 0, 1):
            sizes = [tensor.nbytes for _, tensor in generated(name, turn)]
            with Probe() as probe:
                receiver.start_weight_update()
                receiver.update_weights(weights=generated(name, turn))
                receiver.finish_weight_update()
            rows.append(
                {
                    "update": len(rows) + 1,
                    "weights, MB": sum(sizes) / 1e6,
                    "largest bucket, MB": max(sizes) / 1e6,
                    "growth, MB": probe.own / 1e6,
                    "held, MB": receiver.status().peak_held_bytes / 1e6,
                }
            )
        return rows


def main() -> None:
    """Run all parts, print their tables, and write them to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few turns")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=160)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    console.print(f"{machine}, Python {platform.python_version()}")
    turns = 4 if given.quick else 12
    compiled = compiled_model(MODEL)
    rows = [
        throughput(compiled, callers=callers, paced=paced, turns=turns)
        for paced in (True, False)
        for callers in (1, 2)
    ]
    console.print(table("200 MB in 20 buckets beside callers", rows))
    del compiled
    gc.collect()
    grown = memory("wide" if given.quick else "huge")
    console.print(table("memory", grown))
    if given.json:
        given.json.write_text(json.dumps({"throughput": rows, "memory": grown}, indent=1))


if __name__ == "__main__":
    main()
