"""``refitkit verify``: check whether a module holds these weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from refitkit.cli.options import common_options, file_option, weight_options
from refitkit.cli.session import Session, plain
from refitkit.errors import SourceError, UnsupportedTargetError

if TYPE_CHECKING:
    from pathlib import Path


@click.command("verify", short_help="Check whether a module holds these weights.")
@click.argument("module")
@click.argument("weights")
@file_option(
    "--inputs",
    help="Tensors to call the module with, named 0, 1, ... or by the model's keywords.",
)
@file_option("--plan", help="Use the plan in this file instead of the module's own.")
@click.option(
    "--with",
    "verifier",
    metavar="NAME",
    help="Verifier: outputs, weights, ...  [default: outputs if there are inputs, else weights]",
)
@weight_options
@common_options
@click.pass_obj
def verify_command(
    session: Session,
    module: str,
    weights: str,
    inputs: Path | None,
    plan: Path | None,
    verifier: str | None,
) -> None:
    """Check whether MODULE holds WEIGHTS; exit with 1 if it does not.

    Loading a module runs the code in it: use only files that you trust as you would a program.
    """
    from refitkit.cli.files import check_readable, load_inputs, load_plan
    from refitkit.cli.report import print_verification

    # Check both paths before the pipeline imports torch, which takes seconds.
    check_readable(module, UnsupportedTargetError)
    check_readable(weights, SourceError)
    pipeline = session.pipeline()
    followed = load_plan(pipeline, plan)
    given = load_inputs(pipeline, inputs)
    result = pipeline.verify(module, weights, plan=followed, inputs=given, with_=verifier)
    session.result(plain(result), lambda console: print_verification(console, result))
