"""What works where neither torch_tensorrt nor tensorrt is installed."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from typing import Any

HIDDEN = ("torch_tensorrt", "tensorrt", "tensorrt_rtx", "tensorrt_bindings", "tensorrt_libs")


class Hiding(importlib.abc.MetaPathFinder):
    """Answers for them that they are not there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hiding())
real = importlib.util.find_spec


def find_spec(name: str, package: str | None = None) -> Any:
    return None if name.partition(".")[0] in HIDDEN else real(name, package)


importlib.util.find_spec = find_spec

import torch  # noqa: E402

import refitkit  # noqa: E402

program = torch.export.export(torch.nn.Linear(4, 4).eval(), (torch.ones(2, 4),))
for backend in ("tensorrt_network", "torch_tensorrt"):
    for verb in (refitkit.compile, refitkit.plan):
        try:
            verb(program, backend=backend)
        except refitkit.ToolchainError as exc:
            text = str(exc).replace("\n", " ")
            sys.stdout.write(f"{backend} {verb.__name__} {text}\n")
sys.stdout.write(f"{sorted(refitkit.Pipeline().backends)}\n")
plan = refitkit.Pipeline().read_plan(sys.argv[1])
sys.stdout.write(f"{len(plan.data.ledger)}\n")
for name in HIDDEN:
    assert name not in sys.modules
