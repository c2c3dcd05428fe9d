"""The time of one refit of a small module: four slots, 33 kB, so nearly all of it is Python.

With ``--other`` the same is measured in another checkout, in turns with this one, each turn in a
process of its own. Ratios of medians are what counts.

usage: python benchmarks/small_refit.py [--runs 400] [--turns 5] [--other CHECKOUT]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()


def main() -> None:
    """Measure this checkout or, with ``--other``, both, and print microseconds."""
    parser = argparse.ArgumentParser(description="Measure one refit of a small module.")
    parser.add_argument("--runs", type=int, default=400, help="refits in one turn")
    parser.add_argument("--turns", type=int, default=5, help="processes for each checkout")
    parser.add_argument("--other", type=Path, help="checkout to compare with")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here is not None:
        print(microseconds(given.here, given.runs))
        return
    checkouts = [HERE.parents[1], *([given.other.resolve()] if given.other else [])]
    found: dict[Path, list[float]] = {checkout: [] for checkout in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(given.turns):
            for number, checkout in enumerate(checkouts):
                saved = Path(folder) / f"{number}.refit"  # of its own: formats may differ
                found[checkout].append(in_process(checkout, saved, given.runs))
    medians = [statistics.median(times) for times in found.values()]
    for name, times, median in zip(("this", "other"), found.values(), medians, strict=False):
        print(f"{name:6} {median:7.0f} us  ({min(times):.0f} to {max(times):.0f})")
    if given.other:
        print(f"this over other: {medians[0] / medians[1]:.2f}")


def in_process(checkout: Path, saved: Path, runs: int) -> float:
    """Microseconds of a refit in a checkout, measured in a new process."""
    command = [sys.executable, str(HERE), "--here", str(saved), "--runs", str(runs)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # noqa: S603 - this file
        command, env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def microseconds(saved: Path, runs: int) -> float:
    """Median time of a refit in which all weights change. Compiles the module the first time."""
    import torch

    import refitkit

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    pipeline = refitkit.Pipeline()
    if not saved.exists():
        program = torch.export.export(model, (torch.randn(1, 64),))
        pipeline.compile(program).save(str(saved))
    compiled = pipeline.load(str(saved))
    states = [{k: torch.randn_like(v) for k, v in model.state_dict().items()} for _ in "ab"]
    for turn in range(20):
        pipeline.refit(compiled, states[turn % 2])
    times = []
    for turn in range(runs):
        start = time.perf_counter()
        pipeline.refit(compiled, states[turn % 2])
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


if __name__ == "__main__":
    main()
