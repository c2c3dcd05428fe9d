"""The command ``refitkit lora``, which refits a saved module with a base and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from refitkit.cli.api import (
    RefitOptions,
    Session,
    common_options,
    refit_options,
    run_refit,
    weight_options,
)

if TYPE_CHECKING:
    from collections.abc import Collection


def scales_of(adapters: tuple[str, ...]) -> dict[str, float]:
    """The scales by adapter: ``{"a": 0.7, "b": 1.0}`` for ``("a=0.7", "b")``.

    A path may contain ``=``. If a file or folder with the whole text as its name exists, the text
    is a path without a scale.

    Raises:
        click.UsageError: A scale is not a number, or an adapter is repeated.
    """
    found: dict[str, float] = {}
    # rpartition: only the text after the last = is the scale.
    for text in adapters:
        name, equals, scale = text.rpartition("=")
        if not equals or Path(text).exists():
            name, scale = text, "1"
        try:
            number = float(scale)
        except ValueError as exc:
            raise click.UsageError(f"{scale!r} in {text!r} is not a number.") from exc
        if not name or name in found:
            raise click.UsageError(f"{text!r} has no path, or repeats one.")
        found[name] = number
    return found


def alphas_of(texts: tuple[str, ...], adapters: Collection[str]) -> dict[str, Any]:
    """The alphas by adapter: ``{"a": 16.0, "b": "rank"}`` for ``("a=16", "b=rank")``.

    Raises:
        click.UsageError: An alpha is not a number, or its adapter is unclear.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, alpha = text.rpartition("=")
        if not equals:
            if len(adapters) != 1:
                raise click.UsageError(f"--alpha {text}: name the adapter: --alpha ADAPTER={text}.")
            (name,) = adapters
        if name not in adapters or name in found:
            raise click.UsageError(f"--alpha {text}: {name!r} is not an adapter, or is repeated.")
        try:
            found[name] = alpha if alpha == "rank" else float(alpha)
        except ValueError as exc:
            raise click.UsageError(f"--alpha {text}: {alpha!r} is not a number or rank.") from exc
    return found


@click.command("lora", short_help="Put a base with LoRA adapters into a saved module.")
@click.argument("module")
@click.argument("base")
@click.argument("adapters", nargs=-1, metavar="[ADAPTER[=SCALE]]...")
@refit_options()
@click.option(
    "--component",
    default="",
    metavar="NAME",
    help="Model of a pipeline, if adapters are for several: unet, text_encoder, ...",
)
@click.option(
    "--alpha",
    "alphas",
    multiple=True,
    metavar="[ADAPTER=]ALPHA",
    help="Alpha of the adapter's training, in place of the alpha in its files. Required if they "
    "have none. 'rank' sets the factor to 1.",
)
@weight_options
@common_options
@click.pass_obj
def lora_command(
    session: Session,
    /,
    module: str,
    base: str,
    adapters: tuple[str, ...],
    component: str,
    alphas: tuple[str, ...],
    **given: Any,
) -> None:
    """Put BASE with ADAPTERs added into MODULE.

    BASE is a checkpoint: the weights that the adapters were trained on. An ADAPTER is a folder of
    PEFT, or a LoRA file; its default scale is 1. Without adapters, MODULE gets the base alone.
    An adapter whose files contain no alpha needs --alpha. The current weights of MODULE do not
    matter. Loading a module runs the code in it: use only files that you trust like a program.
    """
    from refitkit_peft.lora import Lora

    scales, options = scales_of(adapters), RefitOptions(module, **given)
    options.check_files(base, *scales)
    run_refit(session, options, Lora(base, scales, component, alphas_of(alphas, scales)))
