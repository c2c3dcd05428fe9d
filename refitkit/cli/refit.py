"""``refitkit refit``: new weights into a saved module."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from refitkit.cli.options import common_options
from refitkit.cli.refitting import RefitWish, refit_options, run_refit
from refitkit.cli.setting_options import weight_options
from refitkit.errors import WeightMismatchError

if TYPE_CHECKING:
    from refitkit.cli.session import Session

_FLAGS = {
    "partial=True": "pass --partial",
    "check_finite=False in the config": "pass --no-check-finite",
}
"""What hints for Python are as flags of this command."""


@click.command("refit", short_help="Put new weights into a saved module.")
@click.argument("module")
@click.argument("weights")
@refit_options(in_place=True)
@click.option("--partial", is_flag=True, help="Leave slots that WEIGHTS has nothing for.")
@click.option(
    "--no-check-finite",
    is_flag=True,
    help="Let NaN and infinity in, where present weights are finite.",
)
@click.option(
    "--changes",
    type=click.Choice(["sampled", "exact", "off"]),
    help="How to measure how far each slot moves.  [default: sampled]",
)
@weight_options
@common_options
@click.pass_obj
def refit_command(
    session: Session,
    /,
    module: str,
    weights: str,
    *,
    partial: bool,
    no_check_finite: bool,
    changes: str | None,
    **given: Any,
) -> None:
    """Put WEIGHTS (.safetensors, or a state_dict of torch.save) into MODULE.

    The module is written only if all weights fit and, without --verify none, the result is
    verified. Loading a module runs the code in it: use only files that you trust as you would a
    program.
    """
    wish = RefitWish(module, **given)
    wish.check_files(weights)
    settings: dict[str, object] = {"changes": changes} if changes else {}
    if no_check_finite:
        settings["check_finite"] = False
    try:
        run_refit(session, wish, weights, partial=partial, settings=settings)
    except WeightMismatchError as exc:
        exc.problems = tuple(replace(p, hint=_with_flags(p.hint)) for p in exc.problems)
        raise


def _with_flags(hint: str) -> str:
    for setting, flag in _FLAGS.items():
        hint = hint.replace(setting, flag)
    return hint
