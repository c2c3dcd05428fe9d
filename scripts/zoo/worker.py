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

MEMORY_LIMIT = 10 << 30


def main() -> None:
    """Read tasks as JSON lines, write results as JSON lines."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no result
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    import torch

    from refitkit.builtin.torch_tensorrt.worker.client import SERVER
    from scripts.zoo.check import Result, check
    from scripts.zoo.models import zoo

    torch.set_num_threads(1)
    SERVER.session(lambda _: None).close()  # or the first model would wait for it
    entries = zoo()
    for line in sys.stdin:
        task = json.loads(line)
        try:
            result = check(entries[task["model"]], task["dtype"], engines=task["engines"])
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
