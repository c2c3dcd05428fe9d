"""``refitkit plugins``: who takes part; checking plugins, and making new ones."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from refitkit.cli.known import BROKEN, all_plugins
from refitkit.cli.options import common_options
from refitkit.cli.plugins_check import check_command
from refitkit.cli.plugins_new import new_command
from refitkit.cli.tables import table

if TYPE_CHECKING:
    from rich.console import Console

    from refitkit.cli.known import KnownPlugin
    from refitkit.cli.session import Session


@click.group("plugins", invoke_without_command=True, short_help="List, check and make plugins.")
@common_options
@click.pass_context
def plugins_group(ctx: click.Context) -> None:
    """List the plugins in use, check one, or make a new one. Alone it lists them."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_plugins)


@plugins_group.command("list")
@common_options
@click.pass_obj
def list_plugins(session: Session) -> None:
    """List all plugins: where they come from, and the hooks that they implement.

    Those that are switched off are listed too, and those that are broken, with the reason; what
    they would do, other commands refuse to do without.
    """
    plugins = all_plugins(session)
    for one in plugins:
        if one.state == BROKEN:
            session.warn(one.problem)
    data = {"plugins": [asdict(one) for one in plugins]}
    session.result(data, lambda console: print_plugins(console, plugins))


def print_plugins(console: Console, plugins: list[KnownPlugin]) -> None:
    """Print a table of plugins."""
    columns = ("name", "state", "origin", "module", "hooks")
    rows = [
        (one.name, one.state, one.origin, one.module, "\n".join(_short(one))) for one in plugins
    ]
    console.print(table(columns, rows))


def _short(plugin: KnownPlugin) -> list[str]:
    """Hooks without the prefix that all of them have, with their kinds."""
    return [f"{hook.removeprefix('refitkit_')} ({kind})" for hook, kind in plugin.hooks.items()]


plugins_group.add_command(check_command)
plugins_group.add_command(new_command)
