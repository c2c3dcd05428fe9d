"""The parts of ``serving.py``, each measured in a process of its own.

A part is a function that takes a ``Bench`` and returns ``Found``: rows for tables, and the ratios
that have targets.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import torch
from memory_probe import anonymous
from safetensors.torch import save_file
from serving_callers import (
    CALL_S,
    MODELS,
    SHAPES,
    Callers,
    Every,
    Load,
    batch_for,
    build,
    inputs,
    nbytes,
    output,
    quantile,
    rate,
    spread,
    state,
    timed,
)

import refitkit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from multiprocessing.connection import Connection

    from serving_callers import State

    from refitkit import CompiledModule, RefitResult

T = TypeVar("T")

MS, MB = 1e3, 1e6
CALLERS = (1, 2, 8)


@dataclass
class Found:
    """What a part has measured.

    Attributes:
        rows: Rows of tables, by title.
        targets: Rows of the table of targets.
        notes: Remarks.
    """

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    targets: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def judge(self, name: str, measured: float, limit: float, *, at_least: bool = False) -> None:
        """Add a row to the targets."""
        met = measured >= limit if at_least else measured <= limit
        wanted = f"{'at least' if at_least else 'at most'} {limit:g}"
        self.targets.append({"target": name, "wanted": wanted, "measured": measured, "met": met})


class Bench:
    """Models in a folder, and how much is measured."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        """Take a folder with what ``prepare`` wrote, or an empty one."""
        self.folder, self.quick = folder, quick
        self.pipeline = refitkit.Pipeline()

    def of(self, full: int, quick: int) -> int:
        """How many: in a full run, and in a quick one."""
        return quick if self.quick else full

    def load(self, name: str, models: int = MODELS) -> CompiledModule:
        """A saved module."""
        return self.pipeline.load(self.folder / f"{name}.refitkit", num_models=models)

    @property
    def batch(self) -> int:
        """Size of the batch of a long call."""
        return int((self.folder / "batch").read_text())


def prepare(bench: Bench) -> Found:
    """Compile all models, and find the batch of a long call."""
    for name in SHAPES:
        build(name, bench.folder)
    (bench.folder / "batch").write_text(str(batch_for(bench.load("large"), CALL_S)))
    return Found()


# -- refits -----------------------------------------------------------------------------------


class Hook:
    """A plugin that is notified of new weights, and does nothing."""

    @refitkit.hookimpl
    def refitkit_weights_changed(self, report: object) -> None:
        """Do nothing."""


class Refits:
    """Refits of one module. Each changes every weight: sets 0 and 1 take turns."""

    def __init__(self, bench: Bench, module: CompiledModule, name: str, *, donors: int = 4) -> None:
        """Make the sets.

        Args:
            bench: The bench.
            module: The module.
            name: Name of its model.
            donors: Sets that are donated in turn. With 4, no set is still the one before the live
                one when it comes again.
        """
        self.module, self._live, self._donated = module, 0, 0
        self.states = [state(name, one) for one in (0, 1)]
        self._donors = [state(name, number % 2) for number in range(donors)]
        self._unchecked = refitkit.Pipeline({"check_finite": False})
        self._hooked = refitkit.Pipeline(plugins=[Hook()])
        self._pipeline = bench.pipeline

    def copied(self, pipeline: refitkit.Pipeline | None = None, **how: Any) -> RefitResult:
        """Refit from the caller's tensors, which are copied."""
        self._live = 1 - self._live
        how = {"verify": "none", **how}
        one = pipeline or self._pipeline
        return one.refit(self.module, self.states[self._live], **how)

    def read_back(self) -> RefitResult:
        """Refit as users do: copied, and verified by reading all slots."""
        return self.copied(verify="weights")

    def with_outputs(self, given: torch.Tensor) -> RefitResult:
        """Refit, and verify the outputs."""
        return self.copied(verify="outputs", inputs=(given,))

    def hooked(self) -> RefitResult:
        """Refit with a plugin that is notified."""
        return self.copied(self._hooked)

    def donated(self, *, check: bool = True) -> RefitResult:
        """Refit from tensors that become the module's own."""
        if self._donated % 2 == self._live:  # the next one that changes the weights
            self._donated += 1
        donor = self._donors[self._donated % len(self._donors)]
        self._donated += 1
        self._live = 1 - self._live
        pipeline = self._pipeline if check else self._unchecked
        return pipeline.refit(self.module, donor, verify="none", donate=True)

    def undo(self, last: RefitResult) -> None:
        """Undo the last refit."""
        self._live = 1 - self._live
        last.undo(verify="none")


# -- (1) beside callers -----------------------------------------------------------------------


def beside(bench: Bench) -> Found:
    """Sleeps and refits beside callers with long calls, and beside torch alone."""
    found = Found()
    binding = bool(os.environ.get("REFITKIT_AOTI_BINDING"))
    module = bench.load("large", 1 if binding else MODELS)
    given = inputs("large", bench.batch)
    refits = Refits(bench, module, "large")
    kinds: dict[str, Callable[[], RefitResult]] = {"copied": refits.copied}
    if not binding:
        kinds |= {
            "copied, read back": refits.read_back,
            "copied, outputs": partial(refits.with_outputs, given),
            "copied, with a hook": refits.hooked,
            "donated": refits.donated,
        }
    for refit in [*kinds.values()] * 3:  # the first ones allocate memory
        refit()
    beside = Beside(kinds)
    counts = (0, 1, 2) if binding else (0, *CALLERS)
    repeats = bench.of(3, 1) if binding else bench.of(5, 2)
    for _ in range(1 if binding else bench.of(4, 1)):
        for count in counts:
            with Callers(lambda: module(given), count) as callers:
                beside.measure(f"{count} callers", callers, repeats)
        for count in () if binding else (1, 2):
            with Load(bench.batch, count):
                beside.measure(f"{count} torch alone", Callers(lambda: None, 0), repeats)
    found.rows["1 ms of sleep, ms"] = list(beside.sleep_rows())
    found.rows["refits of 67 MB, ms"] = list(beside.refit_rows())
    judge_beside(found, beside, kinds, counts)
    found.notes.append(f"route: {module.engines['model'].route}; batch {bench.batch}")
    return found


class Sample(NamedTuple):
    """One measurement.

    Attributes:
        seconds: How long it took, from a moment at which all callers were inside a call.
        pause: ``report.pause_seconds`` of a refit.
    """

    seconds: float
    pause: float = 0.0


_CONTROL = {
    "1 callers": "1 torch alone",
    "2 callers": "2 torch alone",
    "8 callers": "2 torch alone",
}


class Beside:
    """Sleeps, and refits of several kinds, beside something."""

    def __init__(self, kinds: dict[str, Callable[[], RefitResult]]) -> None:
        """Take the refits by kind."""
        self._kinds = kinds
        self._sleeps: dict[str, list[Sample]] = defaultdict(list)
        self._refits: dict[tuple[str, str], list[Sample]] = defaultdict(list)

    def measure(self, what: str, callers: Callers, repeats: int) -> None:
        """Add samples: so many of each kind of refit, and ten times as many sleeps."""
        for _ in range(2):  # after donated sets, the first copies allocate memory
            self._kinds["copied"]()
        sleeps = _inside(callers, 10 * repeats, lambda: time.sleep(0.001))
        self._sleeps[what] += [Sample(seconds) for seconds, _ in sleeps]
        for kind, refit in self._kinds.items():
            for seconds, result in _inside(callers, repeats, refit):
                self._refits[kind, what].append(Sample(seconds, result.report.pause_seconds or 0.0))

    def sleep_rows(self) -> Iterable[dict[str, Any]]:
        """A row for each thing that sleeps were measured beside."""
        for what, samples in self._sleeps.items():
            yield {"beside": what, **_statistics(samples)}

    def refit_rows(self) -> Iterable[dict[str, Any]]:
        """A row for each kind of refit and each thing that it was measured beside."""
        for (kind, what), samples in self._refits.items():
            pause = max(sample.pause for sample in samples)
            yield {
                "refit": kind,
                "beside": what,
                **_statistics(samples),
                "over 0 callers": self.over(kind, what, "0 callers"),
                "over torch alone": self.over(kind, what, _CONTROL.get(what, what)),
                "most pause, ms": pause * MS,
            }

    def slowest_sleep(self, what: str) -> float:
        """Seconds, 99th percentile."""
        return quantile([sample.seconds for sample in self._sleeps[what]], 0.99)

    def over(self, kind: str, what: str, other: str) -> float | None:
        """Ratio of the medians of a refit beside two things; None if one was not measured."""
        samples = [self._refits.get((kind, one)) for one in (what, other)]
        medians = [statistics.median(sample.seconds for sample in some) for some in samples if some]
        return medians[0] / medians[1] if len(medians) == 2 else None

    def most_pause(self, kind: str) -> float:
        """Seconds, over all that it was measured beside."""
        pairs = self._refits.items()
        return max(sample.pause for (one, _), some in pairs if one == kind for sample in some)


def _inside(callers: Callers, count: int, work: Callable[[], T]) -> Iterator[tuple[float, T]]:
    """Seconds and results of work that starts while all callers are inside a call."""
    for share in spread(count):
        while True:
            start = callers.wait_inside(share)
            result = work()
            seconds = time.perf_counter() - start
            if callers.were_inside(start):
                yield seconds, result
                break


def _statistics(samples: Sequence[Sample]) -> dict[str, Any]:
    times = [sample.seconds for sample in samples]
    return {
        "median": statistics.median(times) * MS,
        "p90": quantile(times, 0.9) * MS,
        "p99": quantile(times, 0.99) * MS,
        "max": max(times) * MS,
        "times": len(times),
    }


def judge_beside(found: Found, beside: Beside, kinds: Iterable[str], counts: Iterable[int]) -> None:
    for count in counts:
        if count:
            name = f"1 ms of sleep beside {count} callers, p99, ms"
            found.judge(name, beside.slowest_sleep(f"{count} callers") * MS, 3)
    for kind in kinds:
        for count in counts:
            # outputs are verified by calls of the model, which need a core of their own
            if count and kind != "copied, outputs":
                name = f"refit, {kind}, beside {count} callers, over none"
                ratio = beside.over(kind, f"{count} callers", "0 callers")
                assert ratio is not None
                found.judge(name, ratio, 2)
    for kind in kinds:
        found.judge(f"refit, {kind}, most pause, ms", beside.most_pause(kind) * MS, 1)


# -- (2) throughput ---------------------------------------------------------------------------


def throughput(bench: Bench) -> Found:
    """Calls per second of several callers, without and with a refit every 100 ms."""
    found = Found()
    binding = bool(os.environ.get("REFITKIT_AOTI_BINDING"))
    module = bench.load("large", 1 if binding else MODELS)
    given = inputs("large", bench.batch)
    modes = _modes(Refits(bench, module, "large"), binding=binding)
    rates: dict[tuple[int, str], list[float]] = defaultdict(list)
    done: dict[tuple[int, str], list[tuple[int, float]]] = defaultdict(list)
    alone: dict[int, list[float]] = defaultdict(list)
    seconds = bench.of(2, 1)
    for turn in range(1 if binding else bench.of(5, 2)):
        for count in (1, 2) if binding else CALLERS:
            with Callers(lambda: module(given), count) as callers:
                for name in _turned(list(modes), turn):
                    with Every(modes[name]) as every:
                        rates[count, name].append(rate(callers.during(seconds)))
                    done[count, name].append((every.done, every.busy))
        for count in () if binding else (1, 2):
            with Load(bench.batch, count) as load:
                time.sleep(seconds)
            alone[count].append(load.rate)
    for (count, name), some in rates.items():
        ratios = [one / base for one, base in zip(some, rates[count, NOTHING], strict=True)]
        refits, busy = zip(*done[count, name], strict=True)
        found.rows["throughput of long calls"].append(
            {
                "callers": count,
                "every 100 ms": name,
                "calls per s": statistics.median(some),
                "over 1 caller": statistics.median(some) / statistics.median(rates[1, NOTHING]),
                "over nothing": statistics.median(ratios),
                "times done": sum(refits),
                "its cores": statistics.median(busy),
            }
        )
        if name not in {NOTHING, COPIES}:
            title = f"throughput of {count} callers, refits: {name}, over none"
            found.judge(title, statistics.median(ratios), 0.95, at_least=True)
    medians = {count: statistics.median(rates[count, NOTHING]) for count in (1, 2)}
    found.judge("2 callers over 1", medians[2] / medians[1], 1.6, at_least=True)
    if alone:
        ratio = statistics.median(alone[2]) / statistics.median(alone[1])
        found.notes.append(f"control: 2 processes with torch alone serve {ratio:.2f} times one")
    return found


NOTHING, COPIES = "nothing", "67 MB copied, no refit"


def _modes(refits: Refits, *, binding: bool = False) -> dict[str, Callable[[], object] | None]:
    """What is done every 100 ms, by name: nothing, a copy without a refit, and refits."""
    place = {fqn: tensor.clone() for fqn, tensor in refits.states[0].items()}

    def copies() -> None:
        for fqn, tensor in place.items():
            tensor.copy_(refits.states[1][fqn])

    if binding:
        return {NOTHING: None, "copied": refits.copied}
    return {
        NOTHING: None,
        COPIES: copies,
        "copied, read back": refits.read_back,
        "donated": refits.donated,
    }


def _turned(names: Sequence[str], turn: int) -> list[str]:
    turn %= len(names)
    return [*names[turn:], *names[:turn]]


# -- (3) refits without a copy ----------------------------------------------------------------


def donated(bench: Bench) -> Found:
    """Refits of 201 MB from donated tensors and from files, against memmove and against reading."""
    found = Found()
    module = bench.load("wide")
    # a module of its own: the memory of earlier sets, which refits use again, is not mixed
    other = bench.pipeline.copy(module)
    refits = Refits(bench, module, "wide")
    files = [bench.folder / f"{one}.safetensors" for one in (0, 1)]
    for file, weights in zip(files, refits.states, strict=True):
        save_file(weights, file)
    unchecked = refitkit.Pipeline({"check_finite": False})
    target = {fqn: torch.ones_like(tensor) for fqn, tensor in refits.states[0].items()}
    place = memoryview(bytearray(b"\1" * max(file.stat().st_size for file in files)))
    measured: dict[str, Callable[[], object]] = {
        "memmove": lambda: _memmove(target, refits.states[0]),
        "donated, unchecked": lambda: refits.donated(check=False),
        # right after the other, with what memmove has taken from the caches of the processor
        "donated, unchecked, again": lambda: refits.donated(check=False),
        "donated, checked": refits.donated,
        "reading the file": lambda: _read(files[0], place),
        # two files, as a refit to the live weights would compare all of them
        "file, unchecked": lambda: unchecked.refit(other, files[0], verify="none"),
        "file, checked": lambda: bench.pipeline.refit(other, files[1], verify="none"),
    }
    times: dict[str, list[float]] = {name: [] for name in measured}
    for turn in range(-3, bench.of(31, 5)):  # the first three warm up
        for name, work in measured.items():
            seconds = timed(work)
            if turn >= 0:
                times[name].append(seconds)
    medians = {name: statistics.median(some) for name, some in times.items()}
    for name, some in times.items():
        over = "reading the file" if "file" in name else "memmove"
        found.rows["refits of 201 MB, ms"].append(
            {
                "what": name,
                "median": medians[name] * MS,
                "quartiles": f"{quantile(some, 0.25) * MS:.2f} to {quantile(some, 0.75) * MS:.2f}",
                "over": over,
                "ratio": medians[name] / medians[over],
            }
        )
    for name, over, limit in (
        ("donated, unchecked", "memmove", 0.05),
        ("donated, checked", "memmove", 0.7),
        ("file, unchecked", "reading the file", 1.2),
    ):
        found.judge(f"{name}, over {over}", medians[name] / medians[over], limit)
    return found


def _memmove(to: State, of: State) -> None:
    for fqn, tensor in of.items():
        ctypes.memmove(to[fqn].data_ptr(), tensor.data_ptr(), tensor.nbytes)


def _read(file: Path, place: memoryview) -> None:
    """Read a file into memory that was touched before."""
    with file.open("rb", buffering=0) as opened:
        read = 0
        while more := opened.readinto(place[read:]):
            read += more


# -- (4) stalls and mixtures ------------------------------------------------------------------


def stalls(bench: Bench) -> Found:
    """How long calls take at most, without and with a refit every 100 ms."""
    found = Found()
    for name, calls in (("small", bench.of(60_000, 3_000)), ("large", bench.of(2_000, 60))):
        module = bench.load(name)
        modes = _modes(Refits(bench, module, name))
        kept = {key: modes[key] for key in (NOTHING, COPIES, "copied, read back", "donated")}
        given = inputs(name)
        for count in CALLERS:
            times: dict[str, list[float]] = defaultdict(list)
            with Callers(lambda module=module, given=given: module(given), count) as callers:
                for turn in range(parts := bench.of(8, 2)):
                    for key in _turned(list(kept), turn):
                        with Every(kept[key]):
                            times[key] += _calls(callers, calls // parts)
            for key, some in times.items():
                ratio = quantile(some, 0.999) / quantile(times[NOTHING], 0.999)
                found.rows["times of calls, ms"].append(
                    {
                        "model": name,
                        "callers": count,
                        "every 100 ms": key,
                        "calls": len(some),
                        "median": statistics.median(some) * MS,
                        "p99": quantile(some, 0.99) * MS,
                        "p99.9": quantile(some, 0.999) * MS,
                        "max": max(some) * MS,
                        "p99.9 over nothing": ratio,
                    }
                )
                if key not in {NOTHING, COPIES}:
                    title = f"p99.9, {name} calls of {count} callers, refits: {key}, over none"
                    found.judge(title, ratio, 1.2)
    return found


def _calls(callers: Callers, count: int) -> list[float]:
    """Times of at least so many calls."""
    times: list[float] = []
    while len(times) < count:
        times += [one for some in callers.during(0.25) for one in some]
    return times


def torn(bench: Bench) -> Found:
    """Outputs that belong to neither set of weights, while refits follow one another."""
    found = Found()
    for name, calls, threads in (
        ("small", bench.of(1_000_000, 10_000), 4),
        ("large", bench.of(10_000, 100), 2),
    ):
        module = bench.load(name)
        refits = Refits(bench, module, name)
        for what, work, most in (
            ("control: live weights written over", _overwriting(refits), calls // 50),
            ("refits", _mixed(refits), calls),
        ):
            outputs: dict[int, Counter[str]] = defaultdict(Counter)
            done = 0
            with Callers(_watched(module, name, outputs), threads) as callers:
                while callers.calls < most or done < 20:
                    work()
                    done += 1
                    time.sleep(0.0005)
            total = sum(outputs.values(), Counter())
            found.rows["outputs"].append(
                {
                    "model": name,
                    "threads": threads,
                    "meanwhile": what,
                    "times": done,
                    "calls": total.total(),
                    "of set 0": total["0"],
                    "of set 1": total["1"],
                    "torn": total["torn"],
                }
            )
            if what == "refits":
                found.judge(f"torn outputs in {total.total()} {name} calls", total["torn"], 0)
                assert min(total["0"], total["1"]) > calls / 20, "the refits are too rare"
            else:
                found.judge(f"control, {name}: torn outputs", total["torn"], 1, at_least=True)
    return found


def _watched(
    module: CompiledModule, name: str, outputs: dict[int, Counter[str]]
) -> Callable[[], None]:
    """A call that counts its output by the set that it belongs to, by thread."""
    given, wanted = inputs(name), [output(name, one) for one in (0, 1)]

    def call() -> None:
        out = module(given)
        one = next((str(n) for n, other in enumerate(wanted) if torch.equal(out, other)), "torn")
        outputs[threading.get_ident()][one] += 1

    return call


def _mixed(refits: Refits) -> Callable[[], None]:
    """Refits of all kinds in turn, and their undo."""
    last: list[RefitResult] = []

    def undo() -> None:
        refits.undo(last[-1])
        last.clear()

    jobs = [refits.copied, refits.donated, undo, refits.read_back, refits.copied, undo]
    turn = 0

    def work() -> None:
        nonlocal turn
        job = jobs[turn % len(jobs)]
        turn += 1
        result = job()
        if result is not None:
            last.append(result)

    return work


def _overwriting(refits: Refits) -> Callable[[], None]:
    """Write over the weights that calls read: what a refit must never do."""
    live = refits.module.engines["model"].live  # type: ignore[attr-defined]  # not public
    turn = 0

    def work() -> None:
        nonlocal turn
        turn += 1
        for fqn, tensor in live.items():
            tensor.copy_(refits.states[turn % 2][fqn])

    return work


# -- (5) many sets, many processes ------------------------------------------------------------


def sets(bench: Bench) -> Found:
    """Ten weight sets of one library: memory, and the time to open one."""
    found = Found()
    warm = bench.load("small")
    warm.with_weights(state("small", 1), donate=True)(inputs("small"))
    given, size = inputs("wide"), nbytes(state("wide", 0))
    base = _anonymous()
    first = bench.load("wide")
    first(given)
    one = _anonymous() - base
    unchecked = refitkit.Pipeline({"check_finite": False})
    times: dict[str, list[float]] = {}
    for name, pipeline in (("unchecked", unchecked), ("checked", bench.pipeline)):
        more, times[name] = [], []
        for number in range(1, 10):
            donor = state("wide", number % 2)
            start = time.perf_counter()
            more.append(pipeline.with_weights(first, donor, donate=True, verify="none"))
            times[name].append(time.perf_counter() - start)
            assert torch.equal(more[-1](given), output("wide", number % 2))
        ten = _anonymous() - base
        del more, donor
        found.rows["ten sets of 201 MB, opened"].append(
            {
                "how": name,
                "median, ms": statistics.median(times[name]) * MS,
                "max, ms": max(times[name]) * MS,
                "first set and code, MB": one / MB,
                "ten sets and code, MB": ten / MB,
                "over ten sets": ten / (10 * size),
                "all but one closed, MB": (_anonymous() - base) / MB,
            }
        )
        found.judge(f"memory of ten sets, {name}, over ten sets", ten / (10 * size), 1.05)
    found.judge("opening a set of 201 MB, unchecked, most, ms", max(times["unchecked"]) * MS, 10)
    return found


def _anonymous() -> int:
    """Bytes of anonymous memory of this process, without garbage and what malloc keeps."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return anonymous(os.getpid())


def workers(bench: Bench) -> Found:
    """Four forked processes that serve from one set in shared memory."""
    found = Found()
    module = bench.load("large", 1)
    if not hasattr(module, "share"):
        found.notes.append("skipped: this version has no CompiledModule.share()")
        return found
    own = _anonymous()
    module.share()
    module(inputs("large"))
    freed, size = own - _anonymous(), nbytes(state("large", 0))
    refits = Refits(bench, module, "large")
    with Workers(module, 4) as four:
        first = four.shared
        after = [four.after(refits.read_back) for _ in range(bench.of(20, 5))]
        last, private = four.shared, four.most_private
    most_pause = max(one.pause for one in after) * MS
    stale, mixed = sum(one.stale for one in after), four.outputs["torn"]
    found.rows["four workers and their parent, 67 MB"].append(
        {
            "shared at first, MB": first / MB,
            "after refits, MB": last / MB,
            "freed by share(), MB": freed / MB,
            "most private of a worker, MB": private / MB,
            "refit, median, ms": statistics.median(one.seconds for one in after) * MS,
            "most pause, ms": most_pause,
            "last new answer after it, ms": max(one.late for one in after) * MS,
            "old answers after it": stale,
            "calls": four.outputs.total(),
            "torn": mixed,
        }
    )
    found.judge("workers: shared memory of five processes, over one set", first / size, 1.1)
    found.judge("workers: after refits, over two sets", last / (2 * size), 1.1)
    found.judge("workers: most pause, ms", most_pause, 1)
    found.judge("workers: calls begun after a refit and answered with old weights", stale, 0)
    found.judge("workers: torn outputs", mixed, 0)
    return found


class Update(NamedTuple):
    """One refit that all workers have noticed.

    Attributes:
        seconds: How long the refit took.
        pause: ``report.pause_seconds``.
        late: Seconds from its return to the first new answer of the last worker.
        stale: Workers with a call that began after its return, and had an old answer.
    """

    seconds: float
    pause: float
    late: float
    stale: int


class Workers:
    """Forked processes that call a module all the time, while a ``with`` block runs.

    Attributes:
        outputs: Number of outputs by the set that they belong to, afterwards.
    """

    def __init__(self, module: CompiledModule, count: int) -> None:
        """Start nothing yet."""
        context = multiprocessing.get_context("fork")
        pipes = [context.Pipe() for _ in range(count)]
        self._pipes = [here for here, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(module, there)) for _, there in pipes
        ]
        self.outputs: Counter[str] = Counter()

    def __enter__(self) -> Self:
        for process in self._processes:
            process.start()
        for pipe in self._pipes:
            assert pipe.recv() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.send("stop")
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            while not isinstance(said := pipe.recv(), Counter):
                pass
            self.outputs += said
            process.join()

    @property
    def shared(self) -> int:
        """Bytes in memory files of all processes; a page that several have counts once."""
        return sum(_memory(one)[0] for one in (os.getpid(), *(p.pid for p in self._processes)))

    @property
    def most_private(self) -> int:
        """Bytes that a worker has for itself alone, of the worker with the most."""
        return max(_memory(process.pid)[1] for process in self._processes)

    def after(self, refit: Callable[[], RefitResult]) -> Update:
        """Refit, and wait until every worker has answered with the new weights."""
        start = time.perf_counter()
        pause = refit().report.pause_seconds or 0.0
        end = time.perf_counter()
        changes = [pipe.recv() for pipe in self._pipes]
        late = max(first_new for _, first_new in changes) - end
        return Update(end - start, pause, late, sum(last_old > end for last_old, _ in changes))


def _serve(module: CompiledModule, pipe: Connection) -> None:
    """Call a module until told to stop.

    When its outputs change, send the start of the last old call and the end of the first new one.
    """
    given, wanted = inputs("large"), [output("large", one) for one in (0, 1)]
    counts: Counter[str] = Counter()
    live, last = None, 0.0
    while not pipe.poll():
        start = time.perf_counter()
        out = module(given)
        end = time.perf_counter()
        one = next((n for n, other in enumerate(wanted) if torch.equal(out, other)), None)
        counts["torn" if one is None else str(one)] += 1
        if live is None:
            pipe.send("ready")
        elif one is not None and one != live:
            pipe.send((last, end))
        live, last = live if one is None else one, start
    pipe.recv()
    pipe.send(counts)


def _memory(process: int | None) -> tuple[int, int]:
    """Bytes of a process in memory files, each page divided by its users, and its own; proc(5)."""
    name, shared, private = "", 0, 0
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        key, *values = line.split(maxsplit=5)
        if not key.endswith(":"):  # the first line of a mapping
            name = values[-1] if len(values) == 5 else ""
        elif name.startswith("/memfd:"):
            shared += int(values[0]) * 1024 if key == "Pss:" else 0
        elif key in {"Private_Clean:", "Private_Dirty:"}:
            private += int(values[0]) * 1024
    return shared, private


PARTS: dict[str, Callable[[Bench], Found]] = {
    "prepare": prepare,
    "beside": beside,
    "throughput": throughput,
    "donated": donated,
    "stalls": stalls,
    "torn": torn,
    "sets": sets,
    "workers": workers,
}
