"""``refitkit plugins``: who takes part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from refitkit.cli.known import all_plugins
from refitkit.cli.options import common_options
from refitkit.cli.tables import table

if TYPE_CHECKING:
    from rich.console import Console

    from refitkit.cli.session import Session
    from refitkit.host import PluginInfo


@click.group("plugins", invoke_without_command=True, short_help="List the plugins in use.")
@common_options
@click.pass_context
def plugins_group(ctx: click.Context) -> None:
    """List the plugins in use: built-in ones, and those that are installed beside them."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_plugins)


@plugins_group.command("list")
@common_options
@click.pass_obj
def list_plugins(session: Session) -> None:
    """List all plugins with their origin and hooks."""
    plugins = all_plugins(session)
    data = {
        "plugins": [
            {"name": info.name, "origin": info.origin, "hooks": info.hooks} for info in plugins
        ]
    }
    session.result(data, lambda console: print_plugins(console, plugins))


def print_plugins(console: Console, plugins: list[PluginInfo]) -> None:
    """Print a table of plugins."""
    rows = [(info.name, info.origin, "\n".join(_short(info.hooks))) for info in plugins]
    console.print(table(("name", "origin", "hooks"), rows))


def _short(hooks: tuple[str, ...]) -> list[str]:
    """Hooks without the prefix that all of them have."""
    return [hook.removeprefix("refitkit_") for hook in hooks]
