"""A refit of an AOTInductor module against a memmove of the same bytes, and against compiling.

Everything but compiling is measured in one process, turn by turn, so that other work on the machine
meets all of it alike. Copies of many threads suffer more from other work than a memmove of one
does; so turns in which other processes worked are left out where enough others are left, and it is
said how many. Medians are compared, and quartiles show how noisy it was. Every refit changes every
weight (but for the one of a single weight): both sets of weights of the engine are brought to one
state first, untimed, and the timed refit goes to the other. What is asked is in ``TARGETS``.

usage: python benchmarks/aotinductor_refit.py [--model NAME] [--repeats N] [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from refitkit import Config, Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

THREADS = torch.get_num_threads()
QUIET = 0.1
"""Cores that others may keep busy in a turn that counts."""
MOST = 8
"""At most so many times the repeats are measured, until enough turns were quiet."""
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Target:
    """A ratio of two medians that should not be exceeded, or should be reached."""

    name: str
    over: tuple[str, str]
    limit: float
    at_least: bool = False


TARGETS = (
    Target("refit, names, shapes and dtypes checked, over memmove", ("refit", "memmove"), 1.3),
    Target("refit, finiteness checked too, over memmove", ("refit, finite", "memmove"), 2.0),
    Target("compile over refit", ("compile", "refit"), 300, at_least=True),
    Target("swap, ms", ("swap", "ms"), 0.1),
)


def linear() -> tuple[torch.nn.Module, torch.Tensor]:
    """67 million parameters in 32 tensors: linear layers with ReLUs."""
    layers = [layer for _ in range(16) for layer in (torch.nn.Linear(2048, 2048), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers), torch.randn(4, 2048)


def transformer() -> tuple[torch.nn.Module, torch.Tensor]:
    """64 million parameters in 108 tensors: a BERT-like encoder."""
    layer = torch.nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 9, enable_nested_tensor=False)
    return encoder, torch.randn(1, 32, 768)


MODELS = {"linear": linear, "transformer": transformer}


@dataclass(frozen=True)
class Times:
    """What was measured.

    Attributes:
        bytes: Bytes of all weights.
        turns: So many turns were measured.
        kept: So many of them count.
        others: Cores that other processes kept busy, median over all turns.
        seconds: All times by name.
    """

    bytes: int
    turns: int
    kept: int
    others: float
    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """In seconds."""
        return statistics.median(self.seconds[name])

    def quartiles(self, name: str) -> tuple[float, float]:
        """The lower and the upper one, in seconds."""
        some = sorted(self.seconds[name])
        return some[len(some) // 4], some[(3 * len(some)) // 4]


class Bench:
    """The measured things, and the two state_dicts that they alternate between."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        model, self.inputs = MODELS[name]()
        self.states = [_state(model.eval()) for _ in range(2)]
        largest = max(self.states[0], key=lambda name: self.states[0][name].nbytes)
        self.one = [{largest: state[largest]} for state in self.states]
        self.target = {name: torch.ones_like(value) for name, value in self.states[0].items()}
        self.bytes = sum(value.nbytes for value in self.states[0].values())
        self.once: dict[str, float] = {}
        program = self._timed("export", lambda: torch.export.export(model, (self.inputs,)))
        self.compiled = self._timed("compile", lambda: Pipeline().compile(program, prove=False))
        self.engine = self.compiled.engines["model"]
        self.plain, self.full = Pipeline(Config(check_finite=False)), Pipeline()
        self._timed("first refit", lambda: self.refit(self.plain, 1))

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self.once[name] = time.perf_counter() - start
        return result

    def measured(self) -> dict[str, Callable[[int], object]]:
        """What is timed, by name; each gets the number of the state_dict to go to."""
        return {
            "memmove": self.memmove,
            "copy_, 1 thread": lambda to: alone(lambda: self.copy(to)),
            "copy_": self.copy,
            "refit": lambda to: self.refit(self.plain, to),
            "refit, 1 thread": lambda to: alone(lambda: self.refit(self.plain, to)),
            "refit, finite": lambda to: self.refit(self.full, to),
            "refit, finite, 1 thread": lambda to: alone(lambda: self.refit(self.full, to)),
            "refit, finite, read back": lambda to: self.refit(self.full, to, "weights"),
            "refit, one weight": lambda to: self.plain.refit(
                self.compiled, self.one[to], verify="none", partial=True
            ),
            "swap": lambda _: self.engine.swap(),
            "inference": lambda _: self.compiled(self.inputs),
        }

    def before(self, name: str, to: int) -> None:
        """Bring both sets of weights to the other state; for one weight, that weight only.

        The first partial refit after a full one brings the whole second set up to date. What is
        timed is one of many.
        """
        for _ in range(2):
            if name == "refit, one weight":
                self.plain.refit(self.compiled, self.one[1 - to], verify="none", partial=True)
            elif name.startswith("refit"):
                self.refit(self.plain, 1 - to)

    def refit(self, pipeline: Pipeline, to: int, verify: str = "none") -> None:
        """A full refit from a state_dict."""
        pipeline.refit(self.compiled, self.states[to], verify=verify)

    def memmove(self, to: int) -> None:
        """One thread, into memory that was touched before."""
        for name, value in self.states[to].items():
            ctypes.memmove(self.target[name].data_ptr(), value.data_ptr(), value.nbytes)

    def copy(self, to: int) -> None:
        """What torch takes for the same."""
        for name, value in self.states[to].items():
            self.target[name].copy_(value)


def _state(model: torch.nn.Module) -> State:
    """A state_dict with new values of the same size as the model's."""
    state = model.state_dict()
    return {name: value + 0.01 * torch.randn_like(value) for name, value in state.items()}


def alone(work: Callable[[], object]) -> None:
    """Let torch use one thread."""
    torch.set_num_threads(1)
    work()
    torch.set_num_threads(THREADS)


class Others:
    """Tells how many cores other processes kept busy since it was asked last (proc(5), stat)."""

    def __init__(self) -> None:
        self._last = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        """Seconds, and seconds that cores worked for others; zero where nobody tells."""
        file = Path("/proc/stat")
        if not file.exists():
            return time.perf_counter(), 0.0
        user, nice, system, _idle, _wait, *irq = map(int, file.read_text().split()[1:9])
        busy = (user + nice + system + sum(irq)) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.perf_counter(), busy - own.user - own.system

    def cores(self) -> float:
        """The number, since the last call."""
        (start, before), self._last = self._last, self._now()
        return (self._last[1] - before) / (self._last[0] - start)


def run(model: str, repeats: int) -> Times:
    """All times in seconds, by name; what was done once has one."""
    bench, others = Bench(model), Others()
    turns: list[dict[str, float]] = []
    loads: list[float] = []
    for turn in range(-2, MOST * repeats):  # the first two warm up
        times, load = _turn(bench, turn % 2), others.cores()
        if turn >= 0:
            turns.append(times)
            loads.append(load)
        if sum(load < QUIET for load in loads) == repeats:
            break
    for slot in bench.compiled.slots:  # or nothing of this was worth measuring
        assert torch.isfinite(bench.compiled.read(slot.name)).all()
    kept = [times for times, load in zip(turns, loads, strict=True) if load < QUIET]
    kept = kept if len(kept) >= min(5, repeats) else turns
    seconds = {name: [once] for name, once in bench.once.items()}
    seconds |= {name: [times[name] for times in kept] for name in turns[0]}
    return Times(bench.bytes, len(turns), len(kept), statistics.median(loads), seconds)


def _turn(bench: Bench, to: int) -> dict[str, float]:
    times = {}
    for name, work in bench.measured().items():
        bench.before(name, to)
        start = time.perf_counter()
        work(to)
        times[name] = time.perf_counter() - start
    return times


def verdicts(found: Times) -> list[dict[str, object]]:
    """Each target with what was measured and whether it is met."""
    rows = []
    for target in TARGETS:
        one, other = target.over
        measured = found.median(one) / (1e-3 if other == "ms" else found.median(other))
        met = measured >= target.limit if target.at_least else measured <= target.limit
        rows.append({**asdict(target), "measured": measured, "met": met})
    return rows


def show(found: Times, model: str) -> None:
    """Print both tables."""
    console = Console()
    machine = f"{platform.machine()}, {THREADS} threads, torch {torch.__version__}"
    console.print(f"{model}, {found.bytes / 1e6:.0f} MB; {machine}")
    console.print(f"{found.kept} of {found.turns} turns; others kept {found.others:.2f} cores busy")
    times = Table("what", "median, ms", "quartiles", "over memmove")
    for name, some in found.seconds.items():
        low, high = found.quartiles(name)
        spread = f"{low * 1e3:.3f} to {high * 1e3:.3f}" if len(some) > 1 else "once"
        ratio = found.median(name) / found.median("memmove")
        times.add_row(name, f"{found.median(name) * 1e3:.3f}", spread, f"{ratio:.2f}")
    console.print(times)
    targets = Table("target", "wanted", "measured", "met")
    for row in verdicts(found):
        wanted = f"{'at least' if row['at_least'] else 'at most'} {row['limit']}"
        met = "yes" if row["met"] else "NO"
        targets.add_row(str(row["name"]), wanted, f"{row['measured']:.3g}", met)
    console.print(targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, default="transformer")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    given = parser.parse_args()
    found = run(given.model, given.repeats)
    show(found, given.model)
    if given.json:
        data = {
            **asdict(found),
            "model": given.model,
            "threads": THREADS,
            "targets": verdicts(found),
        }
        given.json.write_text(json.dumps(data, indent=1, default=str))


if __name__ == "__main__":
    main()
