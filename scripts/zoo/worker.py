"""A process that checks one model after another, as its parent asks for them.

What a model does to it ends with it: the parent starts another one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from scripts.zoo.runner import AOTI

if TYPE_CHECKING:
    from scripts.zoo.result import Result

MEMORY_LIMIT = 10 << 30


Check = Callable[[dict[str, Any]], "Result"]


def _with_tensorrt() -> Check:
    from refitkit.builtin.torch_tensorrt.worker.client import SERVER
    from scripts.zoo.check import check
    from scripts.zoo.models import zoo

    SERVER.session(lambda _: None).close()  # or the first model would wait for it
    entries = zoo()
    return lambda task: check(entries[task["model"]], task["dtype"], engines=task["engines"])


def _with_aoti() -> Check:
    from scripts.zoo.check_aoti import check_aoti
    from scripts.zoo.models import zoo_aoti

    entries = zoo_aoti()
    return lambda task: check_aoti(entries[task["model"]], task["dtype"])


def main() -> None:
    """Read tasks as JSON lines, write results as JSON lines."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no result
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    import torch

    from scripts.zoo.result import Result

    torch.set_num_threads(1)
    checks: dict[str, Any] = {}
    for line in sys.stdin:
        task = json.loads(line)
        try:
            backend = task["backend"]
            if backend not in checks:
                checks[backend] = _with_aoti() if backend == AOTI else _with_tensorrt()
            result = checks[backend](task)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the table says so
            traceback.print_exc()
            result = Result(task["model"], task["dtype"])
            result.fail(f"{type(exc).__name__}: {' '.join(str(exc).split())[:600]}")
        result.rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        answers.write(json.dumps(dataclasses.asdict(result)) + "\n")
        answers.flush()
        torch._dynamo.reset()  # noqa: SLF001 - its only name


if __name__ == "__main__":
    main()
