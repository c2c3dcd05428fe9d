"""Anonymous memory of a refit from a sharded checkpoint that is as large as the engine.

usage: python benchmarks/sharded_memory.py [--gigabytes 4.3] [--shards 10] [--inputs] [--again]
                                           [--json FILE]

A model of a few large linear layers is compiled and saved by one process, which also writes a
checkpoint with other weights: several ``.safetensors`` files and their index. A fresh process then
loads the saved module and refits it from the index, as a server would, and another one does so with
``rollback=False``. With ``--inputs`` outputs are verified, for which eager torch computes them with
the new weights. With ``--again`` a second refit is measured: it begins with two sets of weights,
where the first has left a way back. Anonymous memory (``RssAnon``: what has no file behind it) is
sampled from a third process, all the time; ratios are of the whole process, interpreter and
libraries included, to the bytes of one set of weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory_probe import Probe, anonymous

WITH_WAY_BACK, GIVEN_UP = 2.15, 1.15
"""The most anonymous memory that there may be at any time, in engine bytes."""

_GB = 1e9
_PAUSE = 0.002
_SEED = 7


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.3, help="of one set of weights")
    parser.add_argument("--width", type=int, default=8192, help="of the linear layers")
    parser.add_argument("--shards", type=int, default=10, help="files of the checkpoint")
    parser.add_argument("--give-up", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--inputs", action="store_true", help="verify outputs, not weights")
    parser.add_argument("--again", action="store_true", help="measure a second refit")
    parser.add_argument("--delta", action="store_true", help="as a refit that compares")
    parser.add_argument("--folder", type=Path, help="where files go for the time being")
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    parser.add_argument("--stage", choices=["make", "measure"], help=argparse.SUPPRESS)
    return parser.parse_args()


# -- the process that compiles ------------------------------------------------------------------


def make(folder: Path, gigabytes: float, width: int, shards: int) -> dict[str, Any]:
    """Compile and save a model, and write a checkpoint of other weights."""
    import torch
    from safetensors.torch import save_file

    import refitkit

    class Layers(torch.nn.Module):
        """Linear layers of one width."""

        def __init__(self, count: int) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(
                torch.nn.utils.skip_init(torch.nn.Linear, width, width) for _ in range(count)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    count = max(round(gigabytes * _GB / (4 * width * (width + 1))), 1)
    model = Layers(count).eval().requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        parameter.uniform_(-(width**-0.5), width**-0.5)
    start = time.perf_counter()
    program = torch.export.export(model, (torch.ones(1, width),))
    compiled = refitkit.compile(program, prove=False)
    seconds = time.perf_counter() - start
    compiled.save(folder / "model.refitkit")
    del compiled, program

    torch.manual_seed(_SEED)
    names = list(model.state_dict())
    files = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    home = {name: files[number * shards // len(names)] for number, name in enumerate(names)}
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    del model
    for file in files:
        new = {
            name: torch.empty(shapes[name]).uniform_(-(width**-0.5), width**-0.5)
            for name in names
            if home[name] == file
        }
        if new:
            save_file(new, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    return {"compile_seconds": seconds, "layers": count, "files": len(set(home.values()))}


# -- the process that refits --------------------------------------------------------------------


def measure(folder: Path, how: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Load the saved module and refit it from the index; bytes and seconds of both."""
    import torch

    import refitkit

    torch.set_grad_enabled(mode=False)
    found: dict[str, Any] = {"begin": anonymous(os.getpid())}
    with Probe(_PAUSE) as probe:
        start = time.perf_counter()
        compiled = refitkit.load(folder / "model.refitkit")
        found["load_seconds"] = time.perf_counter() - start
    found["load_peak"] = found["begin"] + probe.own
    found["loaded"] = anonymous(os.getpid())
    found["engine"] = sum(slot.nbytes for slot in compiled.slots)
    x = torch.ones(1, given.width)
    before = compiled(x)
    how |= {"inputs": (x,)} if given.inputs else {}
    index = folder / "model.safetensors.index.json"
    if given.again:
        refitkit.refit(compiled, index, **how)
    with Probe(_PAUSE) as probe:
        start = time.perf_counter()
        base = anonymous(os.getpid())
        report = refitkit.refit(compiled, index, **how).report
        found["refit_seconds"] = time.perf_counter() - start
    found["refit_base"], found["refit_peak"] = base, base + probe.own
    found["refitted"] = anonymous(os.getpid())
    found["peak"] = max(found["load_peak"], found["refit_peak"])
    found["high_water"] = _status("VmHWM")
    found["stages"] = {one.stage: one.seconds for one in report.stages}
    found["verifier"] = report.verification.verifier if report.verification else "none"
    found["changed"] = not torch.equal(before, compiled(x))
    found["which"] = "second refit" if given.again else "refit"
    found["torch"] = torch.__version__
    return found


def _status(key: str) -> int:
    """A number of bytes in ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


# -- the process that the user starts -----------------------------------------------------------


def verdict(found: dict[str, Any], *, give_up: bool) -> tuple[float, float]:
    """Peak of anonymous memory over engine bytes: measured, and the most that it may be."""
    return found["peak"] / found["engine"], GIVEN_UP if give_up else WITH_WAY_BACK


def table(found: dict[str, Any], *, give_up: bool) -> str:
    """Everything, as Markdown."""
    measured, most = verdict(found, give_up=give_up)
    engine, way_back = found["engine"], "given up" if give_up else "kept for the way back"
    rows = [
        ("before loading", found["begin"], ""),
        ("loading, at its peak", found["load_peak"], f"{found['load_seconds']:.2f}"),
        ("loaded", found["loaded"], ""),
        (f"{found['which']}, at its peak", found["refit_peak"], f"{found['refit_seconds']:.2f}"),
        ("refitted", found["refitted"], ""),
    ]
    stages = ", ".join(f"{name} {value:.2f}" for name, value in found["stages"].items())
    met = "yes" if measured <= most else "NO"
    lines = [
        f"torch {found['torch']}: {engine / _GB:.2f} GB in {found['layers']} layers and",
        f"{found['files']} files; compiled in {found['compile_seconds']:.0f} s; previous weights",
        f"{way_back}; verified by {found['verifier']}.",
        "",
        "| when | anonymous memory, MB | over engine bytes | seconds |",
        "|---|---|---|---|",
    ]
    lines += [f"| {what} | {n / 1e6:.0f} | {n / engine:.3f} | {took} |" for what, n, took in rows]
    lines += [
        "",
        "| target | wanted | measured | met |",
        "|---|---|---|---|",
        f"| anonymous memory over engine bytes, peak | at most {most} | {measured:.3f} | {met} |",
        "",
        f"Stages of the refit, seconds: {stages}.",
        f"Resident at most, mapped files included: {found['high_water'] / 1e6:.0f} MB.",
    ]
    return "\n".join(lines)


def _in_a_process(stage: str, folder: Path, *more: str) -> dict[str, Any]:
    """Run one stage in a fresh process, whose temporary files go into the folder, too."""
    options = [*sys.argv[1:], *more, "--stage", stage, "--folder", str(folder)]
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(  # noqa: S603 - this file
        [sys.executable, __file__, *options],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    given = arguments()
    if given.stage == "make":
        print(json.dumps(make(given.folder, given.gigabytes, given.width, given.shards)))
        return
    if given.stage == "measure":
        how = {"rollback": False} if given.give_up else {}
        how |= {"delta": True} if given.delta else {}
        print(json.dumps(measure(given.folder, how, given)))
        return
    folder = Path(tempfile.mkdtemp(prefix="refitkit-sharded-", dir=given.folder))
    try:
        made = _in_a_process("make", folder)
        kept = {**made, **_in_a_process("measure", folder)}
        given_up = {**made, **_in_a_process("measure", folder, "--give-up")}
    finally:
        shutil.rmtree(folder)
    print(table(kept, give_up=False), "", table(given_up, give_up=True), sep="\n")
    if given.json is not None:
        given.json.write_text(json.dumps({"kept": kept, "given up": given_up}, indent=2))


if __name__ == "__main__":
    main()
