"""Measures refits of one model on a GPU; started by ``gpu.py``, one process for each model.

What is slow and disturbs others (compiling, the first refits) is done first, beside other such
processes. Then it says ``READY`` and waits for a line on its standard input: what is timed in
milliseconds has the machine alone. The file is written after every step, so that what was measured
outlives what fails later.

usage: python benchmarks/gpu_measure.py MODEL DTYPE FILE [--runs 30] [--runtime cpp]
                                                         [--profile] [--upstream] [--immutable]
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from gpu_models import DTYPES, MODELS, exported, state_on
from gpu_profile import profiled
from gpu_raw import (
    ByHand,
    busy,
    copies,
    many,
    ready_values,
    upstream_compiled,
    upstream_refit,
    waiting,
    yardstick,
)
from gpu_tables import SOURCES, gaps, split, summary

import refitkit
from refitkit.builtin.torch_tensorrt import LAYER_TYPES, refitter, upstream
from refitkit.program.bits import same_bits
from refitkit.protocols import Tools

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOOLS = Tools(layer_types={one.name: one for one in LAYER_TYPES})
BESIDE = 4
"""Threads of a process while others compile, too."""
LOAD_S = 2.0
"""So long a module is called without pause, without refits and with them."""
RUN_IN, RUN_IN_S = 60, 1.0
"""So many refits, for so long at most, before some are timed."""
PAUSE_S = 0.02
"""Between two refits under load."""


class Measurement:
    """One model, compiled, with two sets of weights."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        self._kind, self._dtype = MODELS[given.model], DTYPES[given.dtype]
        self.found: dict[str, Any] = {
            "model": given.model if given.runtime == "python" else f"{given.model}, C++ runtime",
            "dtype": given.dtype,
            "device": torch.cuda.get_device_name(),
            "seconds": {},
            "waiting_ms": {},
        }
        self._pipeline = refitkit.Pipeline()

    # -- before others are quiet ------------------------------------------------------------

    def prepare(self) -> None:
        """Compile everything, and refit once."""
        torch.set_num_threads(BESIDE)
        self.inputs = self._kind.inputs(self._dtype)
        self._a, self._b = (self._kind.new(seed, self._dtype) for seed in (0, 1))
        with torch.no_grad():
            self._eager = [model(*self.inputs) for model in (self._a, self._b)]
        program = exported(self._a, self.inputs)
        options = {"min_block_size": 1, "use_python_runtime": self._given.runtime == "python"}
        with self._timed("compile"):
            self.compiled = self._pipeline.compile(program, "torch_tensorrt", options, prove=False)
        self._time_drain()
        slots = self.compiled.slots
        self.found |= {
            "slots": len(slots),
            "engines": len(self.compiled.engines),
            "nbytes": sum(slot.nbytes for slot in slots),
            "entries": len(self._a.state_dict()),
        }
        self.states = {
            "device": [state_on(model, "cuda") for model in (self._a, self._b)],
            "pinned": [state_on(model, "cpu", pinned=True) for model in (self._a, self._b)],
            "pageable": [state_on(model, "cpu") for model in (self._a, self._b)],
        }
        self.found["correct"] = {"differing": self._differing()}
        with self._timed("first refit"):
            self.refit("device", 1)
        self.refit("device", 0)
        self._expected = [self.call()]
        self.refit("device", 1)
        self._expected.append(self.call())
        self._judge()
        self.save()
        if self._given.runtime == "python":
            self._prepare_others(program)

    def _time_drain(self) -> None:
        """The report has no stage for the wait for pending work."""
        opened: Any = self.compiled.opened
        synchronize, self._drained = opened.synchronize, 0.0

        def timed() -> None:
            start = time.perf_counter()
            synchronize()
            self._drained = time.perf_counter() - start

        opened.synchronize = timed

    def _prepare_others(self, program: Any) -> None:
        values = ready_values(self.compiled, self.states["device"][1])
        self._values = [ready_values(self.compiled, self.states["device"][0]), values]
        self._engines = {
            name: refitter.DeserializedEngine(engine.handle.engine_bytes(), upstream.tensorrt())
            for name, engine in self.compiled.engines.items()
            if hasattr(engine, "handle")
        }
        self._hands = [ByHand(one.engine, values[name]) for name, one in self._engines.items()]
        with self._timed("first refit by hand"):
            self._by_hand(ByHand.refit)
        self.found["by_hand"] = {"new_s": self.found["seconds"]["first refit by hand"]}
        del program
        if self._given.immutable:
            self._immutable = upstream_compiled(
                exported(self._a, self.inputs), self.inputs, immutable_weights=True
            )
            self._immutable(*self.inputs)
        if self._given.upstream:
            self._theirs = upstream_compiled(
                exported(self._a, self.inputs), self.inputs, immutable_weights=False
            )
        self.save()

    def _differing(self) -> int:
        """Slots whose value is not the rebuild's, bit for bit."""
        wanted = self.compiled.opened.rebuilt(exported(self._b, self.inputs), TOOLS)
        assert self.compiled.plan
        made = self.compiled.plan.materialize(self.states["device"][1])
        return sum(
            not same_bits(
                made[slot.engine][slot.name].cpu().contiguous().reshape(-1),
                wanted[slot.engine][slot.name].cpu().contiguous().reshape(-1),
            )
            for slot in self.compiled.slots
        )

    def _judge(self) -> None:
        a, b = self._expected
        self.refit("device", 0)
        again = same_bits(self.call(), a)
        self.refit("device", 1)
        self.found["correct"] |= {
            "a_b_a": again and same_bits(self.call(), b) and not same_bits(a, b),
            "error_a": _error(a, self._eager[0]),
            "error_b": _error(b, self._eager[1]),
        }

    # -- alone on the machine ---------------------------------------------------------------

    def measure(self) -> None:
        """Everything that is timed in milliseconds; upstream last."""
        torch.set_num_threads(os.cpu_count() or 1)
        steps = [self._copies, self._refits, self._calls, self._memory, self._load]
        if self._given.runtime == "python":
            steps.append(self._hand)
        if self._given.profile:
            steps.append(self._profile)
        if self._given.upstream:
            steps.append(self._upstream)
        for step in steps:
            busy()
            try:
                step()
            except Exception as exc:  # noqa: BLE001 - the other steps are worth having
                self.found.setdefault("failed", {})[step.__name__] = f"{exc!r}"[:2000]
                traceback.print_exc()
            self.save()

    def _copies(self) -> None:
        self.found["waiting_ms"]["alone"] = waiting()
        self.found["copies"] = copies(self.found["nbytes"])

    def _refits(self) -> None:
        self.found["refit"], right = {}, True
        # the C++ runtime takes seconds, wherever weights come from
        for source in SOURCES if self._given.runtime == "python" else SOURCES[:1]:
            whole, first, reports = [], [], []
            self._run_in(source)
            quick = yardstick()
            start = time.perf_counter()
            while len(whole) < self._given.runs and (
                len(whole) < 5 or time.perf_counter() - start < self._given.limit
            ):
                to = len(whole) % 2
                torch.cuda.synchronize()
                begin = time.perf_counter()
                result = self.refit(source, to)
                middle = time.perf_counter()
                output = self.call()
                torch.cuda.synchronize()
                first.append(time.perf_counter() - begin)
                whole.append(middle - begin)
                reports.append({**_by_stage(result.report), "drain": self._drained})
                right = right and same_bits(output, self._expected[to])
            self.found["refit"][source] = {
                "refit": summary(whole),
                "first_output": summary(first),
                "split": split(reports, whole),
                "yardstick_ms": [quick, yardstick()],
            }
        self.found["correct"]["always"] = right

    def _run_in(self, source: str) -> None:
        """Refit for a while: a process that has waited for its turn is slow at first."""
        busy()
        start = time.perf_counter()
        for number in range(RUN_IN):
            self.refit(source, number % 2)
            if number and time.perf_counter() - start > RUN_IN_S:
                break

    def _calls(self) -> None:
        modules = {"refittable": self.compiled}
        if self._given.immutable:
            modules["immutable"] = self._immutable
        self.found["call"] = {
            name: summary(many(lambda _, m=module: m(*self.inputs), 100, 2.0))
            for name, module in modules.items()
        }

    def _memory(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
        with _Lowest() as lowest:
            for number in range(4):
                self.refit("device", number % 2)
        peak = torch.cuda.max_memory_allocated() - before
        device_peak = free - lowest.free
        spare = self.compiled.free_spare()
        report = self._pipeline.refit(self.compiled, self.states["device"][0], verify="none").report
        self.found["memory"] = {
            "torch_peak": peak,
            "device_peak": device_peak,
            "spare": spare,
            "held": sum(one.bytes for one in report.memory) + spare,
            "kinds": sorted({one.kind for one in report.memory}),
        }

    def _load(self) -> None:
        quiet = gaps(self._serve(LOAD_S, lambda: time.sleep(PAUSE_S))[0])
        busy, refits = self._serve(
            LOAD_S, lambda: (self.refit("device", 0), self.refit("device", 1), time.sleep(PAUSE_S))
        )
        self.found["load"] = {
            "quiet": quiet,
            "refits": gaps(busy),
            "refits_per_s": 2 * refits / LOAD_S,
        }

    def _serve(self, limit: float, work: Callable[[], Any]) -> tuple[list[float], int]:
        """Ends of calls by another thread, while this one does work; and how often it did it."""
        ends: list[float] = []
        stop = threading.Event()

        def calls() -> None:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                while not stop.is_set():
                    self.compiled(*self.inputs)
                    stream.synchronize()
                    ends.append(time.perf_counter())

        thread = threading.Thread(target=calls)
        thread.start()
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < limit:
            work()
            done += 1
        stop.set()
        thread.join()
        return ends, done

    def _by_hand(self, what: Callable[[ByHand], Any]) -> None:
        for hand in self._hands:
            what(hand)

    def _hand(self) -> None:
        names = list(self._engines)

        def ready(number: int) -> None:
            for name, hand in zip(names, self._hands, strict=True):
                hand.point(self._values[number % 2][name])
                hand.refit()

        def copied(number: int) -> None:
            for name, hand in zip(names, self._hands, strict=True):
                hand.copied(self._values[number % 2][name])

        found = self.found["by_hand"]
        found["ready"] = summary(many(ready, self._given.runs))
        for hand in self._hands:
            hand.point(hand.buffers)
        found["copied"] = summary(many(copied, self._given.runs))
        copied(1)
        found["error_b"] = self._error_by_hand()

    def _error_by_hand(self) -> float | None:
        """Of the one engine that was refitted by hand, put in the module for a call."""
        children = dict(self.compiled.opened.module.named_children())
        if len(self._engines) != 1 or len(self.compiled.engines) != 1:
            return None
        ((name, own),) = self._engines.items()
        child: Any = children[name]
        kept = child.engine, child.context
        child.engine, child.context = own.engine, own.engine.create_execution_context()
        try:
            return _error(child(*self.inputs), self._eager[1])
        finally:
            child.engine, child.context = kept

    def _profile(self) -> None:
        self.found["profile"] = profiled(
            self.compiled, lambda to: self.refit("device", to), self.states["device"]
        )

    def _upstream(self) -> None:
        found = self.found["upstream"] = {}
        for name, cached in (("map", True), ("no map", False)):
            found[name] = upstream_refit(self._theirs, self._b, self.inputs, cached=cached)
            found[f"{name}: error of B"] = _error(self._theirs(*self.inputs), self._eager[1])
            self.save()

    # -- shared -----------------------------------------------------------------------------

    def refit(self, source: str, to: int) -> refitkit.RefitResult:
        """One refit, nothing verified: outputs are compared by whoever times it."""
        return self._pipeline.refit(self.compiled, self.states[source][to], verify="none")

    def call(self) -> torch.Tensor:
        """One call."""
        output: torch.Tensor = self.compiled(*self.inputs)
        return output

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        torch.cuda.synchronize()
        self.found["seconds"][name] = time.perf_counter() - start
        self.found["waiting_ms"][name] = waiting()

    def save(self) -> None:
        """Write what was found so far."""
        self._given.file.write_text(json.dumps(self.found))


class _Lowest:
    """Watches how little memory is free on the device."""

    def __enter__(self) -> Self:
        self.free = torch.cuda.mem_get_info()[0]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.free = min(self.free, torch.cuda.mem_get_info()[0])
            time.sleep(0.0005)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _by_stage(report: refitkit.RefitReport) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in report.stages:
        found[one.stage] = found.get(one.stage, 0.0) + one.seconds
    return found


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what it should be."""
    difference = (found.double() - wanted.double()).norm()
    return float(difference / wanted.double().norm())


def main() -> None:
    faulthandler.enable()  # where it dies in native code
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("file", type=Path)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--limit", type=float, default=4.0, help="seconds for each source")
    parser.add_argument("--runtime", choices=("python", "cpp"), default="python")
    parser.add_argument("--profile", action="store_true", help="where the time of a refit goes")
    parser.add_argument("--upstream", action="store_true", help="upstream's function, too")
    parser.add_argument("--immutable", action="store_true", help="an engine without REFIT, too")
    one = Measurement(parser.parse_args())
    try:
        with torch.no_grad():
            one.prepare()
            one.save()
            print("READY", flush=True)
            sys.stdin.readline()
            start = time.perf_counter()
            one.measure()
            one.found["seconds"]["measuring"] = time.perf_counter() - start
    except BaseException as exc:
        one.found["error"] = f"{type(exc).__name__}: {exc}"[:2000]
        raise
    finally:
        one.save()


if __name__ == "__main__":
    main()
