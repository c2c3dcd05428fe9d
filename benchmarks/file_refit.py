"""A refit of an AOTInductor module from a safetensors file, against reading that file into memory.

Two files in the page cache take turns, so that every refit changes every weight. The file is read
into one buffer that was touched before. All take turns in one process, with one thread of torch.
Besides the refits, the work that each of them has to do is timed alone: reading in pieces, hashing
each piece, and summing it for the check that it is finite. What a refit takes beyond the last of
these rows is its own. Times are by the clock and of the thread's CPU: other work on the machine
takes the first, and hardly the second.

usage: python benchmarks/file_refit.py [--repeats N] [--width N] [--layers N] [--dtype NAME]
    [--folder PATH] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from refitkit import Config, Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

GOAL = 1.2
"""Most that a refit without a verifier should cost, over reading its file."""

PIECE = 1 << 21
"""Bytes that refitkit reads at once."""

Times = dict[str, list[tuple[float, float]]]


class Bench:
    """A module, two files for it, and what is timed."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        """Compile, write the files, and touch all memory."""
        torch.manual_seed(0)
        dtype = getattr(torch, options.dtype)
        layers = [torch.nn.Linear(options.width, options.width) for _ in range(options.layers)]
        model = torch.nn.Sequential(*layers).eval().to(dtype)
        self.files = [folder / f"{name}.safetensors" for name in "ab"]
        for file in self.files:
            changed = {n: v + torch.randn_like(v) * 0.01 for n, v in model.state_dict().items()}
            save_file(changed, file)
        program = torch.export.export(model, (torch.randn(2, options.width, dtype=dtype),))
        Pipeline().compile(program, prove=False).save(folder / "model.refit")
        del model, program, changed
        self.pipeline, self.unchecked = Pipeline(), Pipeline(Config(check_finite=False))
        self.compiled = self.pipeline.load(folder / "model.refit")
        self.route = self.compiled.engines["model"].route[0]
        self.bytes = self.files[0].stat().st_size
        self.buffer = torch.zeros(self.bytes, dtype=torch.uint8)
        self.memory = self.buffer.numpy().data
        self.flat = self.buffer[: self.bytes // PIECE * PIECE].view(dtype)
        self.turn = 0

    def measured(self) -> dict[str, Callable[[Path], object]]:
        """What is timed, by name. Each gets a file."""
        refit, compiled = self.pipeline.refit, self.compiled
        return {
            "read": self.read,
            "read in pieces": self.pieces,
            "read, hashed": lambda file: self.pieces(file, hashed=True),
            "read, hashed, summed": lambda file: self.pieces(file, hashed=True, summed=True),
            "refit, no finite check": lambda f: self.unchecked.refit(compiled, f, verify="none"),
            "refit": lambda file: refit(compiled, file, verify="none"),
            'refit, verify="weights"': lambda file: refit(compiled, file, verify="weights"),
        }

    def read(self, file: Path) -> None:
        """Read a file with as few calls as the system allows."""
        with file.open("rb", buffering=0) as stream:
            done = 0
            while done < self.bytes:
                done += os.preadv(stream.fileno(), [self.memory[done:]], done)

    def pieces(self, file: Path, *, hashed: bool = False, summed: bool = False) -> None:
        """Read a file in pieces, and look at each of them while it is in the cache."""
        step = PIECE // self.flat.itemsize
        with file.open("rb", buffering=0) as stream:
            for number, offset in enumerate(range(0, self.bytes - PIECE + 1, PIECE)):
                piece = self.memory[offset : offset + PIECE]
                os.preadv(stream.fileno(), [piece], offset)
                if hashed:
                    xxhash.xxh3_128_digest(piece)
                if summed:
                    self.flat[number * step : (number + 1) * step].sum().item()

    def times(self, repeats: int) -> Times:
        """Seconds by the clock and of this thread, by name."""
        found: Times = {name: [] for name in self.measured()}
        # a refit uses the memory of the set before the live one, which two refits have touched
        for turn in range(-2, repeats):
            for name, work in self.measured().items():
                # refits go to the other file each; what only reads, reads the file of the next one
                file = self.files[self.turn % 2]
                self.turn += name.startswith("refit")
                clock, own = time.perf_counter(), time.thread_time()
                work(file)
                if turn >= 0:
                    found[name].append((time.perf_counter() - clock, time.thread_time() - own))
        return found


def show(bench: Bench, found: Times, repeats: int) -> None:
    """Print all times, and their ratios to that of reading the file."""
    table = Table(title=f"{bench.bytes / 1e6:.0f} MB, {repeats} turns, {bench.route}")
    columns = ("", "best, ms", "over read", "median, ms", "over read", "CPU, ms", "over read")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    rows = {name: summary(some) for name, some in found.items()}
    for name, row in rows.items():
        cells = (
            f"{cell:.2f}"
            for one, other in zip(row, rows["read"], strict=True)
            for cell in (one * 1e3, one / other)
        )
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    best = rows["refit"][0] / rows["read"][0]
    verdict = "met" if best <= GOAL else "NOT MET"
    console.print(f"refit over read, best of each: {best:.2f}; goal {GOAL}: {verdict}")


def summary(some: list[tuple[float, float]]) -> tuple[float, float, float]:
    """The best and the median by the clock, and the median of the thread, in seconds."""
    clock, own = zip(*some, strict=True)
    return min(clock), statistics.median(clock), statistics.median(own)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--folder", type=Path, help="where the files lie; default: TMPDIR")
    parser.add_argument("--json", type=Path, help="write the seconds to this file, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(options, Path(folder))
        found = bench.times(options.repeats)
        show(bench, found, options.repeats)
    if options.json:
        options.json.write_text(json.dumps({"bytes": bench.bytes, "seconds": found}))


if __name__ == "__main__":
    main()
