"""Serving and refitting at once: what callers, refits and memory do to one another.

Run it on an idle machine with two cores; a full run takes about a quarter of an hour. Every part
runs in a process of its own, and ratios are of times of one part. A measurement beside callers
starts at a moment at which every caller is inside a call, after a random share of one of them.
Torch uses one thread. Controls do the same without refitkit: processes that compute, a thread that
copies.

- ``beside``: sleeps and refits beside callers whose calls take 100 ms.
- ``throughput``: two callers over one, and refits every 100 ms over none.
- ``donated``: refits without a copy over memmove, refits from files over reading them.
- ``stalls``: the slowest calls with refits over those without.
- ``torn``: outputs that mix two sets of weights; there should be none.
- ``sets``, ``workers``: memory of ten sets of one library, and of four processes.

With ``, binding`` behind its name a part runs with torch's binding in place of the C interface.

usage: python benchmarks/serving.py [--quick] [--only PART ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BINDING = ", binding"
PARTS = (
    "beside",
    f"beside{BINDING}",
    "throughput",
    f"throughput{BINDING}",
    "donated",
    "stalls",
    "torn",
    "sets",
    "workers",
)
LIMIT_S = 900
QUIET = 0.1
"""Cores that others may keep busy; above that, a warning is printed."""


def run(part: str, folder: Path, *, quick: bool) -> dict[str, Any]:
    """What a part has measured, in a process of its own."""
    out = folder / f"{part}.json"
    out.unlink(missing_ok=True)
    name = part.removesuffix(BINDING)
    command = [sys.executable, __file__, "--part", name, "--folder", str(folder), "--json"]
    environment = {**os.environ, **({"REFITKIT_AOTI_BINDING": "1"} if BINDING in part else {})}
    start, before = time.perf_counter(), _busy_by_others()
    try:
        done = subprocess.run(  # noqa: S603 - this file
            [*command, str(out), *(["--quick"] if quick else [])],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        problem = "" if done.returncode == 0 else f"failed: {done.stderr[-2000:]}"
    except subprocess.TimeoutExpired:
        problem = f"no result in {LIMIT_S} s"
    seconds = time.perf_counter() - start
    found: dict[str, Any] = {"part": part, "seconds": seconds, "problem": problem}
    found["others"] = max(0.0, (_busy_by_others() - before) / seconds)
    return found | (json.loads(out.read_text()) if not problem else {})


def _busy_by_others() -> float:
    """Seconds that cores worked for others than this process and its children; proc(5), stat."""
    file = Path("/proc/stat")
    if not file.exists():
        return 0.0
    user, nice, system, _idle, _wait, *irq = map(int, file.read_text().split()[1:9])
    own = os.times()
    ours = own.user + own.system + own.children_user + own.children_system
    return (user + nice + system + sum(irq)) / os.sysconf("SC_CLK_TCK") - ours


def show(console: Console, found: Mapping[str, Any]) -> None:
    """Print the tables of a part."""
    console.rule(f"{found['part']}: {found['seconds']:.0f} s")
    if found["problem"]:
        console.print(found["problem"], markup=False)
        return
    if found["others"] > QUIET:
        console.print(f"not idle: others kept {found['others']:.2f} cores busy")
    for title, rows in found["rows"].items():
        console.print(table(title, rows))
    for note in found["notes"]:
        console.print(note, markup=False)


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table with one column for each key."""
    made = Table(title=title)
    for name in rows[0]:
        made.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        made.add_row(*map(_text, row.values()))
    return made


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run all parts and print their tables; with ``--part``, run one part in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions: a few minutes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        import serving_parts

        bench = serving_parts.Bench(given.folder, quick=given.quick)
        given.json.write_text(json.dumps(vars(serving_parts.PARTS[given.part](bench))))
        return
    console = Console(width=None if sys.stdout.isatty() else 130)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    console.print(f"{machine}, Python {platform.python_version()}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for part in ("prepare", *given.only):
            results.append(run(part, Path(folder), quick=given.quick))
            show(console, results[-1])
    targets = [{"part": one["part"], **row} for one in results for row in one.get("targets", [])]
    if targets:
        console.print(table("targets", targets))
    if given.json:
        data = {"machine": machine, "quick": given.quick, "parts": results, "targets": targets}
        given.json.write_text(json.dumps(data, indent=1))
    if any(one["problem"] for one in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
