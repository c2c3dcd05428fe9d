"""The plugin that adds the built-in commands, through the hook that third parties use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.cli.session import COMMANDS
from refitkit.hookspecs import hookimpl

if TYPE_CHECKING:
    import click

name = COMMANDS


@hookimpl
def refitkit_register_commands(cli: click.Group) -> None:
    """Add the commands in the order of a workflow, in which ``--help`` lists them."""
    from refitkit.cli.compile import compile_command
    from refitkit.cli.demo import demo_command
    from refitkit.cli.diff import diff_command
    from refitkit.cli.doctor import doctor_command
    from refitkit.cli.inspect import inspect_command
    from refitkit.cli.plan import plan_group
    from refitkit.cli.plugins import plugins_group
    from refitkit.cli.refit import refit_command
    from refitkit.cli.verify import verify_command

    cli.add_command(compile_command)
    cli.add_command(inspect_command)
    cli.add_command(plan_group)
    cli.add_command(refit_command)
    cli.add_command(verify_command)
    cli.add_command(diff_command)
    cli.add_command(plugins_group)
    cli.add_command(doctor_command)
    cli.add_command(demo_command)
