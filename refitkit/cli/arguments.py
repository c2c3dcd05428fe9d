"""What has to be known of the command line before there are commands that could parse it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_NO_PLUGIN = "--no-plugin"


@dataclass(frozen=True)
class Early:
    """Options that act before commands exist.

    Attributes:
        as_json: Whether ``--json`` is among the arguments. An error in parsing them is told as
            JSON, too.
        no_plugins: Names of plugins to switch off: which commands there are depends on them.
        command: What is likely the first command: the first argument that is no early option. Some
            commands can work although a plugin is broken.
    """

    as_json: bool = False
    no_plugins: tuple[str, ...] = ()
    command: str = ""


def look_ahead(args: Sequence[str]) -> Early:
    """Find early options anywhere before a ``--``; click parses and checks them again later."""
    if "--" in args:
        args = args[: args.index("--")]
    names = [after for option, after in pairwise(args) if option == _NO_PLUGIN]
    joined = f"{_NO_PLUGIN}="
    names += [arg.removeprefix(joined) for arg in args if arg.startswith(joined)]
    return Early("--json" in args, tuple(names), _first_command(args))


def _first_command(args: Sequence[str]) -> str:
    before = ""
    for arg in args:
        if not arg.startswith("-") and before != _NO_PLUGIN:
            return arg
        before = arg
    return ""
