"""``refitkit lora``: a base with adapters into a saved module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from refitkit.cli.api import (
    RefitWish,
    Session,
    common_options,
    refit_options,
    run_refit,
    weight_options,
)

if TYPE_CHECKING:
    from collections.abc import Collection


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


def alphas_of(texts: tuple[str, ...], adapters: Collection[str]) -> dict[str, Any]:
    """``{"a": 16.0, "b": "rank"}`` for ``("a=16", "b=rank")``.

    Raises:
        click.UsageError: An alpha is no number, or it is unclear which adapter it is for.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, alpha = text.rpartition("=")
        if not equals:
            if len(adapters) != 1:
                raise click.UsageError(f"--alpha {text}: name the adapter: --alpha ADAPTER={text}.")
            (name,) = adapters
        if name not in adapters or name in found:
            raise click.UsageError(f"--alpha {text}: {name!r} is no adapter, or was given before.")
        try:
            found[name] = alpha if alpha == "rank" else float(alpha)
        except ValueError as exc:
            raise click.UsageError(f"--alpha {text}: {alpha!r} is no number and not rank.") from exc
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
    help="Model of a pipeline, where adapters are for several: unet, text_encoder, ...",
)
@click.option(
    "--alpha",
    "alphas",
    multiple=True,
    metavar="[ADAPTER=]ALPHA",
    help="Alpha that an adapter was trained with, in place of the alpha in its files. Needed if "
    "they have none. rank: a scale of 1.",
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
    PEFT, or a LoRA file; its scale is 1 where none is given. With no adapter it is the base alone.
    An adapter whose files do not say its alpha is refused unless --alpha gives it.
    What MODULE holds now does not matter. Loading a module runs the code in it: use only files that
    you trust as you would a program.
    """
    from refitkit_peft.lora import Lora

    scales, wish = scales_of(adapters), RefitWish(module, **given)
    wish.check_files(base, *scales)
    run_refit(session, wish, Lora(base, scales, component, alphas_of(alphas, scales)))
