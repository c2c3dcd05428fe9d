"""The group ``refitkit`` itself: global options, and whose each command is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from refitkit import __version__
from refitkit.cli.names import COMMANDS
from refitkit.cli.options import common_options
from refitkit.errors import PluginError, RefitError, raise_if_resource
from refitkit.host import BrokenPlugin

if TYPE_CHECKING:
    from collections.abc import Callable

    from refitkit.host import Host

HOOK = "refitkit_register_commands"

_NOT_A_FAULT = (RefitError, OSError, click.ClickException, click.exceptions.Exit, click.Abort)


class PipeClosedError(Exception):
    """Nobody reads what is written any more."""


class RootGroup(click.Group):
    """A group that knows which plugin brought each command.

    Attributes:
        registrar: Name of the plugin that is adding commands now.
        owners: Names of plugins by the commands that they added.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As a ``click.Group``."""
        super().__init__(*args, **kwargs)
        self.registrar = COMMANDS
        self.owners: dict[str, str] = {}

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command.

        Raises:
            PluginError: The name is taken; names both plugins.
        """
        given = name or cmd.name or ""
        if given in self.owners:
            raise PluginError(
                f"The plugin {self.registrar!r} adds a command {given!r}, which the plugin "
                f"{self.owners[given]!r} has added already.",
                hint=f"Rename it; to go on without it: --no-plugin {self.registrar}.",
            )
        super().add_command(cmd, name)
        self.owners[given] = self.registrar

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click passes it
        """Commands in the order in which they were added: that of a workflow."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; a failure of a plugin's command is the plugin's.

        Raises:
            PluginError: A command that a plugin brought failed in a way of its own.
            PipeClosedError: Nobody reads the result.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError as exc:  # click would answer by ending the process with 1
            raise PipeClosedError from exc
        except _NOT_A_FAULT:
            raise
        except Exception as exc:
            raise_if_resource(exc, f"The command {ctx.invoked_subcommand!r} cannot run")
            command = ctx.invoked_subcommand or ""
            owner = self.owners.get(command, COMMANDS)
            if owner == COMMANDS:
                raise
            raise PluginError(
                f"The command {command!r} of the plugin {owner!r} failed: "
                f"{type(exc).__name__}: {exc}",
                hint="Report it to its authors; with -v a traceback says where it happened.",
            ) from exc


def make_group(host: Host, on_broken: Callable[[BrokenPlugin], None] | None = None) -> RootGroup:
    """The group with the commands of all plugins, built-in ones first.

    Args:
        host: The plugins.
        on_broken: Told of each plugin that failed to add its commands.

    Raises:
        PluginError: A plugin failed, or adds a command whose name is taken, and ``on_broken`` is
            None; names it.
    """

    @click.group("refitkit", cls=RootGroup, no_args_is_help=True)
    @common_options
    @click.version_option(__version__, prog_name="refitkit")
    def refitkit() -> None:
        """Put new weights into compiled inference engines, without compiling again.

        Exit codes: 0 done, 1 refused or mismatch, 2 usage, 3 plugin fault.
        """

    names = [info.name for info in host.plugins() if HOOK in info.hooks]
    for name in sorted(names, key=lambda one: one != COMMANDS):
        refitkit.registrar = name
        try:
            host.call_one(name, HOOK, cli=refitkit)
        except PluginError as exc:
            if on_broken is None:
                raise
            on_broken(BrokenPlugin(host.candidate(name), exc))
    return refitkit
