"""``refitkit refit``, and the parts that other commands need to refit a saved module.

A command of a plugin gets the module and its weights in its own way. ``refit_options``,
``RefitOptions`` and ``run_refit`` do the rest in the same way for all commands::

    @click.command("put")
    @click.argument("module")
    @click.argument("name")
    @refit_options()
    @common_options
    @click.pass_obj
    def put(session: Session, /, module: str, name: str, **given: Any) -> None:
        options = RefitOptions(module, **given)
        options.check_files()
        run_refit(session, options, weights_of(name))
"""

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


_OUTPUT = "Write the refitted module to this file."

_IN_PLACE = (
    file_option("-o", "--output", help=_OUTPUT),
    click.option(
        "--in-place", is_flag=True, help="Replace MODULE atomically, after the verification."
    ),
)
_NEVER_IN_PLACE = (file_option("-o", "--output", required=True, help=_OUTPUT),)

_COMMON = (
    file_option("--plan", help="Use the plan in this file instead of the module's own."),
    file_option(
        "--inputs",
        help="Tensors to verify outputs with, named 0, 1, ... or by the model's keywords.",
    ),
    click.option(
        "--verify",
        "verifier",
        metavar="NAME",
        help="Verifier: outputs, weights, ..., or none.  [default: outputs if there are inputs, "
        "else weights if they can be read back]",
    ),
    click.option(
        "--reset-state",
        is_flag=True,
        help="Reset stateful buffers, such as KV caches, that the weights do not contain.",
    ),
    click.option(
        "--reread",
        is_flag=True,
        help="Read weight files twice before the commit, and refuse weights that change between "
        "the readings.",
    ),
)


def refit_options(*, in_place: bool = False) -> Callable[[Command], Command]:
    """Give a command the options of a refit, from ``-o`` to ``--reread``.

    The command gets their values by the names of the attributes of :class:`RefitOptions`.

    Args:
        in_place: Whether to add ``--in-place``. Then the user must give either it or ``-o``.
    """
    target = _IN_PLACE if in_place else _NEVER_IN_PLACE
    return lambda command: with_options(command, *target, *_COMMON)


@dataclass(frozen=True)
class RefitOptions:
    """The request of a command that refits a saved module: the module, and values of options.

    Attributes:
        module: Path of the saved module, or a name that a plugin knows.
        output: Path for the refitted module; None if ``-o`` was not given.
        in_place: Whether to replace the file of the module.
        plan: File with the plan to use; None: the module's own plan.
        inputs: File with the inputs for the verifier.
        verifier: Name of the verifier; None: ``refitkit.refit`` chooses one.
        reset_state: Whether to reset state that the weights do not contain, instead of keeping it.
        reread: Whether to read files of weights twice; see ``refitkit.Config``.
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
        """Path of the refitted module.

        Raises:
            click.UsageError: Neither ``-o`` nor ``--in-place`` was given, or both.
        """
        if self.in_place == (self.output is not None):
            raise click.UsageError("Give either -o FILE or --in-place.")
        if self.output is not None:
            return self.output
        # Replace the file that a link points at, not the link.
        return Path(self.module).resolve()

    def check_files(self, *weights: str | Path) -> None:
        """Check all paths before torch is imported.

        Args:
            *weights: All files and folders that weights are read from; the result must not replace
                them. A name that is not an existing path passes, because a plugin may know it.

        Raises:
            RefitError: An existing path cannot be read, or the module cannot be written.
            click.UsageError: Neither ``-o`` nor ``--in-place`` was given, or both; or the result
                would replace a file that is read.
        """
        target = self.target
        if self.in_place and not target.exists():
            raise UnsupportedTargetError(f"There is no file {self.module!r} to replace.")
        check_readable(self.module, UnsupportedTargetError)
        for name in weights:
            check_readable(name, SourceError)
        # In place, the module is read and replaced, which is what the user asked for.
        module = None if self.in_place else self.module
        check_output(target, module, *weights, self.plan, self.inputs, folders=True)


def run_refit(
    session: Session,
    options: RefitOptions,
    weights: object,
    *,
    partial: bool = False,
    settings: Mapping[str, object] | None = None,
) -> None:
    """Refit the module, write it after the verification, and print the report.

    Args:
        session: The run of the command line.
        options: The request; ``check_files`` has checked its paths.
        weights: Weights of any kind that ``refitkit.refit`` takes.
        partial: Whether slots that the weights do not contain keep their values.
        settings: Fields of :class:`refitkit.Config` from options of the command.

    Raises:
        RefitError: ``refitkit.refit`` or ``CompiledModule.save`` raised it; no file is written.
    """
    from refitkit.cli.report import print_report

    target = options.target
    pipeline = session.pipeline(**(settings or {}), **({"reread": True} if options.reread else {}))
    # In place, the target is the module itself, and loading it checks it.
    if not options.in_place:
        check_module_folder(pipeline, target)
    result = pipeline.refit(
        options.module,
        weights,
        plan=load_plan(pipeline, options.plan),
        inputs=load_inputs(pipeline, options.inputs),
        verify=options.verifier,
        partial=partial,
        reset_state=options.reset_state,
    )
    # A refit that fails has raised by now, so the target stays as it was.
    result.module.save(target)
    report, finished = result.report, session.progress.finished
    session.result(
        plain(report), lambda console: print_report(console, report, finished, str(target))
    )


# Hints of errors name arguments of Python, but users of the command need flags.
_FLAGS = {
    "partial=True": "pass --partial",
    "check_finite=False in the config": "pass --no-check-finite",
}
"""Flags of this command by the arguments that hints for Python callers name."""


@click.command("refit", short_help="Put new weights into a saved module.")
@click.argument("module")
@click.argument("weights")
@refit_options(in_place=True)
@click.option(
    "--partial", is_flag=True, help="Keep the values of slots that WEIGHTS does not contain."
)
@click.option(
    "--no-check-finite",
    is_flag=True,
    help="Accept NaN and infinity even if the present weights are finite.",
)
@click.option(
    "--changes",
    type=click.Choice(["sampled", "exact", "off"]),
    # No click default: an option that is not given must not override the file of --config.
    help="How to measure the change of each slot.  [default: sampled]",
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

    The result is written only if all weights fit and the verification succeeds; --verify none skips
    the verification. Loading a module runs the code in it: use only files that you trust as you
    would a program.
    """
    options = RefitOptions(module, **given)
    options.check_files(weights)
    settings: dict[str, object] = {"changes": changes} if changes else {}
    if no_check_finite:
        settings["check_finite"] = False
    try:
        run_refit(session, options, weights, partial=partial, settings=settings)
    except WeightMismatchError as exc:
        exc.problems = tuple(replace(p, hint=_with_flags(p.hint)) for p in exc.problems)
        raise


def _with_flags(hint: str) -> str:
    for setting, flag in _FLAGS.items():
        hint = hint.replace(setting, flag)
    return hint
