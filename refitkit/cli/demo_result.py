"""What the demo measured, as values, and whether it is as it should be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import Problem
from refitkit.model import RefitReport
from refitkit.model.base import Frozen

if TYPE_CHECKING:
    from collections.abc import Iterator


class Accuracy(Frozen):
    """How well test digits were recognised with one checkpoint.

    Attributes:
        eager: Share of them that the model itself recognised, 0 to 1.
        engine: Share of them that the compiled module recognised.
        differing: Number of them that the two take for different digits.
    """

    eager: float
    engine: float
    differing: int


class LaterRefits(Frozen):
    """Refits after the first one, to and fro between both checkpoints.

    Attributes:
        verifier: What judged each of them.
        refits: How many there were.
        seconds: Median of their wall-clock times, from file to verdict.
        times_as_fast: Time of compiling over that.
    """

    verifier: str
    refits: int
    seconds: float
    times_as_fast: float


class DemoResult(Frozen):
    """All that the demo measured.

    Attributes:
        samples: Number of test digits.
        changed: Number of them that the two checkpoints take for different digits, in eager.
        slots: Number of the engine's slots.
        weight_bytes: Bytes of all slots.
        early: With the early checkpoint, as compiled.
        later: With the later checkpoint, after the first refit.
        after_all: With the later checkpoint, after all refits.
        train_seconds: Time of training both.
        compile_seconds: Time of compiling the early one.
        first_refit_seconds: Time of the first refit, from file to verdict.
        times_as_fast: Time of compiling over that.
        later_refits: Refits after the first one, by verifier.
        report: The first refit's own report.
    """

    samples: int
    changed: int
    slots: int
    weight_bytes: int
    early: Accuracy
    later: Accuracy
    after_all: Accuracy
    train_seconds: float
    compile_seconds: float
    first_refit_seconds: float
    times_as_fast: float
    later_refits: tuple[LaterRefits, ...]
    report: RefitReport

    def problems(self) -> tuple[Problem, ...]:
        """Everything that is not as it should be."""
        return tuple(self._problems())

    def _problems(self) -> Iterator[Problem]:
        if not self.changed or self.early.eager >= self.later.eager:
            found = f"{self.early.eager:.2%} and {self.later.eager:.2%} recognised"
            yield Problem("checkpoints", "too much alike", found, "a later one that is better")
        for name in ("early", "later", "after_all"):
            accuracy: Accuracy = getattr(self, name)
            if accuracy.differing or accuracy.engine != accuracy.eager:
                found = f"{accuracy.engine:.2%}, {accuracy.differing} digits taken for others"
                yield Problem(
                    f"engine, {name}", "differs", found, f"{accuracy.eager:.2%}, as eager"
                )
        if self.report.verification is None or not self.report.verification.ok:
            yield Problem("first refit", "not verified")
