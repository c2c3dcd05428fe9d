"""Damage and edit files, thousands of them, and count what comes of it.

    python scripts/fuzz.py plans|weights [--first 0] [--count 10000] [--batch 500]

Plan files: each must be refused with a typed error, when it is read or when it is used, or give the
slots of the original bit for bit. Files whose digests were made anew after an edit that has a
meaning are counted apart: only a proof against the program finds those.

Files of weights (safetensors, torch.save in both formats): each must be refused with a
``SourceError``, or give what the library that the format is of gives, bit for bit. Those that only
one of both takes are counted apart, and are a fault where it is refitkit alone.

Anything else is a fault, and the exit status is 1: an error that is not typed, a crash, a hang,
memory out of proportion, other values.

Mutants are tried in processes of their own, so a crash is one case and not the end.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"plans": "tests.unit.recipe.mutants", "weights": "tests.unit.builtin.weights.mutants"}
"""Kinds of files, and the module that makes and judges mutants of each: by ``judge(number)``."""
SHOWN = 40
GROWTH = 1 << 30
"""More bytes than this, beyond those after the first file, are out of proportion."""
SPARE = 8 << 30
"""Where the address space of a worker ends, beyond what it has after the first file."""


def main() -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        work(chosen.kind, chosen.first, chosen.count)
        return 0
    verdicts: Counter[str] = Counter()
    for number, verdict, more in outcomes(chosen.kind, chosen.first, chosen.count, chosen.batch):
        verdicts[verdict] += 1
        if verdict.startswith("fault") and verdicts[verdict] <= SHOWN:
            print(f"mutant {number}: {verdict}: {more}", flush=True)
    print(f"{verdicts.total()} mutants of {chosen.kind}")
    for verdict, number in verdicts.most_common():
        print(f"{number:7}  {verdict}")
    return int(any(verdict.startswith("fault") for verdict in verdicts))


def outcomes(kind: str, first: int, count: int, batch: int) -> Iterator[tuple[int, str, str]]:
    """Verdicts on mutants, by number."""
    end = first + count
    while first < end:
        size = min(batch, end - first)
        done = 0
        for number, verdict, more in run_worker(kind, first, size):
            done = number - first + 1
            yield number, verdict, more
        first += done


def run_worker(kind: str, first: int, size: int) -> Iterator[tuple[int, str, str]]:
    """Verdicts from one process; where it dies, the last one says so."""
    command = [sys.executable, __file__, kind, "--worker", f"--first={first}", f"--count={size}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as worker:  # noqa: S603
        assert worker.stdout is not None  # noqa: S101 - for the type
        following = first
        for line in worker.stdout:
            if line.startswith("{"):
                found = json.loads(line)
                following = found["number"] + 1
                yield found["number"], found["verdict"], found["more"]
    if worker.returncode and following == first and worker.returncode > 0:
        raise SystemExit("No mutant could be tried: see the error above.")
    if worker.returncode:
        yield following, f"fault: the process died with {worker.returncode}", ""


def work(kind: str, first: int, count: int) -> None:
    """Try mutants here, and print a line for each."""
    sys.path.insert(0, str(ROOT))
    mutants = importlib.import_module(KINDS[kind])  # here: the parent does without torch
    mutants.judge(first)
    at_start = peak()
    bound_memory()
    for number in range(first, first + count):
        verdict, more = mutants.judge(number)
        if peak() - at_start > GROWTH:
            verdict, at_start = "fault: memory out of proportion", peak()
        print(json.dumps({"number": number, "verdict": verdict, "more": more}), flush=True)


def peak() -> int:
    """The most memory that this process had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bound_memory() -> None:
    """Have allocations out of all proportion fail here rather than stop the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    sys.exit(main())
