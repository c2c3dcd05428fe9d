"""``refitkit refit``: new weights into a saved module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refitkit.cli.files import (
    check_module_folder,
    check_output,
    check_readable,
    load_inputs,
    load_plan,
)
from refitkit.cli.options import common_options, file_option, weight_options, with_options
from refitkit.cli.session import plain
from refitkit.errors import SourceError, UnsupportedTargetError, WeightMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from refitkit.cli.options import Command
    from refitkit.cli.session import Session


# MERGED refitting: What commands share that refit a saved module: their options, and how they
# end.
#
# A command takes the module and its weights in its own way; how they become a module on disk is
# the same for all of them::
#
# @click.command("put") @click.argument("module") @click.argument("name") @refit_options()
# @common_options @click.pass_obj def put(session: Session, /, module: str, name: str, **given:
# Any) -> None: wish = RefitWish(module, **given) wish.check_files() run_refit(session, wish,
# weights_of(name))

_OUTPUT = "Where to write the refitted module."

_IN_PLACE = (
    file_option("-o", "--output", help=_OUTPUT),
    click.option("--in-place", is_flag=True, help="Replace MODULE, in one step, once all is well."),
)
_NEVER_IN_PLACE = (file_option("-o", "--output", required=True, help=_OUTPUT),)

_HOW = (
    file_option("--plan", help="The plan to follow; the module's own where not given."),
    file_option(
        "--inputs",
        help="Tensors to verify outputs with, named 0, 1, ... or as the model's keywords.",
    ),
    click.option(
        "--verify",
        "verifier",
        metavar="NAME",
        help="Verifier: outputs, weights, ..., or none.  [default: outputs if there are inputs, "
        "else weights where they can be read back]",
    ),
    click.option(
        "--reset-state",
        is_flag=True,
        help="Reset buffers that calls write and no weights are given for, such as KV caches.",
    ),
    click.option(
        "--reread",
        is_flag=True,
        help="Read files of weights a second time before anything is changed, and refuse weights "
        "that are not the same in both readings.",
    ),
)


def refit_options(*, in_place: bool = False) -> Callable[[Command], Command]:
    """Give a command the options of a refit, ``-o`` to ``--reread``.

    It gets their values by name, as :class:`RefitWish` takes them.

    Args:
        in_place: Whether to give it ``--in-place``, too; then either that or ``-o`` is to be given.
    """
    where = _IN_PLACE if in_place else _NEVER_IN_PLACE
    return lambda command: with_options(command, *where, *_HOW)


@dataclass(frozen=True)
class RefitWish:
    """What the user of such a command wants; all but the module is what its options say.

    Attributes:
        module: Path of the saved module, or a name that a plugin knows.
        output: Where to write it once it is refitted; None: nothing was said.
        in_place: Whether to replace the file of the module.
        plan: File with the plan to follow; None: the module's own.
        inputs: File with the inputs for the verifier.
        verifier: Name of the verifier; None: as ``refitkit.refit`` chooses.
        reset_state: Whether state that the weights do not contain is reset, not kept.
        reread: Whether files of weights are read a second time; see ``refitkit.Config``.
    """

    module: str
    output: Path | None
    in_place: bool = False
    plan: Path | None = None
    inputs: Path | None = None
    verifier: str | None = None
    reset_state: bool = False
    reread: bool = False

    @property
    def target(self) -> Path:
        """Where to write the refitted module.

        Raises:
            click.UsageError: None was named, or two.
        """
        if self.in_place == (self.output is not None):
            raise click.UsageError("Say where to write: either -o FILE or --in-place.")
        if self.output is not None:
            return self.output
        return Path(self.module).resolve()  # a link goes on pointing at the module

    def check_files(self, *weights: str | Path) -> None:
        """Find out what can be found out before torch is imported.

        Args:
            *weights: All files and folders that weights are read from: none of them is written to.
                What is not there may be a plugin's own name, and passes.

        Raises:
            RefitError: Something is there and cannot be read, or the module cannot be written.
            click.UsageError: Not one place to write to was named, or one that is read.
        """
        target = self.target
        if self.in_place and not target.exists():
            raise UnsupportedTargetError(f"There is no file {self.module!r} to replace.")
        check_readable(self.module, UnsupportedTargetError)
        for name in weights:
            check_readable(name, SourceError)
        module = None if self.in_place else self.module
        check_output(target, module, *weights, self.plan, self.inputs, folders=True)


def run_refit(
    session: Session,
    wish: RefitWish,
    weights: object,
    *,
    partial: bool = False,
    settings: Mapping[str, object] | None = None,
) -> None:
    """Refit the module, write it once it is verified, and give the report as the result.

    Args:
        session: The run of the command line.
        wish: What the user wants; its files were checked.
        weights: Anything that ``refitkit.refit`` takes.
        partial: Whether slots that the weights have nothing for keep what they hold.
        settings: Fields of :class:`refitkit.Config` that the command has options for.

    Raises:
        RefitError: As ``refitkit.refit`` and ``CompiledModule.save`` raise it; nothing is written.
    """
    from refitkit.cli.report import print_report

    target = wish.target
    pipeline = session.pipeline(**(settings or {}), **({"reread": True} if wish.reread else {}))
    if not wish.in_place:
        check_module_folder(pipeline, target)
    result = pipeline.refit(
        wish.module,
        weights,
        plan=load_plan(pipeline, wish.plan),
        inputs=load_inputs(pipeline, wish.inputs),
        verify=wish.verifier,
        partial=partial,
        reset_state=wish.reset_state,
    )
    result.module.save(target)
    report, finished = result.report, session.progress.finished
    session.result(
        plain(report), lambda console: print_report(console, report, finished, str(target))
    )


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
