"""A refit of an AOTInductor module against a memmove of the same bytes, and against compiling.

Everything is measured in one process, turn by turn, so that other work on the machine meets all of
it alike; medians are compared. What is asked is in ``TARGETS``.

usage: python benchmarks/aotinductor_refit.py [--repeats N] [--json FILE]
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
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from refitkit import Config, Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH, LAYERS = 2048, 16
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


def model(seed: int) -> torch.nn.Module:
    """67 million parameters: 16 linear layers with ReLUs."""
    torch.manual_seed(seed)
    layers = [
        layer for _ in range(LAYERS) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU())
    ]
    return torch.nn.Sequential(*layers).eval()


class Bench:
    """The measured things, and the two state_dicts that they alternate between."""

    def __init__(self) -> None:
        self.states = [dict(model(seed).state_dict()) for seed in (0, 1)]
        self.one = [{"0.weight": state["0.weight"]} for state in self.states]
        self.inputs = torch.randn(4, WIDTH)
        self.target = {name: torch.ones_like(value) for name, value in self.states[0].items()}
        self.bytes = sum(value.nbytes for value in self.states[0].values())
        start = time.perf_counter()
        program = torch.export.export(model(0), (self.inputs,))
        self.compiled = Pipeline().compile(program, prove=False)
        self.compile_seconds = time.perf_counter() - start
        self.engine = self.compiled.engines["model"]
        self.plain, self.full = Pipeline(Config(check_finite=False)), Pipeline()
        start = time.perf_counter()
        self.plain.refit(self.compiled, self.states[1], verify="none")
        self.first_seconds = time.perf_counter() - start

    def measured(self) -> dict[str, Callable[[int], object]]:
        """What is timed, by name; each gets the number of the state_dict to go to."""
        return {
            "memmove": self.memmove,
            "copy_, 1 thread": lambda to: self.copy(to, threads=1),
            "copy_": lambda to: self.copy(to, threads=os.cpu_count() or 1),
            "refit": lambda to: self.plain.refit(self.compiled, self.states[to], verify="none"),
            "refit, finite": lambda to: self.full.refit(
                self.compiled, self.states[1 - to], verify="none"
            ),
            "refit, one weight": lambda to: self.plain.refit(
                self.compiled, self.one[to], verify="none", partial=True
            ),
            "refit, read back": lambda to: self.plain.refit(
                self.compiled, self.states[1 - to], verify="weights"
            ),
            "swap": lambda _: self.engine.swap(),
            "inference": lambda _: self.compiled(self.inputs),
        }

    def before(self, name: str, to: int) -> None:
        """What is done before a thing is timed.

        The first partial refit after a full one brings the whole second buffer up to date; what is
        timed is one of many, so another goes before it.
        """
        if name == "refit, one weight":
            self.plain.refit(self.compiled, self.one[1 - to], verify="none", partial=True)

    def memmove(self, to: int) -> None:
        """One thread, into memory that was touched before."""
        for name, value in self.states[to].items():
            ctypes.memmove(self.target[name].data_ptr(), value.data_ptr(), value.nbytes)

    def copy(self, to: int, threads: int) -> None:
        """What torch takes for the same."""
        torch.set_num_threads(threads)
        for name, value in self.states[to].items():
            self.target[name].copy_(value)
        torch.set_num_threads(os.cpu_count() or 1)


def run(repeats: int) -> dict[str, float]:
    """Medians in seconds by name."""
    bench = Bench()
    measured = bench.measured()
    times: dict[str, list[float]] = {name: [] for name in measured}
    for turn in range(-2, repeats):
        for name, work in measured.items():
            bench.before(name, turn % 2)
            start = time.perf_counter()
            work(turn % 2)
            took = time.perf_counter() - start
            if turn >= 0:
                times[name].append(took)
    medians = {name: statistics.median(some) for name, some in times.items()}
    return {
        "compile": bench.compile_seconds,
        "first refit": bench.first_seconds,
        "ms": 1e-3,
        "bytes": float(bench.bytes),
        **medians,
    }


def verdicts(found: dict[str, float]) -> list[dict[str, object]]:
    """Each target with what was measured and whether it is met."""
    rows = []
    for target in TARGETS:
        ratio = found[target.over[0]] / found[target.over[1]]
        met = ratio >= target.limit if target.at_least else ratio <= target.limit
        rows.append({**asdict(target), "measured": ratio, "met": met})
    return rows


def show(found: dict[str, float], repeats: int) -> None:
    """Print both tables."""
    console = Console()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    console.print(f"{found['bytes'] / 1e6:.0f} MB of weights; {machine}; median of {repeats}")
    times = Table("what", "ms", "over memmove")
    for name, value in found.items():
        if name not in {"ms", "bytes"}:
            times.add_row(name, f"{value * 1e3:.3f}", f"{value / found['memmove']:.2f}")
    console.print(times)
    targets = Table("target", "wanted", "measured", "met")
    for row in verdicts(found):
        wanted = f"{'at least' if row['at_least'] else 'at most'} {row['limit']}"
        targets.add_row(
            str(row["name"]), wanted, f"{row['measured']:.3g}", "yes" if row["met"] else "NO"
        )
    console.print(targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    given = parser.parse_args()
    found = run(given.repeats)
    show(found, given.repeats)
    if given.json:
        data = {"seconds": found, "targets": verdicts(found)}
        given.json.write_text(json.dumps(data, indent=1, default=str))


if __name__ == "__main__":
    main()
