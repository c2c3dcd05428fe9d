"""What is found of one model, and what all checks use."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from refitkit.errors import RefitError

FIRST_SEED = 11
"""Of the weights A."""


@dataclass
class Result:
    """What was found of one model in one dtype; a line of the results.

    Attributes:
        model: Its name.
        dtype: The dtype.
        status: ``ok``, ``failed``, or ``upstream`` where upstream cannot make networks of it.
        reason: Why it is not ok.
        slots: Number of slots.
        engines: Number of engines.
        torch_parts: Number of parts that torch runs.
        states: Number of slots by state.
        ops: Calls in the plan.
        guards: Guards in the plan.
        unmapped: Slots without a recipe, with the reason; the first few.
        errors: By round, the largest error of all outputs, relative to the largest value of each.
        notes: What reports and proofs say.
        rounds: By round, what differs from the rebuild; the first few slots, and their number.
        bytes: What became of the comparison of engine bytes; empty where it was not made.
        seconds: What took how long.
        rss: Largest resident memory of the process until then, MiB.
        commit: What was tested.
    """

    model: str
    dtype: str
    status: str = "ok"
    reason: str = ""
    slots: int = 0
    engines: int = 0
    torch_parts: int = 0
    states: dict[str, int] = field(default_factory=dict)
    ops: int = 0
    guards: int = 0
    unmapped: list[list[str]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rounds: dict[str, dict[str, Any]] = field(default_factory=dict)
    bytes: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    rss: int = 0
    commit: str = ""

    def fail(self, reason: str, status: str = "failed") -> Result:
        """Note a failure; the first reason stays."""
        if self.status == "ok":
            self.status, self.reason = status, reason
        return self


class timed:  # noqa: N801 - used as a statement
    """Note how long something takes."""

    def __init__(self, result: Result, what: str) -> None:
        self.result, self.what = result, what

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.result.seconds[self.what] = round(time.perf_counter() - self.start, 2)


def told(exc: BaseException) -> str:
    """An error in one line, with its problems."""
    text = f"{type(exc).__name__}: {exc}" if not isinstance(exc, RefitError) else str(exc)
    return " ".join(text.split())[:600]


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
