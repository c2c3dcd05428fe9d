"""The demo itself: compile an early checkpoint, refit to a later one, measure."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from refitkit.errors import Problem, RefitError
from refitkit.model import RefitReport
from refitkit.model.base import Frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch.export import ExportedProgram

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

    def __init__(self, pipeline: Pipeline, folder: Path, progress: Callable[[str], None]) -> None:
        """Prepare one.

        Args:
            pipeline: Does the work.
            folder: Where checkpoints, inputs, program and module are written.
            progress: Called with one line of text for each step.
        """
        self._pipeline, self._folder, self._tell = pipeline, folder, progress
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


# MERGED demo_training: A small net that learns handwritten digits, kept early and late in its
# training.

SEED = 7
TEST_SAMPLES = 450
PASSES = 6
"""Passes over the training digits."""
EARLY = 15
"""Batches after which the early checkpoint is taken: within the first pass."""
_BATCH = 64
_WIDTH = 32
_RATE = 1e-3


@dataclass(frozen=True)
class Digits:
    """8 x 8 pictures, float32 of shape (n, 1, 8, 8) from 0 to 1, and what they show, int64."""

    pictures: Tensor
    labels: Tensor


def load_digits() -> tuple[Digits, Digits]:
    """scikit-learn's digits, split for training and testing: the same split every time.

    Raises:
        RefitError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets, model_selection
    except ImportError as exc:
        raise RefitError(
            f"The demo reads its digits from scikit-learn, which cannot be imported: {exc}.",
            hint="Install it: pip install 'refitkit[demo]'",
        ) from exc
    bunch = datasets.load_digits()
    split = model_selection.train_test_split(
        bunch.images,
        bunch.target,
        test_size=TEST_SAMPLES,
        stratify=bunch.target,
        random_state=SEED,
    )
    train, test, train_labels, test_labels = map(torch.as_tensor, split)
    return _digits(train, train_labels), _digits(test, test_labels)


def _digits(images: Tensor, labels: Tensor) -> Digits:
    brightest = 16  # of a pixel, in this data set
    return Digits(images.to(torch.float32).unsqueeze(1) / brightest, labels.to(torch.int64))


def make_net() -> nn.Sequential:
    """Three convolutions with batch norm, and a linear layer."""
    return nn.Sequential(
        *_block(1, _WIDTH),
        *_block(_WIDTH, 2 * _WIDTH),
        nn.MaxPool2d(2),
        *_block(2 * _WIDTH, 4 * _WIDTH),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * _WIDTH * 2 * 2, 10),
    )


def _block(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def train(digits: Digits) -> tuple[nn.Module, nn.Module]:
    """Train one net; returns copies of it, early and late, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = make_net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=_RATE)
        early = None
        for number, batch in enumerate(_batches(digits), start=1):
            loss = nn.functional.cross_entropy(net(batch.pictures), batch.labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if number == EARLY:
                early = copy.deepcopy(net).eval()
    return early or net, net.eval()


def _batches(digits: Digits) -> Iterator[Digits]:
    for _ in range(PASSES):
        order = torch.randperm(len(digits.labels))
        for start in range(0, len(order), _BATCH):
            some = order[start : start + _BATCH]
            yield Digits(digits.pictures[some], digits.labels[some])


# MERGED demo_result: What the demo measured, as values, and whether it is as it should be.


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
