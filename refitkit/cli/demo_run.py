"""The demo itself: compile an early checkpoint, refit to a later one, measure."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors.torch import save_file

from refitkit.cli.demo_result import Accuracy, DemoResult, LaterRefits
from refitkit.cli.demo_training import load_digits, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor
    from torch.export import ExportedProgram

    from refitkit.cli.demo_training import Digits
    from refitkit.model import RefitReport
    from refitkit.pipeline import CompiledModule, Pipeline

LATER = 20
"""Refits after the first one with each verifier; even, so that they end where they began."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Checkpoint:
    """A model as it was at some time of its training.

    Attributes:
        model: The model, in evaluation mode.
        file: Its state_dict, a ``.safetensors`` file.
        says: What it takes each test digit for, int64 of shape (samples,).
    """

    model: torch.nn.Module
    file: Path
    says: Tensor


class Demo:
    """One run of the demo, in a folder."""

    def __init__(self, pipeline: Pipeline, folder: Path, tell: Callable[[str], None]) -> None:
        """Prepare one.

        Args:
            pipeline: Does the work.
            folder: Where checkpoints, inputs, program and module are written.
            tell: Is told what is going on.
        """
        self._pipeline, self._folder, self._tell = pipeline, folder, tell
        self._training, self._test = load_digits()

    def run(self) -> DemoResult:
        """Do it all, in less than a minute on two cores.

        Raises:
            RefitError: A compiler is missing, or refitkit refused something.
        """
        self._tell("training a small net on handwritten digits")
        models, train_seconds = _timed(lambda: train(self._training))
        early, later = map(self._checkpoint, ("early", "later"), models)
        self._tell("compiling the early checkpoint")
        program = self._program(early)
        compiled, compile_seconds = _timed(lambda: self._pipeline.compile(program))
        compiled.save(self._folder / "digits.refitkit")
        before = self._accuracy(compiled, early)
        self._tell("refitting to the later checkpoint, and to and fro")
        report, first = _timed(lambda: self._refit(compiled, later, "outputs"))
        after = self._accuracy(compiled, later)
        verifiers = ("outputs", "weights")
        medians = {name: self._to_and_fro(compiled, (early, later), name) for name in verifiers}
        return DemoResult(
            samples=len(later.says),
            changed=int((early.says != later.says).sum()),
            slots=report.slots_written,
            weight_bytes=report.bytes_written,
            early=before,
            later=after,
            after_all=self._accuracy(compiled, later),
            train_seconds=train_seconds,
            compile_seconds=compile_seconds,
            first_refit_seconds=first,
            times_as_fast=compile_seconds / first,
            later_refits=tuple(
                LaterRefits(
                    verifier=name,
                    refits=LATER,
                    seconds=seconds,
                    times_as_fast=compile_seconds / seconds,
                )
                for name, seconds in medians.items()
            ),
            report=report,
        )

    def _checkpoint(self, name: str, model: torch.nn.Module) -> Checkpoint:
        file = self._folder / f"{name}.safetensors"
        save_file(model.state_dict(), file)
        with torch.no_grad():
            says = model(self._test.pictures).argmax(dim=1)
        return Checkpoint(model, file, says)

    def _program(self, checkpoint: Checkpoint) -> ExportedProgram:
        inputs = (self._test.pictures,)
        save_file({"0": self._test.pictures}, self._folder / "inputs.safetensors")
        any_number = ({0: torch.export.Dim("pictures", min=1, max=4096)},)
        program = torch.export.export(checkpoint.model, inputs, dynamic_shapes=any_number)
        torch.export.save(program, self._folder / "digits.pt2")
        return program

    def _refit(self, compiled: CompiledModule, to: Checkpoint, verifier: str) -> RefitReport:
        inputs = (self._test.pictures,)
        return self._pipeline.refit(compiled, to.file, inputs=inputs, verify=verifier).report

    def _to_and_fro(
        self, compiled: CompiledModule, both: tuple[Checkpoint, Checkpoint], verifier: str
    ) -> float:
        """Refit to the first, to the second, and so on; median of the times in seconds."""
        times = []
        for checkpoint in both * (LATER // 2):
            start = time.perf_counter()
            self._refit(compiled, checkpoint, verifier)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _accuracy(self, compiled: CompiledModule, checkpoint: Checkpoint) -> Accuracy:
        with torch.no_grad():
            says: Tensor = compiled(self._test.pictures).argmax(dim=1)
        return Accuracy(
            eager=_share(checkpoint.says, self._test),
            engine=_share(says, self._test),
            differing=int((says != checkpoint.says).sum()),
        )


def _share(says: Tensor, digits: Digits) -> float:
    return float((says == digits.labels).double().mean())


def _timed(work: Callable[[], Value]) -> tuple[Value, float]:
    start = time.perf_counter()
    value = work()
    return value, time.perf_counter() - start
