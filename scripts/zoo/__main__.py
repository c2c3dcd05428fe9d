"""Runs the zoo; see ``python -m scripts.zoo --help``."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from pathlib import Path
from typing import Any

from scripts.zoo.models import zoo, zoo_aoti
from scripts.zoo.runner import AOTI, RESULTS, ROOT, TENSORRT, Task, read, run
from scripts.zoo.table import page, with_part
from scripts.zoo.table_aoti import part

PAGE = ROOT / "docs" / "zoo.md"


def main() -> int:
    """Check what is asked for, write the page; 1 where something failed."""
    arguments = _arguments()
    tasks = _chosen(arguments)
    if arguments.list:
        print("\n".join(f"{model}  {dtype}" for model, dtype in tasks))
        return 0
    backend: str = arguments.backend
    results: Path = arguments.results or RESULTS[backend]
    results.parent.mkdir(parents=True, exist_ok=True)
    if arguments.fresh:
        results.unlink(missing_ok=True)
    done = read(results)
    todo = [
        task
        for task in tasks
        if arguments.again or _is_open(done.get(task), engines=arguments.engines)
    ]
    print(f"{len(tasks)} chosen, {len(tasks) - len(todo)} done before", flush=True)
    run(todo, results, engines=arguments.engines, workers=arguments.workers, backend=backend)
    done = read(results)
    chosen = [done[task] for task in tasks if task in done]
    if (not arguments.only and not arguments.dtype) or arguments.write:
        _write(backend, [done[task] for task in _all_of(backend) if task in done])
    failed = [f"{one['model']} {one['dtype']}" for one in chosen if one["status"] == "failed"]
    print("\n".join([f"{len(chosen)} checked, {len(failed)} failed", *failed]))
    return bool(failed)


def _write(backend: str, rows: list[dict[str, Any]]) -> None:
    """The part of this backend anew; that of the other stays what it is."""
    made = part(rows) if backend == AOTI else page(rows)
    PAGE.write_text(with_part(PAGE.read_text() if PAGE.exists() else "", backend, made))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.zoo", description="Runs the zoo.")
    parser.add_argument("--list", action="store_true", help="list models and dtypes only")
    parser.add_argument("--only", metavar="PATTERN", action="append", help="such as 'timm/*'")
    parser.add_argument("--dtype", action="append", help="float32, float16 or bfloat16")
    parser.add_argument("--engines", action="store_true", help="compare engine bytes, too")
    parser.add_argument("--again", action="store_true", help="check what was checked before, too")
    parser.add_argument("--fresh", action="store_true", help="forget all results first")
    parser.add_argument("--backend", default=TENSORRT, choices=(TENSORRT, AOTI))
    parser.add_argument("--write", action="store_true", help="write the page after --only, too")
    parser.add_argument("--workers", type=int, default=2, choices=(1, 2))
    parser.add_argument("--results", type=Path, help="where results are kept")
    return parser.parse_args()


def _chosen(arguments: argparse.Namespace) -> list[Task]:
    patterns = arguments.only or ["*"]
    return [
        (name, dtype)
        for name, dtype in _all_of(arguments.backend)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        and (not arguments.dtype or dtype in arguments.dtype)
    ]


def _all_of(backend: str) -> list[Task]:
    entries = zoo_aoti() if backend == AOTI else zoo()
    return [(entry.name, dtype) for entry in entries.values() for dtype in entry.dtypes]


def _is_open(result: dict[str, Any] | None, *, engines: bool) -> bool:
    """Whether a task was not done, failed, or was done without engines that are wanted now."""
    if result is None or result["status"] == "failed":
        return True
    return engines and result["status"] == "ok" and not result.get("bytes")


if __name__ == "__main__":
    sys.exit(main())
