"""The hooks of the plugin, which the entry point ``peft`` of the group ``refitkit`` names."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from refitkit.hookspecs import hookimpl

from refitkit_peft.lora import Lora

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import click
    from refitkit.config import Config
    from refitkit.errors import Problem
    from refitkit.protocols import Plan, WeightSource


@hookimpl
def refitkit_load_weights(
    source: object, config: Config, open_weights: Callable[[object], WeightSource]
) -> WeightSource | None:
    """A source for a ``Lora`` or a ``Base``; None for all other weights."""
    # Do not import the module, which needs torch: a user with a Base has imported it already.
    known = sys.modules.get("refitkit_peft.base")
    if known is not None and isinstance(source, known.Base):
        source = Lora(source)
    if not isinstance(source, Lora):
        return None
    from refitkit_peft.base import Base

    base = source.base
    if not isinstance(base, Base):
        subtree = config.rules.subtree
        base = Base.with_opener(base, open_weights, reread=config.reread, subtree=subtree)
    return base.source(source)


@hookimpl
def refitkit_check(plan: Plan, source: WeightSource) -> Iterable[Problem]:
    """Problems with adapters on weights that fill no slot, or that are tied in the model."""
    from refitkit_peft.checks import problems

    return problems(plan.data, source)


@hookimpl
def refitkit_register_commands(cli: click.Group) -> None:
    """Add ``refitkit lora``."""
    from refitkit_peft.command import lora_command

    cli.add_command(lora_command)
