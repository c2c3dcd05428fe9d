"""What it costs a refit to tell how far each slot moves: ``Config.changes`` off, sampled, exact.

All three are measured in one process, turn by turn, on the same AOTInductor module; every refit
changes every weight, and both sets of weights of the engine are touched before anything is timed.
Ratios of medians are what counts. On a machine with other work, ``--cpu`` counts the processor time
of one thread instead of the clock's.

usage: python benchmarks/refit_changes.py [--cpu] [--repeats N] [--model NAME ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from refitkit import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

HOW = ("off", "sampled", "exact")


def linear() -> tuple[torch.nn.Module, torch.Tensor]:
    """100 MB in 12 tensors."""
    layers = [torch.nn.Linear(2048, 2048) for _ in range(6)]
    return torch.nn.Sequential(*layers), torch.randn(4, 2048)


def encoder() -> tuple[torch.nn.Module, torch.Tensor]:
    """101 MB in 96 tensors: 8 layers of a transformer encoder of width 512."""
    layer = torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 8, enable_nested_tensor=False), torch.randn(
        1, 16, 512
    )


def many() -> tuple[torch.nn.Module, torch.Tensor]:
    """100 MB in 400 tensors: the worst case, as the time goes by slots."""
    layers = [torch.nn.Linear(353, 353) for _ in range(200)]
    return torch.nn.Sequential(*layers), torch.randn(4, 353)


MODELS = {"linear": linear, "encoder": encoder, "many": many}


def times(name: str, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    first = {key: value.clone() for key, value in model.eval().state_dict().items()}
    states = [{k: v + 0.01 * torch.randn_like(v) for k, v in first.items()} for _ in range(2)]
    compiled = Pipeline().compile(torch.export.export(model, (inputs,)), prove=False)
    pipelines = {how: Pipeline({"changes": how}) for how in HOW}
    seconds: dict[str, list[float]] = {how: [] for how in HOW}
    for turn in range(-3, repeats):
        for how in HOW[turn % 3 :] + HOW[: turn % 3]:  # no place in the turn is always the same
            to = compiled.version % 2
            start = clock()
            report = pipelines[how].refit(compiled, states[to], verify="none").report
            took = clock() - start
            assert report.changed
            assert len(report.changes) == (0 if how == "off" else len(compiled.slots))
            if turn >= 0:
                seconds[how].append(took)
    median = {how: statistics.median(some) for how, some in seconds.items()}
    return {
        "model": name,
        "bytes": report.bytes_written,
        "slots": report.slots_written,
        "ms": {how: median[how] * 1e3 for how in HOW},
        "quartiles": {how: _quartiles(seconds[how]) for how in HOW},
        "over off": {how: median[how] / median["off"] for how in HOW},
    }


def _quartiles(some: list[float]) -> tuple[float, float]:
    """In milliseconds."""
    ordered = sorted(some)
    return ordered[len(some) // 4] * 1e3, ordered[3 * len(some) // 4] * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--cpu", action="store_true", help="processor time, one thread")
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    given = parser.parse_args()
    if given.cpu:
        torch.set_num_threads(1)
    clock = time.process_time if given.cpu else time.perf_counter
    found = [times(name, given.repeats, clock) for name in given.model or MODELS]
    table = Table("model", "MB", "slots", *(f"{how}, ms" for how in HOW), "sampled", "exact")
    for one in found:
        ms, over = one["ms"], one["over off"]
        cells = [f"{ms[how]:.2f}" for how in HOW] + [f"{over[how]:.2f}" for how in HOW[1:]]
        table.add_row(one["model"], f"{one['bytes'] / 1e6:.0f}", str(one["slots"]), *cells)
    what = "processor time, " if given.cpu else ""
    Console().print(f"{what}{torch.get_num_threads()} threads, torch {torch.__version__}")
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
