"""``refitkit diff``: show the differences between two sets of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from refitkit.cli.options import common_options, file_option, side_options, weight_options
from refitkit.cli.session import Session, plain
from refitkit.errors import SourceError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from refitkit.model import DiffReport, DiffRow

DIFFERENT = 4
"""Exit code of ``--exit-code`` for a difference; no failure has this code."""

_COLUMNS = ("name", "state", "dtype", "shape", "relative", "largest", "share")


@click.command("diff", short_help="Show the differences between two sets of weights.")
@click.argument("a")
@click.argument("b")
@file_option("--plan", help="Use the plan in this file instead of the module's own.")
@click.option(
    "--top",
    metavar="N",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="Show at most N rows that differ.",
)
@click.option("--all", "everything", is_flag=True, help="Show all rows, including equal ones.")
@click.option("--exit-code", is_flag=True, help=f"Exit with {DIFFERENT} if they differ.")
@weight_options
@side_options
@common_options
@click.pass_obj
def diff_command(
    session: Session,
    a: str,
    b: str,
    plan: Path | None,
    top: int,
    *,
    everything: bool,
    exit_code: bool,
) -> int:
    """Show the differences between A and B for each tensor, the largest relative change first.

    A and B are weights (.safetensors, a state_dict of torch.save, a folder) or saved modules. If
    one is a module, its slots are compared with the values that the other weights would give them.
    --json prints all rows.

    Loading a module runs the code in it: use only files that you trust as you would a program.
    """
    from refitkit.cli.files import check_readable, load_plan

    # before the pipeline imports torch, which takes seconds
    for name in (a, b):
        check_readable(name, SourceError)
    pipeline = session.pipeline()
    rules = session.settings.side_rules
    report = pipeline.diff(
        a, b, plan=load_plan(pipeline, plan), rules_a=rules["a"], rules_b=rules["b"]
    )
    data = {"summary": report.summary, "counts": report.counts, **plain(report)}
    shown = report.rows if everything else [row for row in report.rows if row.state != "same"][:top]
    session.result(data, lambda console: print_diff(console, report, shown))
    # ``main`` uses an integer that a command returns as the exit code.
    return DIFFERENT if exit_code and report.differs else 0


def print_diff(
    console: Console, report: DiffReport, rows: list[DiffRow] | tuple[DiffRow, ...]
) -> None:
    """Print some rows of a diff, and a summary of all rows."""
    from refitkit.cli.tables import count, facts, table

    # With --all, ``rows`` has equal rows, too.
    left = sum(row.state != "same" for row in report.rows) - sum(r.state != "same" for r in rows)
    if rows:
        console.print(table(_COLUMNS, map(_cells, rows)))
    more = [("not shown", f"{count(left, 'row')} that differ: --all shows them")] if left else []
    notes = [("note", note) for note in report.notes]
    console.print(
        facts([("A", report.a), ("B", report.b), *more, *notes, ("summary", report.summary)])
    )


def _cells(row: DiffRow) -> tuple[str, ...]:
    from refitkit.cli.tables import shape

    state = f"{row.state}: {row.note}" if row.note else row.state
    dtype = f"{row.dtype} -> {row.other_dtype}" if row.other_dtype else row.dtype
    sizes = shape(row.shape)
    if row.other_shape is not None:
        sizes = f"{sizes} -> {shape(row.other_shape)}"
    return row.name, state, dtype, sizes, *map(_number, (row.relative, row.largest, row.share))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
