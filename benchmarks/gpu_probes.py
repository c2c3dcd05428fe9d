"""Questions about engines on a GPU that no document answers, each asked in a process of its own.

A probe that crashes or hangs harms no other. Probes of ``gpu_probe_*.py`` are functions without
arguments that give what JSON can hold; what they say is told, not judged.

usage: python benchmarks/gpu_probes.py FOLDER [--only NAME ...] [--jobs 6] [--budget SECONDS]
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIMIT_S = 240.0
"""So long one probe may take."""
PROBES = {
    "captured_graphs": "gpu_probe_engines",
    "weight_streaming": "gpu_probe_engines",
    "stripped": "gpu_probe_engines",
    "planned_on_the_cpu": "gpu_probe_engines",
    "what_there_is": "gpu_probe_first",
    "first_refits": "gpu_probe_first",
    "first_refits_of_options": "gpu_probe_first",
    "distinct_layers": "gpu_probe_first",
    "aotinductor": "gpu_probe_aoti",
    "warm_refits": "gpu_probe_warm",
    "loggers": "gpu_probe_warm",
    "looks": "gpu_probe_warm",
    "what_a_refitter_has": "gpu_probe_warm",
    "gpt2_half": "gpu_probe_warm",
    "warming_beside": "gpu_probe_first",
    "engine_memory_resnet18": "gpu_probe_memory",
    "engine_memory_mobilenet": "gpu_probe_memory",
    "engine_memory_vit": "gpu_probe_memory",
    "engine_memory_vit_half": "gpu_probe_memory",
    "engine_memory_llama": "gpu_probe_memory",
}
"""Probes, and the module that each is in."""
ALONE = ("warm_refits", "looks", "warming_beside")
"""Probes that time milliseconds: they run when the others are done."""


def run_here(name: str, file: Path) -> None:
    """Run one probe in this process and write what it found, or how it failed."""
    start = time.perf_counter()
    try:
        found: dict[str, Any] = {"found": getattr(importlib.import_module(PROBES[name]), name)()}
    except BaseException as exc:  # noqa: BLE001 - told
        found = {"error": f"{type(exc).__name__}: {exc}"[:4000], "trace": traceback.format_exc()}
    found["seconds"] = time.perf_counter() - start
    file.write_text(json.dumps(found, indent=1, default=str))


def run_beside(name: str, folder: Path, end: float) -> str:
    """Run one probe in a process of its own; one line about it."""
    file = folder / f"{name}.json"
    limit = min(LIMIT_S, end - time.monotonic())
    if limit <= 0:
        return f"{name}: no time was left"
    command = [sys.executable, str(HERE / "gpu_probes.py"), str(folder), "--here", name]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and code
            command, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        file.write_text(json.dumps({"error": f"took more than {limit:.0f} s"}))
        return f"{name}: took more than {limit:.0f} s"
    if not file.exists():
        text = f"exit {done.returncode}: {done.stderr[-2000:]}"
        file.write_text(json.dumps({"error": text}))
    found = json.loads(file.read_text())
    return f"{name}: {found['error'] if 'error' in found else round(found['seconds'])}"


def merged(folder: Path) -> dict[str, Any]:
    """What all probes found, by name."""
    files = [folder / f"{name}.json" for name in PROBES]
    return {file.stem: json.loads(file.read_text()) for file in files if file.exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where one file for each probe is written")
    parser.add_argument("--only", nargs="+", choices=PROBES, default=tuple(PROBES))
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for all")
    parser.add_argument("--here", choices=PROBES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.here:
        run_here(given.here, given.folder / f"{given.here}.json")
        return
    end = time.monotonic() + given.budget
    together = [name for name in given.only if name not in ALONE]
    with ThreadPoolExecutor(given.jobs) as pool:
        for line in pool.map(lambda name: run_beside(name, given.folder, end), together):
            print(line, flush=True)
    for name in given.only:
        if name in ALONE:
            print(run_beside(name, given.folder, end), flush=True)
    print(json.dumps(merged(given.folder), indent=1))


if __name__ == "__main__":
    main()
