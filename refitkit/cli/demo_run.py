"""The demo: compile an early checkpoint, refit to a later one, and measure.

``Demo.run`` is the whole demo. Below it are the training of the small net, and the measured values
with ``DemoResult.problems``, which decides whether the demo succeeded.
"""

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
"""Number of refits after the first one, with each verifier. It is even, so that the last one puts
in the later checkpoint again."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class DemoCheckpoint:
    """A model at one step of its training.

    Attributes:
        model: The model, in evaluation mode.
        file: ``.safetensors`` file with the model's state_dict.
        predictions: Predicted class of each test digit, int64 of shape (samples,).
    """

    model: torch.nn.Module
    file: Path
    predictions: Tensor


class Demo:
    """One run of the demo, in a folder."""

    def __init__(self, pipeline: Pipeline, folder: Path, progress: Callable[[str], None]) -> None:
        """Load the digits.

        Args:
            pipeline: Pipeline that compiles and refits.
            folder: Folder for checkpoints, inputs, program and module.
            progress: Called with one line of text for each step.

        Raises:
            RefitError: scikit-learn is not installed.
        """
        self._pipeline, self._folder, self._progress = pipeline, folder, progress
        self._training, self._test = load_digits()

    def run(self) -> DemoResult:
        """Run the whole demo, in under a minute on two cores.

        Raises:
            RefitError: A compiler is missing, or a verb of the pipeline failed.
        """
        self._progress("training a small net on handwritten digits")
        models, train_seconds = _timed(lambda: train(self._training))
        early, later = map(self._checkpoint, ("early", "later"), models)
        self._progress("compiling the early checkpoint")
        program = self._program(early)
        compiled, compile_seconds = _timed(lambda: self._pipeline.compile(program))
        # Saved before any refit, so that users of --keep can refit it themselves.
        compiled.save(self._folder / "digits.refitkit")
        before = self._accuracy(compiled, early)
        self._progress("refitting to the later checkpoint, then alternating between both")
        report, first = _timed(lambda: self._refit(compiled, later, "outputs"))
        after = self._accuracy(compiled, later)
        verifiers = ("outputs", "weights")
        medians = {name: self._alternate(compiled, (early, later), name) for name in verifiers}
        return DemoResult(
            samples=len(later.predictions),
            changed=int((early.predictions != later.predictions).sum()),
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

    def _checkpoint(self, name: str, model: torch.nn.Module) -> DemoCheckpoint:
        file = self._folder / f"{name}.safetensors"
        save_file(model.state_dict(), file)
        with torch.no_grad():
            predictions = model(self._test.pictures).argmax(dim=1)
        return DemoCheckpoint(model, file, predictions)

    def _program(self, checkpoint: DemoCheckpoint) -> ExportedProgram:
        inputs = (self._test.pictures,)
        save_file({"0": self._test.pictures}, self._folder / "inputs.safetensors")
        # Dynamic, so that users of --keep can call the module with other batch sizes.
        any_number = ({0: torch.export.Dim("pictures", min=1, max=4096)},)
        program = torch.export.export(checkpoint.model, inputs, dynamic_shapes=any_number)
        torch.export.save(program, self._folder / "digits.pt2")
        return program

    def _refit(self, compiled: CompiledModule, to: DemoCheckpoint, verifier: str) -> RefitReport:
        inputs = (self._test.pictures,)
        return self._pipeline.refit(compiled, to.file, inputs=inputs, verify=verifier).report

    def _alternate(
        self, compiled: CompiledModule, both: tuple[DemoCheckpoint, DemoCheckpoint], verifier: str
    ) -> float:
        """Refit to both checkpoints in turn; returns the median of the times in seconds."""
        times = []
        # the module holds the later checkpoint, so each refit changes the weights
        for checkpoint in both * (LATER // 2):
            start = time.perf_counter()
            self._refit(compiled, checkpoint, verifier)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _accuracy(self, compiled: CompiledModule, checkpoint: DemoCheckpoint) -> Accuracy:
        with torch.no_grad():
            predictions: Tensor = compiled(self._test.pictures).argmax(dim=1)
        return Accuracy(
            eager=_share_correct(checkpoint.predictions, self._test),
            engine=_share_correct(predictions, self._test),
            differing=int((predictions != checkpoint.predictions).sum()),
        )


def _share_correct(predictions: Tensor, digits: Digits) -> float:
    return float((predictions == digits.labels).double().mean())


def _timed(work: Callable[[], Value]) -> tuple[Value, float]:
    start = time.perf_counter()
    value = work()
    return value, time.perf_counter() - start


# -- training a small net ----------------------------------------------------------------------

SEED = 7
TEST_SAMPLES = 450
PASSES = 6
"""Number of passes over the training digits."""
EARLY = 15
"""Number of batches before the early checkpoint, within the first pass."""
_BATCH = 64
_WIDTH = 32
_RATE = 1e-3


@dataclass(frozen=True)
class Digits:
    """Handwritten digits.

    Attributes:
        pictures: float32 of shape (n, 1, 8, 8), from 0 to 1.
        labels: Digit that each picture shows, int64 of shape (n,).
    """

    pictures: Tensor
    labels: Tensor


def load_digits() -> tuple[Digits, Digits]:
    """Training and test digits from scikit-learn, with the same split in each run.

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
    """Train one net.

    Returns:
        The net after ``EARLY`` batches and at the end, both in evaluation mode.
    """
    # The seed is for the demo only: the caller's random state stays as it is.
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
                # a copy, because the training goes on with the same net
                early = copy.deepcopy(net).eval()
    return early or net, net.eval()


def _batches(digits: Digits) -> Iterator[Digits]:
    for _ in range(PASSES):
        order = torch.randperm(len(digits.labels))
        for start in range(0, len(order), _BATCH):
            some = order[start : start + _BATCH]
            yield Digits(digits.pictures[some], digits.labels[some])


# -- measured values ---------------------------------------------------------------------------


class Accuracy(Frozen):
    """Accuracy on the test digits with one checkpoint.

    Attributes:
        eager: Share of digits that the model itself recognised, 0 to 1.
        engine: Share of digits that the compiled module recognised, 0 to 1.
        differing: Number of digits for which model and module predict different classes.
    """

    eager: float
    engine: float
    differing: int


class LaterRefits(Frozen):
    """Refits after the first one, alternating between both checkpoints.

    Attributes:
        verifier: Name of the verifier.
        refits: Number of refits.
        seconds: Median of their wall-clock times, from reading the file to the verified result.
        times_as_fast: Time of compiling divided by ``seconds``.
    """

    verifier: str
    refits: int
    seconds: float
    times_as_fast: float


class DemoResult(Frozen):
    """All measurements of the demo.

    Attributes:
        samples: Number of test digits.
        changed: Number of digits for which both checkpoints predict different classes, in eager.
        slots: Number of the engine's slots.
        weight_bytes: Bytes of all slots.
        early: Accuracy with the early checkpoint, as compiled.
        later: Accuracy with the later checkpoint, after the first refit.
        after_all: Accuracy with the later checkpoint, after all refits.
        train_seconds: Time of training both checkpoints.
        compile_seconds: Time of compiling the early checkpoint.
        first_refit_seconds: Time of the first refit, from reading the file to the verified result.
        times_as_fast: Time of compiling divided by ``first_refit_seconds``.
        later_refits: Refits after the first one, one entry per verifier.
        report: Report of the first refit.
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
        """Everything that is wrong; empty if the demo succeeded."""
        return tuple(self._problems())

    def _problems(self) -> Iterator[Problem]:
        # Checkpoints that are alike would hide a refit that changes nothing.
        if not self.changed or self.early.eager >= self.later.eager:
            found = f"{self.early.eager:.2%} and {self.later.eager:.2%} recognised"
            yield Problem("checkpoints", "too similar", found, "a better later checkpoint")
        for name in ("early", "later", "after_all"):
            accuracy: Accuracy = getattr(self, name)
            if accuracy.differing or accuracy.engine != accuracy.eager:
                found = f"{accuracy.engine:.2%}, {accuracy.differing} predictions differ"
                yield Problem(
                    f"engine, {name}", "differs", found, f"{accuracy.eager:.2%}, as eager"
                )
        if self.report.verification is None or not self.report.verification.ok:
            yield Problem("first refit", "not verified")
