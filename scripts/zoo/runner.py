"""Checks models in two processes at most, and keeps each result as soon as it is there."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "build" / "zoo"
TENSORRT, AOTI = "tensorrt_network", "aotinductor"
RESULTS = {TENSORRT: FOLDER / "results.jsonl", AOTI: FOLDER / "aotinductor.jsonl"}
"""Where results of each backend are kept."""
TASKS_A_WORKER = 20
LIMIT_S = 900
NOT_BUILT = "not built"
Task = tuple[str, str]
"""A model and a dtype."""


def read(path: Path) -> dict[Task, dict[str, Any]]:
    """The last result of each task."""
    if not path.exists():
        return {}
    found = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {(one["model"], one["dtype"]): one for one in found}


def run(
    todo: list[Task], results: Path, *, engines: bool, workers: int, backend: str = TENSORRT
) -> None:
    """Check all; what a process that dies was asked for has failed, and another one goes on."""
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in todo:
        waiting.put(task)
    lock, commit = threading.Lock(), _commit()

    def keep(result: dict[str, Any]) -> None:
        with lock, results.open("a") as file:
            file.write(json.dumps({**result, "commit": commit}) + "\n")
            said = f"{result['model']} {result['dtype']}: {result['status']} {result['reason']}"
            print(f"[{len(todo) - waiting.qsize()}/{len(todo)}] {said[:200]}", flush=True)

    def work(number: int) -> None:
        with (
            Workers(number, engines=engines, backend=backend) as mine,
            contextlib.suppress(queue.Empty),
        ):
            while True:
                keep(mine.check(waiting.get_nowait()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Workers(contextlib.AbstractContextManager["Workers"]):
    """One process at a time, replaced when it has died or served for long."""

    def __init__(self, number: int, *, engines: bool, backend: str = TENSORRT) -> None:
        """Start none yet."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        self._log = (FOLDER / f"worker-{backend}-{number}.log").open("a")
        self._engines, self._backend, self._used = engines, backend, 0
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, task: Task) -> dict[str, Any]:
        """Have one checked; a process that dies or takes too long is a result, too."""
        model, dtype = task
        told = json.dumps(
            {"model": model, "dtype": dtype, "engines": self._engines, "backend": self._backend}
        )
        start, before = time.monotonic(), Path(self._log.name).stat().st_size
        answer = self._asked(f"{told}\n".encode())
        if answer:
            found: dict[str, Any] = json.loads(answer)
            if found["bytes"] == NOT_BUILT:
                found["bytes"] += f": {self._last_error(before)}"
            return found
        late = time.monotonic() - start >= LIMIT_S
        code = self._ended()
        how = f"took more than {LIMIT_S} s" if late else f"ended with {code}"
        reason = f"the process that checked it {how}"
        return {"model": model, "dtype": dtype, "status": "failed", "reason": reason, "bytes": ""}

    def _last_error(self, before: int) -> str:
        """What TensorRT has logged as an error since then, the last of it."""
        with Path(self._log.name).open(errors="replace") as file:
            file.seek(before)
            errors = [line for line in file if "Error Code" in line]
        return errors[-1].partition("Error Code")[2].strip() if errors else "it did not log why"

    def _asked(self, told: bytes) -> bytes:
        if self._process is None or self._used >= TASKS_A_WORKER:
            self._ended()
            self._process, self._used = self._started(), 0
        self._used += 1
        given, taken = self._process.stdin, self._process.stdout
        if given is None or taken is None:
            return b""
        with contextlib.suppress(OSError):
            given.write(told)
            given.flush()
        ready, _, _ = select.select([taken], [], [], LIMIT_S)
        return taken.readline() if ready else b""

    def _started(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "scripts.zoo.worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "REFITKIT_PLAN_CACHE": "",
            },
        )

    def _ended(self) -> int:
        """End the process; how it ended."""
        process, self._process = self._process, None
        if process is None:
            return 0
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)  # it ends with its input
        process.kill()
        return process.wait()

    def __exit__(self, *_: object) -> None:
        self._ended()
        self._log.close()


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],  # noqa: S607 - whichever git there is
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()
