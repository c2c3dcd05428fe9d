"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from refitkit.cli.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable

Command = TypeVar("Command", bound="Callable[..., Any] | click.Command")

_PATH = click.Path(path_type=Path, readable=False)
"""Not checked by click: what cannot be read is refused in one way, wherever it is named."""
_PYTHON_WORDS = {"True": True, "False": False, "None": None}


def common_options(command: Command) -> Command:
    """Give a command ``--json``, ``--no-plugin`` and ``-v``; all three work by themselves."""
    for add in (_verbose, _no_plugin, _json):
        command = add(command)
    return command


def _be_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's
    session = ctx.find_object(Session)
    if value and session is not None:
        session.verbose = True


# The first two are acted upon by refitkit.cli.arguments, before commands exist.
_json = click.option(
    "--json",
    is_flag=True,
    expose_value=False,
    help="Print the result as JSON on stdout, and nothing else there.",
)
_no_plugin = click.option(
    "--no-plugin",
    metavar="NAME",
    multiple=True,
    expose_value=False,
    help="Switch a plugin off; can be given several times.",
)
_verbose = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_be_verbose,
    help="Tell what takes how long; show tracebacks of errors.",
)


def file_argument(name: str) -> Callable[[Command], Command]:
    """A file that a command reads. Whether it can is for those to say who know what it is."""
    return click.argument(name, type=_PATH)


def file_option(
    *names: str,
    required: bool = False,
    metavar: str = "FILE",
    help: str,  # noqa: A002 - as in click
    **more: Any,
) -> Callable[[Command], Command]:
    """A file or folder that is given by an option; ``more`` is as in click."""
    return click.option(*names, type=_PATH, metavar=metavar, required=required, help=help, **more)


def as_options(
    ctx: click.Context, param: click.Parameter, pairs: tuple[str, ...]
) -> dict[str, Any]:
    """``{"max_autotune": True}`` for ``("max_autotune=true",)``; for click's ``callback``.

    A value is JSON, or one of Python's True, False and None, or else text.

    Raises:
        click.BadParameter: Not of the form KEY=VALUE, or a key is given twice.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{pair!r} is not of the form KEY=VALUE.", ctx, param)
        if key in options:
            raise click.BadParameter(f"{key!r} is given twice.", ctx, param)
        options[key] = _value(text)
    return options


def _value(text: str) -> Any:
    if text in _PYTHON_WORDS:  # as text, "False" would count as true
        return _PYTHON_WORDS[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
