"""``refitkit inspect``: what is in a file. None of its code is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from refitkit.cli.options import common_options, file_argument
from refitkit.cli.session import Session, plain
from refitkit.cli.setting_options import config_options
from refitkit.errors import Problem, RefitError, ResourceError, UnsupportedTargetError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console

    from refitkit.pipeline import Pipeline


@dataclass(frozen=True)
class _Held:
    """What a file holds.

    Attributes:
        kind: ``module``, ``plan`` or ``weights``.
        data: All of it as plain data.
        human: Prints it.
    """

    kind: str
    data: dict[str, Any]
    human: Callable[[Console], None]


@click.command("inspect", short_help="Show what a module, a plan or a weights file holds.")
@file_argument("file")
@config_options
@common_options
@click.pass_obj
def inspect_command(session: Session, file: Path) -> None:
    """Show what FILE holds: a saved module, a plan, or weights. None of its code is run."""
    from refitkit.cli.files import check_readable

    check_readable(file, UnsupportedTargetError)
    if not file.exists():
        raise UnsupportedTargetError(f"{str(file)!r} does not exist.")
    held = _held(session.pipeline(), file)
    data = {"file": str(file), "kind": held.kind, **held.data}
    session.result(data, held.human)


def _held(pipeline: Pipeline, file: Path) -> _Held:
    """What the first reader makes of it that can read it.

    Raises:
        UnsupportedTargetError: None can; says why, for each.
    """
    problems = []
    for kind, read in _readers(file).items():
        try:
            return read(pipeline, file)
        except ResourceError:
            raise
        except RefitError as exc:
            problems.append(Problem(f"as {kind}", exc.message.rstrip(".")))
    hint = "A program of torch.export.save is not shown: reading it could run code."
    raise UnsupportedTargetError(
        f"{str(file)!r} holds nothing that refitkit can show.", problems=problems, hint=hint
    )


def _readers(file: Path) -> dict[str, Callable[[Pipeline, Path], _Held]]:
    """Readers by kind; for a name that says what is inside, one."""
    readers: dict[str, Callable[[Pipeline, Path], _Held]]
    readers = {"a module": _module, "a plan": _plan, "weights": _weights}
    by_suffix = {".safetensors": "weights", ".refitplan": "a plan"}
    if file.is_dir():
        return {"a module": _module}
    kind = by_suffix.get(file.suffix)
    return {kind: readers[kind]} if kind else readers


def _module(pipeline: Pipeline, file: Path) -> _Held:
    from refitkit.cli.describe import print_described

    described = dict(pipeline.describe(file))
    return _Held("module", described, lambda console: print_described(console, described))


def _plan(_: Pipeline, file: Path) -> _Held:
    from refitkit.cli.ledger import print_plan
    from refitkit.recipe import RefitPlan

    plan = RefitPlan.load(file)
    return _Held("plan", plain(plan.data), lambda console: print_plan(console, plan))


def _weights(pipeline: Pipeline, file: Path) -> _Held:
    from refitkit.cli.describe import described_weights, print_weights

    data = described_weights(pipeline.open_weights(file))
    return _Held("weights", data, lambda console: print_weights(console, data))
