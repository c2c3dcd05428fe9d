"""Direct refits on a GPU: is the layout of an engine found and proved, and how fast is a refit?

One model a command, so that a run can be resumed: a file that is there is not made again.

usage: python benchmarks/gpu_direct.py MODEL DTYPE FILE [--upstream]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_models import DTYPES, MODELS, exported, state_on
from gpu_raw import busy, ready_values, upstream_compiled, upstream_refit

import refitkit
from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.direct.engines import ProbedEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEVICE = torch.device("cuda", 0)
RUNS = 40


def device_ms(do: Callable[[], Any], runs: int = 20) -> float:
    """Median milliseconds that the device takes, with the gaps between launches."""
    found = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        do()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def kernels_of(do: Callable[[], Any], runs: int = 5) -> dict[str, float]:
    """Milliseconds of work on the device by kernel, without the gaps; the longest first."""
    do()
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(runs):
            do()
        torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
    return {row.key[:60]: row.self_device_time_total / runs / 1e3 for row in rows}


def kernels_ms(do: Callable[[], Any]) -> float:
    """Milliseconds of all work on the device together, without the gaps."""
    return sum(kernels_of(do).values())


class Measured:
    """One model, compiled for direct refits, between two sets of weights."""

    def __init__(self, model: str, dtype: str, found: dict[str, Any]) -> None:
        """Compile it and refit it once.

        Args:
            model: Name of the model.
            dtype: Name of the dtype.
            found: Where results are noted.
        """
        kind = MODELS[model]
        self.inputs = kind.inputs(DTYPES[dtype])
        self.modules = [kind.new(seed, DTYPES[dtype]) for seed in (0, 1)]
        self.states = [state_on(module, "cuda") for module in self.modules]
        self.pipeline = refitkit.Pipeline()
        options = {"min_block_size": 1, "use_python_runtime": True}
        program = exported(self.modules[0], self.inputs)
        self.compiled = self.pipeline.compile(program, "torch_tensorrt", options, prove=False)
        self.found = found
        self.stored = {name: engine.handle.engine_bytes() for name, engine in self.engines()}
        start = time.perf_counter()
        self.report = self.refit(1)
        self.found["first_refit_s"] = round(time.perf_counter() - start, 2)
        self.found["routes"] = [[one.name, one.why] for one in self.report.routes]
        self.found["slots"] = len(self.compiled.slots)
        self.found["bytes"] = sum(
            slot.count * getattr(torch, slot.dtype).itemsize for slot in self.compiled.slots
        )

    def engines(self) -> Iterator[tuple[str, Any]]:
        """All engines of TensorRT by name."""
        for name, engine in self.compiled.engines.items():
            if hasattr(engine, "handle"):
                yield name, engine

    def refit(self, number: int) -> refitkit.RefitReport:
        """Refit to the first or the second weights."""
        return self.pipeline.refit(self.compiled, self.states[number]).report

    def answer(self) -> torch.Tensor:
        """The answer to fixed inputs."""
        found: torch.Tensor = self.compiled(*self.inputs)
        return found.clone()

    @property
    def is_direct(self) -> bool:
        """Whether all engines are written directly."""
        return all(name == "direct" for name, _ in self.found["routes"])

    def equal_to_tensorrt(self) -> None:
        """Compare all memory with that of other engines that TensorRT refits to the same."""
        trt = upstream.tensorrt()
        values = ready_values(self.compiled, self.states[1])
        self.refit(0)
        self.refit(1)
        same = []
        for name, engine in self.engines():
            probed = ProbedEngine(self.stored[name], engine.specs, trt, DEVICE)
            probed.refit({n: v.reshape(-1) for n, v in values[name].items()})
            live = engine._direct._engine.pieces()
            for piece, wanted in zip(live, probed.pieces(), strict=False):
                same.append(torch.equal(piece, wanted))
                break  # the first is the weights; others belong to contexts
        self.found["memory equals TensorRT's"] = all(same)

    def times(self) -> None:
        """Time refits, all with the right answers."""
        answers = []
        for number in (0, 1):
            self.refit(number)
            answers.append(self.answer())
        assert not torch.equal(*answers)
        nbytes = self.found["bytes"]
        flat, other = (torch.ones(nbytes, dtype=torch.uint8, device=DEVICE) for _ in "ab")
        busy()
        whole, pauses, wrong = [], [], 0
        for number in range(RUNS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            result = self.pipeline.refit(self.compiled, self.states[number % 2])
            torch.cuda.synchronize()
            whole.append(1e3 * (time.perf_counter() - start))
            pauses.append(1e3 * (result.report.pause_seconds or 0))
            wrong += not torch.equal(self.answer(), answers[number % 2])
        copy = device_ms(lambda: flat.copy_(other))
        each = kernels_of(lambda: self.refit(0))
        kernels = sum(each.values())
        self.found["kernels"] = {n: round(each[n] / copy, 2) for n in list(each)[:6]}
        self.found |= {
            "copy_ms": copy,
            "refit_ms": statistics.median(whole),
            "refit_worst_ms": max(whole),
            "pause_ms": statistics.median(pauses),
            "wrong": wrong,
            "kernels_ms": kernels,
            "kernels_copies": kernels / copy,
        }
        self.found["host_ms"] = self.found["refit_ms"] - kernels
        stage, commit = 0.0, 0.0
        for name, engine in self.engines():
            values = [v for v in self._slot_values(0) if v.slot.engine == name]
            engine.buffers.begin_staging(partial=False)
            stage += kernels_ms(lambda e=engine, v=values: (e._fill(v), e.buffers.staging.fold()))
            arena = engine._writable()
            commit += device_ms(arena.commit)
        self.found |= {"stage_copies": stage / copy, "commit_copies": commit / copy}

    def _slot_values(self, number: int) -> list[Any]:
        from refitkit.protocols import SlotValue

        assert self.compiled.plan
        loaded = self.compiled.plan.materialize(self.states[number], device="cuda")
        return [
            SlotValue(
                engine.slots[slot],
                "ready",
                (),
                lambda v=value, s=engine.slots[slot].shape: v.reshape(s),
            )
            for name, engine in self.engines()
            for slot, value in loaded[name].items()
        ]

    def upstream(self, dtype: str) -> None:
        """Upstream's own refit of the same weights."""
        if dtype != "float32":
            return
        program = exported(self.modules[0], self.inputs)
        theirs = upstream_compiled(program, self.inputs, immutable_weights=False)
        self.found["upstream_s"] = upstream_refit(
            theirs, self.modules[1], self.inputs, cached=False
        )
        self.found["over upstream"] = round(1e3 * self.found["upstream_s"] / self.found["refit_ms"])


def noted(file: Path, found: dict[str, Any], measure: Callable[[], None]) -> None:
    """Measure, and write the results to a file. An error is written too.

    Args:
        file: The file to write.
        found: What is written; ``measure`` adds to it.
        measure: Measures.
    """
    try:
        measure()
    except Exception:  # noqa: BLE001 - noted, so that the next model is measured
        found["error"] = traceback.format_exc()[-2000:]
    file.write_text(json.dumps(found, indent=1))
    print(json.dumps(found), file=sys.stdout)


def main() -> None:
    """Measure one model and write the results to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("dtype", choices=list(DTYPES))
    parser.add_argument("file", type=Path)
    parser.add_argument("--upstream", action="store_true", help="upstream's function, too")
    given = parser.parse_args()
    if given.file.exists():
        return
    found: dict[str, Any] = {"model": given.model, "dtype": given.dtype}

    def measure() -> None:
        measured = Measured(given.model, given.dtype, found)
        if measured.is_direct:
            measured.equal_to_tensorrt()
            measured.times()
            if given.upstream:
                measured.upstream(given.dtype)

    noted(given.file, found, measure)


if __name__ == "__main__":
    main()
