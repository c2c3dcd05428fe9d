"""``refitkit demo``: compile and refit a classifier of handwritten digits, in under a minute.

This module is the command and its output. ``refitkit.cli.demo_run`` has the demo itself, and
imports torch.
"""

from __future__ import annotations

import shlex
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from refitkit.cli.options import common_options, file_option
from refitkit.cli.report import verdict
from refitkit.cli.session import Session, plain
from refitkit.cli.tables import count, duration, facts, shown, size, table
from refitkit.errors import VerificationError
from refitkit.files.temporary import TemporaryFolder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rich.console import Console

    from refitkit.cli.demo_run import Accuracy, DemoResult


@click.command("demo", short_help="Compile a digit classifier, and refit it as it learns.")
@file_option("--keep", metavar="DIR", help="Keep checkpoints, program and module in DIR.")
@common_options
@click.pass_obj
def demo_command(session: Session, keep: Path | None) -> None:
    """Compile a digit classifier early in its training, and refit it to a later checkpoint.

    Needs scikit-learn and a C++ compiler. Exits with 1 if the refitted engine and the later model
    disagree on any test digit.
    """
    with _folder(keep) as folder:
        result = _run(session, folder)
    problems = result.problems()
    error = VerificationError("The demo gave wrong results.", problems=problems, report=result)
    # Only one JSON object may be printed: the error, which contains the measurements.
    if problems and session.as_json:
        raise error
    session.result(plain(result), lambda console: _print(console, result, keep))
    if problems:
        raise error


def _run(session: Session, folder: Path) -> DemoResult:
    # First the pipeline: it reports a broken torch, which importing demo_run would raise.
    pipeline = session.silent_pipeline()
    from refitkit.cli.demo_run import Demo

    return Demo(pipeline, folder, session.progress.show).run()


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with TemporaryFolder() as folder:
        yield folder.path


def _print(console: Console, result: DemoResult, keep: Path | None) -> None:
    rows = [
        _accuracy("early checkpoint, compiled", result.early, result.samples),
        _accuracy("later checkpoint, refitted", result.later, result.samples),
    ]
    title = f"{result.samples} handwritten digits, recognised by"
    console.print(table(("", "model", "engine", "digit by digit"), rows, title))
    console.print(table(("", "time", "against compiling"), _times(result), "times"))
    console.print(facts(_facts(result)))
    if not result.problems():
        console.print(
            f"\nRefitted in {duration(result.first_refit_seconds)} instead of compiled in "
            f"{duration(result.compile_seconds)}, and the engine agrees with the model on every "
            "digit."
        )
    if keep is not None:
        console.print()
        for line in _next_steps(keep):
            console.print(shown(line), soft_wrap=True)


def _accuracy(name: str, accuracy: Accuracy, samples: int) -> tuple[str, ...]:
    agreement = "all the same"
    if accuracy.differing:
        agreement = f"{accuracy.differing} of {samples} differ"
    return name, f"{accuracy.eager:.1%}", f"{accuracy.engine:.1%}", agreement


def _times(result: DemoResult) -> Iterator[tuple[str, ...]]:
    yield "compiling", duration(result.compile_seconds), ""
    first = f"{result.times_as_fast:.0f} times as fast"
    yield "first refit, outputs compared", duration(result.first_refit_seconds), first
    how = {"outputs": "outputs compared", "weights": "every slot read back"}
    for later in result.later_refits:
        name = f"later refits, {how[later.verifier]}"
        yield name, duration(later.seconds), f"{later.times_as_fast:.0f} times as fast"


def _facts(result: DemoResult) -> Iterator[tuple[str, str]]:
    yield "weights", f"{count(result.slots, 'slot')}, {size(result.weight_bytes)}"
    if result.report.verification is not None:
        yield "first refit", verdict(result.report.verification)
    refits = result.later_refits[0].refits
    yield "later refits", f"median of {refits}, alternating between both checkpoint files"


def _next_steps(keep: Path) -> Iterator[str]:
    names = ("digits.refitkit", "later.safetensors", "inputs.safetensors")
    module, weights, inputs = (shlex.quote(str(keep / name)) for name in names)
    yield "The saved module has the weights of the early checkpoint. Now try:"
    yield f"  refitkit inspect {module}"
    yield f"  refitkit refit {module} {weights} --inputs {inputs} --in-place"
    yield f"  refitkit verify {module} {weights}"
