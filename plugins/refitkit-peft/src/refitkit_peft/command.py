"""``refitkit lora``: a base with adapters into a saved module."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from refitkit.cli.options import common_options, file_option
from refitkit.cli.session import Session, plain
from refitkit.errors import SourceError, UnsupportedTargetError

if TYPE_CHECKING:
    from refitkit.model import RefitReport

    from refitkit_peft.lora import Lora


@dataclass(frozen=True)
class _Wish:
    """The arguments of the command, as they were given."""

    module: str
    base: str
    adapters: tuple[str, ...]
    output: Path
    component: str
    plan: Path | None
    inputs: Path | None
    verifier: str | None

    def lora(self) -> Lora:
        """The weights that are meant."""
        from refitkit_peft.lora import Lora

        return Lora(self.base, scales_of(self.adapters), self.component)

    def check_files(self) -> None:
        """Find out what can be found out before torch is imported."""
        from refitkit.cli.files import check_output, check_readable

        check_readable(self.module, UnsupportedTargetError)
        for name in (self.base, *scales_of(self.adapters)):
            check_readable(name, SourceError)
        read = (self.module, self.base, self.plan, self.inputs)
        check_output(self.output, *read, folders=True)


def scales_of(adapters: tuple[str, ...]) -> dict[str, float]:
    """``{"a": 0.7, "b": 1.0}`` for ``("a=0.7", "b")``.

    A name may hold ``=``: where something of the whole name is there, that is meant.

    Raises:
        click.UsageError: A scale is no number, or an adapter is given twice.
    """
    found: dict[str, float] = {}
    for text in adapters:
        name, equals, scale = text.rpartition("=")
        if not equals or Path(text).exists():
            name, scale = text, "1"
        try:
            number = float(scale)
        except ValueError as exc:
            raise click.UsageError(f"{scale!r} in {text!r} is no scale, such as 0.7.") from exc
        if not name or name in found:
            raise click.UsageError(f"{text!r} has no path, or one that was given before.")
        found[name] = number
    return found


@click.command("lora", short_help="Put a base with LoRA adapters into a saved module.")
@click.argument("module")
@click.argument("base")
@click.argument("adapters", nargs=-1, metavar="[ADAPTER[=SCALE]]...")
@file_option("-o", "--output", required=True, help="Where to write the refitted module.")
@click.option(
    "--component",
    default="",
    metavar="NAME",
    help="Model of a pipeline, where adapters are for several: unet, text_encoder, ...",
)
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
@common_options
@click.pass_obj
def lora_command(session: Session, /, **given: Any) -> None:
    """Put BASE with ADAPTERs added into MODULE.

    BASE is a checkpoint: the weights that the adapters were trained on. An ADAPTER is a folder of
    PEFT, or a LoRA file; its scale is 1 where none is given. With no adapter it is the base alone.
    What MODULE holds now does not matter. Loading a module runs the code in it: use only files that
    you trust as you would a program.
    """
    from refitkit.cli.report import print_report

    wish = _Wish(**given)
    wish.check_files()
    report = _refit(session, wish)
    finished, output = session.progress.finished, str(wish.output)
    session.result(plain(report), lambda console: print_report(console, report, finished, output))


def _refit(session: Session, wish: _Wish) -> RefitReport:
    from refitkit.cli.files import check_module_folder, load_inputs, load_plan

    lora = wish.lora()
    pipeline = session.pipeline()
    check_module_folder(pipeline, wish.output)
    result = pipeline.refit(
        wish.module,
        lora,
        plan=load_plan(pipeline, wish.plan),
        inputs=load_inputs(pipeline, wish.inputs),
        verify=wish.verifier,
    )
    result.module.save(wish.output)
    return result.report
