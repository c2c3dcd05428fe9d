"""``refitkit plugins new``: a project for a plugin, which works as it is."""

from __future__ import annotations

import click

from refitkit.cli.options import common_options


@click.command("new")
@common_options
def new_command() -> None:
    """Later."""
