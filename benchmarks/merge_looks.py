"""What it costs that a refit looks at weights several times, where they are a merge.

usage: python benchmarks/merge_looks.py [--megabytes 400] [--repeats N] [--json FILE]

An AOTInductor module of linear layers is refitted to the average of three state_dicts and to task
vectors of the same, with ``Config.keep_limit`` at its default (what was made is kept until the
refit is over) and at 0 (it is made for each look), and to one state_dict. All take turns in one
process; every refit changes every weight and is verified by weights. Ratios of medians are what
counts. Peaks are of anonymous memory, over one set of weights; tensors of less than 32 MB come from
a heap that keeps what was freed, and would blur them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from memory_probe import Probe
from rich.console import Console
from rich.table import Table

from refitkit import Pipeline, TaskVectors, WeightedAverage

PIPELINES = {"kept": {}, "made anew": {"keep_limit": 0}}


def merges(states: list[dict[str, torch.Tensor]]) -> dict[str, list[Any]]:
    """Two of each kind, so that every refit brings other weights."""
    a, b, c = states
    return {
        "state_dict": [a, b],
        "average": [WeightedAverage([(a, 1), (b, n), (c, 5)]) for n in (2, 3)],
        "task vectors": [TaskVectors(a, [(b, 0.4), (c, n)]) for n in (0.1, 0.2)],
    }


def times(dtype: torch.dtype, given: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    count = max(round(given.megabytes * 1e6 / (given.width**2 * dtype.itemsize)), 1)
    layers = [torch.nn.Linear(given.width, given.width, dtype=dtype) for _ in range(count)]
    model = torch.nn.Sequential(*layers).eval()
    first = {key: value.detach().clone() for key, value in model.state_dict().items()}
    states = [{k: v + 0.1 * torch.randn_like(v) for k, v in first.items()} for _ in range(3)]
    program = torch.export.export(model, (torch.ones(1, given.width, dtype=dtype),))
    compiled = Pipeline({"keep_base": False}).compile(program, prove=False)
    size = sum(slot.nbytes for slot in compiled.slots)
    pipelines = {how: Pipeline({**one, "keep_base": False}) for how, one in PIPELINES.items()}
    found: dict[tuple[str, str], list[float]] = {}
    peaks: dict[tuple[str, str], float] = {}
    kinds = merges(states)
    for turn in range(-2, given.repeats):
        for kind, both in kinds.items():
            for how in reversed(PIPELINES) if turn % 2 else PIPELINES:
                ctypes.CDLL(None).malloc_trim(0)  # what others gave back is no memory at hand
                with Probe(0.002) if turn == -1 else nullcontext() as probe:
                    start = time.perf_counter()
                    to = both[compiled.version % 2]
                    report = pipelines[how].refit(compiled, to, verify="weights").report
                    took = time.perf_counter() - start
                assert report.changed
                if probe is not None:
                    peaks[kind, how] = probe.own / size
                elif turn >= 0:
                    found.setdefault((kind, how), []).append(took)
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "MB": size / 1e6,
            "kind": kind,
            "ms": {how: statistics.median(found[kind, how]) * 1e3 for how in PIPELINES},
            "peak": {how: peaks[kind, how] for how in PIPELINES},
        }
        for kind in kinds
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--width", type=int, default=4096, help="of the layers")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    given = parser.parse_args()
    dtypes = [getattr(torch, name) for name in given.dtype or ("float32", "bfloat16")]
    found = [row for dtype in dtypes for row in times(dtype, given)]
    table = Table("dtype", "MB", "weights", "made anew, ms", "kept, ms", "kept over made anew")
    table.add_column("peak, made anew")
    table.add_column("peak, kept")
    for one in found:
        anew, kept = one["ms"]["made anew"], one["ms"]["kept"]
        cells = [one["dtype"], f"{one['MB']:.0f}", one["kind"], f"{anew:.0f}", f"{kept:.0f}"]
        peak = [f"{one['peak'][how]:.2f}" for how in ("made anew", "kept")]
        table.add_row(*cells, f"{kept / anew:.2f}", *peak)
    Console(width=120).print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    Console(width=120).print(table)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
