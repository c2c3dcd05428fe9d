"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click

from refitkit.cli.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable

Command = TypeVar("Command", bound="Callable[..., Any] | click.Command")
Callback: TypeAlias = "Callable[[click.Context, click.Parameter, Any], Any]"

_PATH = click.Path(path_type=Path, readable=False)
"""Not checked by click: what cannot be read is refused in one way, wherever it is named."""
_PYTHON_WORDS = {"True": True, "False": False, "None": None}


def _be_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's
    session = ctx.find_object(Session)
    if value and session is not None:
        session.verbose = True


def acting_option(
    *names: str,
    callback: Callback | None = None,
    help: str,  # noqa: A002 - as in click
    **more: Any,
) -> Callable[[Command], Command]:
    """An option that works by itself: its callback acts, and the command is not given its value.

    Args:
        *names: As in click.
        callback: What acts; None where ``refitkit.cli.arguments`` does, before commands exist.
        help: As in click.
        **more: As in click.
    """
    return click.option(*names, callback=callback, expose_value=False, help=help, **more)


_COMMON = (
    acting_option(
        "--json", is_flag=True, help="Print the result as JSON on stdout, and nothing else there."
    ),
    acting_option(
        "--no-plugin",
        metavar="NAME",
        multiple=True,
        help="Switch a plugin off; can be given several times.",
    ),
    acting_option(
        "-v",
        "--verbose",
        is_flag=True,
        callback=_be_verbose,
        help="Tell what takes how long; show tracebacks of errors.",
    ),
)


def common_options(command: Command) -> Command:
    """Give a command ``--json``, ``--no-plugin`` and ``-v``; all three work by themselves."""
    return with_options(command, *_COMMON)


def with_options(command: Command, *options: Callable[[Any], Any]) -> Command:
    """A command with options, which its help shows in this order."""
    for add in reversed(options):
        command = add(command)
    return command


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
