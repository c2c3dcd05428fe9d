"""What going back costs: undo, restore and refits without a way back, against refits and memmove.

All are measured in one process, turn by turn, on the same two AOTInductor modules; every refit
changes every weight. Nothing is verified afterwards, so that what is compared is the writing.
Ratios of medians are what counts.

usage: python benchmarks/way_back.py [--repeats N] [--width N] [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from refitkit import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

State = dict[str, torch.Tensor]


class Bench:
    """Two modules, two state_dicts, and what is timed."""

    def __init__(self, width: int) -> None:
        """Compile, refit once each, and touch all memory."""
        torch.manual_seed(0)
        layers = [torch.nn.Linear(width, width) for _ in range(6)]
        model, inputs = torch.nn.Sequential(*layers).eval(), torch.randn(4, width)
        program = torch.export.export(model, (inputs,))
        self.pipeline = Pipeline()
        self.one = self.pipeline.compile(program, prove=False)
        self.two = self.pipeline.compile(program, prove=False)
        base = {name: value.clone() for name, value in model.state_dict().items()}
        self.states = [{n: v + 0.01 * torch.randn_like(v) for n, v in base.items()} for _ in "ab"]
        self.place = {name: torch.ones_like(value) for name, value in base.items()}
        self.bytes = sum(value.nbytes for value in base.values())
        for compiled in (self.one, self.two):
            for state in self.states:
                self.pipeline.refit(compiled, state, verify="none")
        self.last = self.pipeline.refit(self.one, self.states[0], verify="none")

    def _refit(self, **how: bool) -> None:
        state = self.states[self.one.version % 2]
        self.last = self.pipeline.refit(self.one, state, verify="none", **how)

    def _again(self) -> None:
        """Untimed: a refit that can be undone, from the second set of weights on."""
        self._refit()
        self._refit()

    def measured(self) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
        """What is done first, untimed, and what is timed, by name."""
        jobs = [(self.one, self.states[0]), (self.two, self.states[1])]
        return {
            "memmove": (lambda: None, self.memmove),
            "refit": (self._again, self._refit),
            "undo": (self._again, lambda: self.last.undo(verify="none")),
            "restore": (self._again, lambda: self.one.restore(verify="none")),
            "rollback=False": (self._again, lambda: self._refit(rollback=False)),
            "both, one by one": (
                self._again,
                lambda: [self.pipeline.refit(*job, verify="none") for job in jobs],
            ),
            "both, refit_all": (
                self._again,
                lambda: self.pipeline.refit_all(jobs, verify="none"),
            ),
        }

    def memmove(self) -> None:
        """Copy all weights as C does, in one thread."""
        for name, value in self.states[0].items():
            ctypes.memmove(self.place[name].data_ptr(), value.data_ptr(), value.nbytes)


def times(bench: Bench, repeats: int) -> dict[str, list[float]]:
    """Seconds by name."""
    measured = bench.measured()
    found: dict[str, list[float]] = {name: [] for name in measured}
    for turn in range(-2, repeats):
        for name, (before, work) in measured.items():
            if name == "restore":  # the refits that give all up have freed the copies
                bench.one.held = type(bench.one.held)()
            before()
            start = time.perf_counter()
            work()
            if turn >= 0:
                found[name].append(time.perf_counter() - start)
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--width", type=int, default=2048, help="of 6 linear layers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bench = Bench(options.width)
    seconds = times(bench, options.repeats)
    medians = {name: statistics.median(some) for name, some in seconds.items()}
    table = Table(title=f"{bench.bytes / 1e6:.0f} MB of weights, {options.repeats} turns")
    for column in ("", "ms", "over memmove", "over refit"):
        table.add_column(column, justify="left" if not column else "right")
    for name, median in medians.items():
        over = [median / medians[other] for other in ("memmove", "refit")]
        table.add_row(name, f"{median * 1e3:.2f}", *(f"{ratio:.2f}" for ratio in over))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"bytes": bench.bytes, "seconds": seconds}))


if __name__ == "__main__":
    main()
