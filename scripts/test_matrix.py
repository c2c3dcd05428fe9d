"""Run ``tests/matrix`` with every version of Torch-TensorRT that refitkit supports.

Each version gets an environment of its own (about 6 GB, a minute or two to make), which is removed
again; the newest is the environment that runs this. No GPU is needed.

usage: python scripts/test_matrix.py [--only 2.12.1] [--keep]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "matrix"
HERE = "2.14.0"
COMMON = ("transformers==5.23.0", "numpy==2.4.6")
PACKAGES: dict[str, tuple[str, ...]] = {
    # later TensorRTs lack what 2.11 looks up when it is imported
    "2.11.0": (
        "torch===2.11.0",
        "torchvision==0.26.0",
        "tensorrt-rtx-cu13==1.4.0.76",
        "dllist",
        "psutil",
    ),
    "2.12.1": ("torch===2.12.1", "torchvision==0.27.1", "tensorrt-rtx-cu13==1.4.0.76"),
    # with ==, pip may choose a build without CUDA, which cannot import torch_tensorrt
    "2.13.0": ("torch===2.13.0", "torchvision==0.28.0", "tensorrt-rtx-cu13==1.5.0.114"),
    HERE: (),
}
MODELS = ("resnet18", "mobilenet_v3_small", "swin_t", "gpt2", "nasty", "half")
WITH_MAPS = ("2.11", "2.12")
FLOORS = {
    "resnet18": 1.0,
    "mobilenet_v3_small": 1.0,
    "swin_t": 0.85,
    "gpt2": 0.8,
    "nasty": 0.0,
    "half": 1.0,
}
"""So much of the slots that follow from weights ``name-map`` has to serve."""
WRONG_UPSTREAM = {"swin_t": 12, "gpt2": 4}
"""So many slots are wrong when upstream applies its map: what the strategy is measured by."""
LIMIT_S = 900


@dataclass
class Run:
    """One model with one version.

    Attributes:
        version: Version of Torch-TensorRT.
        model: Name of the model.
        found: What ``tests/matrix/measure.py`` found.
        faults: What is wrong with that.
    """

    version: str
    model: str
    found: dict[str, Any]
    faults: list[str] = field(default_factory=list)


def main() -> int:
    """Run all, print a table; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PACKAGES, action="append", help="only this version")
    parser.add_argument("--keep", action="store_true", help="keep the environments, and use kept")
    arguments = parser.parse_args()
    runs: list[Run] = []
    for version in arguments.only or PACKAGES:
        runs += _all_models(version, keep=arguments.keep)
    print(table(runs))
    faults = [f"{run.version} {run.model}: {fault}" for run in runs for fault in run.faults]
    print("\n".join(faults) or "Nothing wrong.")
    return bool(faults)


def _all_models(version: str, *, keep: bool) -> list[Run]:
    folder = FOLDER / version
    try:
        python = Path(sys.executable) if version == HERE else _environment(folder, version)
        return [_run(python, version, model) for model in MODELS]
    except subprocess.CalledProcessError as exc:
        return [Run(version, "all", {}, [f"no environment: {exc.stderr[-2000:]}"])]
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _environment(folder: Path, version: str) -> Path:
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    print(f"making an environment with torch-tensorrt-rtx {version} ...", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    wanted = (f"torch-tensorrt-rtx=={version}", *PACKAGES[version], *COMMON)
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    _call([*install, "-e", ROOT, *wanted]).check_returncode()
    (folder / "complete").touch()
    return python


def _run(python: Path, version: str, model: str) -> Run:
    print(f"{version} {model} ...", flush=True)
    command = [python, ROOT / "tests" / "matrix" / "measure.py", model]
    try:
        done = _call(command)
    except subprocess.TimeoutExpired:
        return Run(version, model, {}, [f"took more than {LIMIT_S} s"])
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return Run(version, model, {}, [f"exit {done.returncode}: {done.stderr[-2000:]}"])
    found = json.loads(lines[-1].removeprefix("RESULT "))
    return Run(version, model, found, list(_faults(version, model, found)))


def _call(command: list[Any]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - its own commands
        command, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def _faults(version: str, model: str, found: dict[str, Any]) -> list[str]:
    if "failed" in found:
        return [f"failed: {found['failed']}"]
    faults = []
    if not found["same_names"]:
        faults.append("other weights make other slot names")
    if found["only_recorded"]:
        faults.append(f"recorded, but in no layer: {found['only_recorded']}")
    if not found.get("build", True):
        faults.append("engine bytes differ from those of a build from scratch")
    return faults + (_map_faults(model, found) if version.startswith(WITH_MAPS) else [])


def _map_faults(model: str, found: dict[str, Any]) -> list[str]:
    if found["maps"] != found["engines"]:
        return ["engines without a cached map"]
    faults = []
    if found["wrong"]:
        faults.append(f"name-map serves wrong values: {found['wrong']}")
    if found["served"] < FLOORS[model] * found["weights"]:
        faults.append(f"name-map serves {found['served']} of {found['weights']} only")
    if len(found.get("upstream_wrong", ())) < WRONG_UPSTREAM.get(model, 0):
        faults.append("upstream's map has fewer faults than documented")
    return faults


def table(runs: list[Run]) -> str:
    """The results as a table for ``docs/compatibility.md``."""
    head = (
        "| version | model | slots | recorded | from weights | upstream's map: wrong "
        "| name-map: served | wrong | engine bytes |\n|---|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *(_row(run) for run in runs)])


def _row(run: Run) -> str:
    found = run.found
    maps = bool(found.get("maps"))
    cells = (
        run.version,
        run.model,
        found.get("slots", "failed"),
        found.get("recorded", ""),
        found.get("weights", ""),
        _upstream(found) if maps else "no map",
        found.get("served", "") if maps else "",
        len(found["wrong"]) if maps else "",
        "" if "build" not in found else "equal" if found["build"] else "differ",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _upstream(found: dict[str, Any]) -> str:
    return found.get("upstream_failed") or str(len(found["upstream_wrong"]))


if __name__ == "__main__":
    sys.exit(main())
