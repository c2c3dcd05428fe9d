"""``refitkit refit``: new weights into a saved module."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refitkit.cli.options import common_options, file_option
from refitkit.cli.session import Session, plain
from refitkit.cli.setting_options import weight_options
from refitkit.errors import SourceError, UnsupportedTargetError, WeightMismatchError

if TYPE_CHECKING:
    from refitkit.model import RefitReport

_FLAGS = {
    "missing": "--partial leaves slots as they are that the weights have nothing for",
    "non-finite": "--no-check-finite lets them in",
    "dtype": "--cast lossless, or --cast any, casts weights of other dtypes",
    "unexpected": "--rename and --subtree say what names become",
}
"""What a flag of this command does about a kind of problem."""


@dataclass(frozen=True)
class _Wish:
    """The arguments of the command, as they were given."""

    module: str
    weights: str
    output: Path | None
    in_place: bool
    plan: Path | None
    inputs: Path | None
    verifier: str | None
    partial: bool
    no_check_finite: bool
    changes: str | None

    def settings(self) -> dict[str, Any]:
        """What flags say of the settings; only what was given."""
        given = {"changes": self.changes} if self.changes else {}
        return {**given, "check_finite": False} if self.no_check_finite else given

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

    def check_files(self) -> None:
        """Find out what can be found out before torch is imported."""
        from refitkit.cli.files import check_output, check_readable

        target = self.target()
        if self.in_place and not target.exists():
            raise UnsupportedTargetError(f"There is no file {self.module!r} to replace.")
        check_readable(self.module, UnsupportedTargetError)
        check_readable(self.weights, SourceError)
        module = None if self.in_place else self.module
        check_output(target, module, self.weights, self.plan, self.inputs, folders=True)


@click.command("refit", short_help="Put new weights into a saved module.")
@click.argument("module")
@click.argument("weights")
@file_option("-o", "--output", help="Where to write the refitted module.")
@click.option("--in-place", is_flag=True, help="Replace MODULE, in one step, once all is well.")
@file_option("--plan", help="The plan to follow; the module's own where not given.")
@file_option(
    "--inputs", help="Tensors to verify outputs with, named 0, 1, ... or as the model's keywords."
)
@click.option(
    "--verify",
    "verifier",
    metavar="NAME",
    help="Verifier: outputs, weights, ..., or none.  [default: outputs if there are inputs, "
    "else weights where they can be read back]",
)
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
def refit_command(session: Session, /, **given: Any) -> None:
    """Put WEIGHTS (.safetensors, or a state_dict of torch.save) into MODULE.

    The module is written only if all weights fit and, without --verify none, the result is
    verified. Loading a module runs the code in it: use only files that you trust as you would a
    program.
    """
    from refitkit.cli.report import print_report

    wish = _Wish(**given)
    wish.check_files()
    try:
        report = _refit(session, wish)
    except WeightMismatchError as exc:
        exc.hint = _with_flags(exc)
        raise
    finished, output = session.progress.finished, str(wish.target())
    session.result(plain(report), lambda console: print_report(console, report, finished, output))


def _refit(session: Session, wish: _Wish) -> RefitReport:
    from refitkit.cli.files import check_module_folder, load_inputs, load_plan

    pipeline = session.pipeline(**wish.settings())
    if not wish.in_place:
        check_module_folder(pipeline, wish.target())
    plan = load_plan(pipeline, wish.plan)
    result = pipeline.refit(
        wish.module,
        wish.weights,
        plan=plan,
        inputs=load_inputs(pipeline, wish.inputs),
        verify=wish.verifier,
        partial=wish.partial,
    )
    result.module.save(wish.target())
    return result.report


def _with_flags(exc: WeightMismatchError) -> str:
    kinds = {problem.kind for problem in exc.problems}
    hints = [exc.hint, *(f"{text}." for kind, text in _FLAGS.items() if kind in kinds)]
    return "\n".join(hint for hint in hints if hint)
