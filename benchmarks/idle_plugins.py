"""What ten plugins that do nothing add to a full refit.

Each implements every hook and leaves everything to others. Refits with and without them take turns
on one compiled module, so both see the same machine; what counts is the median of the differences
of a turn. torch has one thread: what plugins cost runs on one, and others would only add noise.

usage: python benchmarks/idle_plugins.py
"""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

import refitkit
from refitkit import hookspecs

if TYPE_CHECKING:
    from collections.abc import Mapping

PLUGINS, TURNS, WARM = 10, 201, 20
TARGET_MS = 1.0
LISTS = frozenset(
    f"refitkit_{name}"
    for name in ("mapping_strategies", "layer_types", "weight_transforms", "verifiers", "check")
)
"""Hooks that give a list: an idle plugin gives an empty one."""
MODELS = {"4 slots, 0.5 MB": (2, 256), "48 slots, 1.6 MB": (24, 128), "16 slots, 34 MB": (8, 1024)}
"""Layers and width."""


class Idle:
    """A plugin that implements every hook, with all arguments, and does nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        for hook, spec in vars(hookspecs).items():
            if hook.startswith("refitkit_"):
                setattr(self, hook, _idle(hook, spec))


def _idle(hook: str, spec: Any) -> Any:
    code = spec.__code__
    arguments = ", ".join(code.co_varnames[: code.co_argcount])
    result = [] if hook in LISTS else None
    function = eval(f"lambda {arguments}: {result!r}")  # noqa: S307 - of our own specifications
    return refitkit.hookimpl(specname=hook)(function)


def model(layers: int, width: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    made = (torch.nn.Linear(width, width) for _ in range(layers))
    return torch.nn.Sequential(*made).eval()


@dataclass(frozen=True)
class Times:
    """Times of all turns, in ms: by the clock, and of the processor."""

    clock: list[float] = field(default_factory=list)
    thread: list[float] = field(default_factory=list)

    def refit(self, pipeline: refitkit.Pipeline, compiled: Any, weights: Mapping[str, Any]) -> None:
        """Do one, and note what it took."""
        began, used = time.perf_counter(), time.thread_time()
        pipeline.refit(compiled, weights, verify="none")
        self.clock.append((time.perf_counter() - began) * 1e3)
        self.thread.append((time.thread_time() - used) * 1e3)


def measured(layers: int, width: int) -> tuple[Times, Times]:
    """Times without plugins and with them; which goes first alternates."""
    program = torch.export.export(model(layers, width, 0), (torch.randn(1, width),))
    compiled = refitkit.compile(program, prove=False)
    weights = [model(layers, width, seed).state_dict() for seed in (1, 2)]
    pipelines = (
        refitkit.Pipeline(),
        refitkit.Pipeline(plugins=[Idle(f"idle-{n}") for n in range(PLUGINS)]),
    )
    times = (Times(), Times())
    new = itertools.cycle(weights)  # weights that the module holds already take longer to compare
    for turn in range(WARM + TURNS):
        if turn == WARM:
            times = (Times(), Times())
        for which in (0, 1) if turn % 2 else (1, 0):
            times[which].refit(pipelines[which], compiled, next(new))
    return times


def differences(without: list[float], idle: list[float]) -> list[float]:
    """Quartiles of what the second of each pair is more."""
    return statistics.quantiles((b - a for a, b in zip(without, idle, strict=True)), n=4)


def row(name: str, without: Times, idle: Times) -> tuple[str, float]:
    low, middle, high = differences(without.clock, idle.clock)
    _, busy, _ = differences(without.thread, idle.thread)
    cells = [
        name,
        f"{statistics.median(without.clock):.2f}",
        f"{statistics.median(idle.clock):.2f}",
    ]
    cells += [f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{busy:.2f}"]
    return "| " + " | ".join([*cells, "yes" if middle <= TARGET_MS else "no"]) + " |", middle


def main() -> int:
    torch.set_num_threads(1)
    hooks = sum(name.startswith("refitkit_") for name in vars(hookspecs))
    print(f"torch {torch.__version__}, Python {platform.python_version()}; times in ms")
    print(f"{PLUGINS} idle plugins with {hooks} hooks each, {TURNS} turns")
    print("| model | without | with | more, median | quartiles | more, processor | at most 1 |")
    print("|---|---|---|---|---|---|---|")
    worst = 0.0
    for name, (layers, width) in MODELS.items():
        text, more = row(name, *measured(layers, width))
        print(text, flush=True)
        worst = max(worst, more)
    return 0 if worst <= TARGET_MS else 1


if __name__ == "__main__":
    raise SystemExit(main())
