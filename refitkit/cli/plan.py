"""``refitkit plan``: make plans and show their contents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from refitkit.cli.options import (
    as_options,
    common_options,
    config_options,
    file_argument,
    file_option,
)
from refitkit.cli.session import Session, plain
from refitkit.errors import PlanMismatchError, UnsupportedTargetError

if TYPE_CHECKING:
    from pathlib import Path


@click.group("plan", no_args_is_help=True)
@common_options
def plan_group() -> None:
    """Make plans and show their contents.

    A plan says how each weight of a compiled module is computed from the model's state_dict.
    """


@plan_group.command("make", short_help="Make a plan for a program and its module.")
@file_argument("program")
@file_option("--target", help="Module that was compiled from PROGRAM.")
@click.option(
    "--backend",
    metavar="NAME",
    help="Plan offline for this backend, without --target. Not all backends can.",
)
@click.option(
    "--option",
    "options",
    metavar="KEY=VALUE",
    multiple=True,
    callback=as_options,
    help="Set an option of the backend, when planning offline. Can be repeated.",
)
@click.option(
    "--prove",
    is_flag=True,
    help="Compute slots from other weights, and compare them with those of the backend.",
)
@file_option("-o", "--output", required=True, help="Write the plan to this file.")
@config_options
@common_options
@click.pass_obj
def make(
    session: Session,
    program: Path,
    target: Path | None,
    backend: str | None,
    options: dict[str, Any],
    prove: bool,  # noqa: FBT001 - click passes it by name
    output: Path,
) -> None:
    """Make a plan for PROGRAM, a file of torch.export.save, and the module compiled from it.

    Modules that refitkit compiled already contain their plan. Loading a program or a module can run
    code that is in the file: use only files that you trust.
    """
    from refitkit.cli.files import check_output, check_readable, load_program
    from refitkit.cli.ledger import print_plan

    if target is None and backend is None:
        raise click.UsageError("Give --target FILE or --backend NAME, for which to plan.")
    # Check all paths before the pipeline imports torch, which takes seconds.
    check_output(output, program, target)
    if target is not None:
        check_readable(target, UnsupportedTargetError)
    pipeline = session.pipeline()
    loaded = load_program(program, verbose=session.verbose)
    # None, not False: the pipeline then still proves a plan that a module adopts.
    plan = pipeline.plan(loaded, target, backend, options, prove=prove or None)
    plan.save(output)
    data = {"output": str(output), **plain(plan.data)}
    session.result(data, lambda console: print_plan(console, plan))


@plan_group.command("show", short_help="Show a plan, or the recipe of one slot.")
@file_argument("file")
@click.option(
    "--slot",
    metavar="ENGINE/NAME",
    help="Show the recipe of one slot. A unique suffix of its name is enough.",
)
@common_options
@click.pass_obj
def show(session: Session, file: Path, slot: str | None) -> None:
    """Show the plan in FILE, a plan or a saved module, with one row for each slot.

    No code of the module is run.
    """
    from refitkit.cli.files import check_readable
    from refitkit.cli.ledger import as_data, find_row, print_plan, print_slot

    # before the pipeline imports torch, which takes seconds
    check_readable(file, PlanMismatchError)
    plan = session.pipeline().read_plan(file)
    if slot is None:
        session.result(plain(plan.data), lambda console: print_plan(console, plan))
        return
    row = find_row(plan.data, slot)
    session.result(as_data(plan.data, row), lambda console: print_slot(console, plan.data, row))
