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
    """

    as_json: bool = False
    no_plugins: tuple[str, ...] = ()


def look_ahead(args: Sequence[str]) -> Early:
    """Find early options anywhere before a ``--``; click parses and checks them again later."""
    if "--" in args:
        args = args[: args.index("--")]
    names = [after for option, after in pairwise(args) if option == _NO_PLUGIN]
    joined = f"{_NO_PLUGIN}="
    names += [arg.removeprefix(joined) for arg in args if arg.startswith(joined)]
    return Early("--json" in args, tuple(names))
