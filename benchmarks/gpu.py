"""Refits of Torch-TensorRT engines on a GPU, from weights to the first right output.

Models are measured in processes of their own (``gpu_measure.py``). A batch of them compiles side by
side, which takes a minute or two; then one after another has the machine alone for what takes
milliseconds. Tables come last, and everything is written to a file whenever a process is done.

usage: python benchmarks/gpu.py [results.json] [--models resnet18 ...] [--dtypes float16 ...]
                                [--pairs resnet18:float16 ...] [--budget SECONDS] [--runs 30]
                                [--upstream [resnet18 ...]] [--immutable [resnet18 ...]]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_tables import report

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MODELS = ("resnet18", "resnet50", "mobilenet_v3_small", "vit_b_16", "vit_l_16", "gpt2", "llama")
UPSTREAM = ("resnet18", "mobilenet_v3_small", "vit_b_16")
"""Models that upstream refits, too, in float32; it takes seconds for each."""
CPP = ("resnet18", "mobilenet_v3_small")
"""Models that are compiled for the C++ runtime, too, in float32."""
PROFILED = ("resnet18", "mobilenet_v3_small")
"""Models whose refits are profiled, in float32."""
DTYPES = ("float32", "float16")
PACKAGES = ("torch", "torch-tensorrt", "torch-tensorrt-rtx", "tensorrt", "tensorrt-rtx")
HERE = Path(__file__).resolve().parent
COMPILE_S = 280.0
"""So long one process may compile after the one before it was ready."""
LAST_S = 5.0
"""So long before time is up, processes are stopped."""


@dataclass
class Job:
    """One model in one process.

    Attributes:
        model: Its name.
        dtype: Of its weights.
        options: Further arguments of ``gpu_measure.py``.
    """

    model: str
    dtype: str
    options: tuple[str, ...] = ()
    file: Path = field(default_factory=Path)
    process: subprocess.Popen[str] | None = None

    def start(self, folder: Path, runs: int) -> None:
        """Have it compile."""
        name = f"{self.model}-{self.dtype}-{'cpp' if 'cpp' in self.options else 'python'}"
        self.file = folder / f"{name}.json"
        command = [sys.executable, HERE / "gpu_measure.py", self.model, self.dtype, self.file]
        with (folder / f"{name}.log").open("w") as log:
            self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and code
                [*command, "--runs", str(runs), *self.options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def is_ready(self, limit: float) -> bool:
        """Wait until it has compiled; False where it died, or is ended because time is up."""
        assert self.process
        assert self.process.stdout
        timer = threading.Timer(max(limit, 0.1), self.process.kill)
        timer.start()
        try:
            return any(line.strip() == "READY" for line in iter(self.process.stdout.readline, ""))
        finally:
            timer.cancel()

    def measure(self, limit: float) -> None:
        """Let it go on, alone; it is stopped when time is up."""
        assert self.process
        try:
            self.process.communicate("\n", timeout=max(limit, 0.1))
        except subprocess.TimeoutExpired:
            self.stop()

    def stop(self) -> None:
        """End it."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def found(self) -> dict[str, Any]:
        """What it wrote; with the end of its log where it failed."""
        known: dict[str, Any] = {"model": self.model, "dtype": self.dtype}
        if self.file.exists():
            known |= json.loads(self.file.read_text())
        code = self.process.returncode if self.process else None
        if code and "error" not in known:
            known["error"] = f"exit {code}"
        if code or "failed" in known:
            log = self.file.with_suffix(".log")
            lines = log.read_text().splitlines() if log.exists() else []
            told = (line for line in lines if not line.startswith("Extension modules"))
            known["log"] = "\n".join(told)[-3000:]
        return known


def jobs_of(given: argparse.Namespace) -> Iterator[list[Job]]:
    """Batches, each of processes that compile side by side."""
    if given.pairs:
        yield [Job(*pair.split(":")) for pair in given.pairs]
        return
    for dtype in given.dtypes:
        first = dtype == "float32"
        batch = []
        for model in given.models:
            chosen = {
                "--upstream": given.upstream,
                "--profile": given.profile,
                "--immutable": given.immutable,
            }
            options = [option for option, models in chosen.items() if first and model in models]
            batch.append(Job(model, dtype, tuple(options)))
            if first and model in given.cpp:
                batch.append(Job(model, dtype, ("--runtime", "cpp")))
        yield batch


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Bench:
    """All batches, and what was found."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self._given, self._folder = given, folder
        self._end = time.monotonic() + given.budget - LAST_S
        self.found: list[dict[str, Any]] = []

    def run(self) -> None:
        """One batch after another, until time is up."""
        for batch in jobs_of(self._given):
            if self._left() <= 0:
                self.found += [{**job.found(), "error": "no time was left"} for job in batch]
                continue
            try:
                self._batch(batch)
            finally:
                for job in batch:
                    job.stop()

    def _batch(self, batch: Sequence[Job]) -> None:
        for job in batch:
            job.start(self._folder, self._given.runs)
        start = time.monotonic()
        for job in batch:
            ready = job.is_ready(min(self._left(), COMPILE_S))
            print(f"{job.model} {job.dtype}: {'ready' if ready else 'failed'}", flush=True)
        print(f"all compiled after {time.monotonic() - start:.0f} s", flush=True)
        for job in batch:
            job.measure(self._left())
            self.found.append(job.found())
            self.save()
            print(f"{job.model} {job.dtype}: done, {self._left():.0f} s left", flush=True)

    def _left(self) -> float:
        return self._end - time.monotonic()

    def save(self) -> None:
        """Write the results so far."""
        if self._given.results:
            found = {"versions": versions(), "models": self.found}
            self._given.results.write_text(json.dumps(found, indent=1))


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", type=Path, nargs="?", help="write the numbers to this file")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--pairs", nargs="+", metavar="MODEL:DTYPE", help="just these, one batch")
    parser.add_argument("--upstream", nargs="*", choices=MODELS, default=UPSTREAM)
    parser.add_argument("--profile", nargs="*", choices=MODELS, default=PROFILED)
    parser.add_argument("--immutable", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--cpp", nargs="*", choices=MODELS, default=CPP)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for all")
    return parser.parse_args(words)


def main() -> None:
    given = arguments()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given, Path(folder))
        try:
            bench.run()
        finally:
            bench.save()
            devices = sorted({row["device"] for row in bench.found if "device" in row})
            told = ", ".join(f"{name} {number}" for name, number in versions().items())
            print(f"\n{' and '.join(devices) or 'no device'}; {told}")
            print(report(bench.found))


if __name__ == "__main__":
    main()
