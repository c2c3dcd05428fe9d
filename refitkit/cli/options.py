"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click
from pydantic import ValidationError

from refitkit.cli.session import Session
from refitkit.cli.settings import Settings
from refitkit.model.rules import FAMILIES, Pack, Rename

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import BaseModel


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
        callback: What acts; None where ``refitkit.cli.session`` does, before commands exist.
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


# MERGED setting_options: The options that settings come by: ``--config``, ``--set``, and rules
# for weights.

_SIDE = "_side_"
"""Between the letter of a side and the name of a rule, in names of parameters."""
_DIM = re.compile(r"(?:@(-?\d+))?(@T)?$")


def _settings(ctx: click.Context) -> Settings:
    session = ctx.find_object(Session)
    return session.settings if session is not None else Settings()


def _read_config(ctx: click.Context, _: click.Parameter, file: Path | None) -> None:
    if file is not None:
        _settings(ctx).read(file)


def _set_plugins(ctx: click.Context, param: click.Parameter, pairs: tuple[str, ...]) -> None:
    session = ctx.find_object(Session)
    if session is None:
        return
    there = sorted(info.name for info in session.host.plugins())
    for name, value in as_options(ctx, param, pairs).items():
        plugin, dot, key = name.partition(".")
        if not dot or not plugin or not key:
            raise click.BadParameter(f"{name!r} is not of the form PLUGIN.KEY.", ctx, param)
        if plugin not in there:
            message = f"There is no plugin {plugin!r}. There are: {', '.join(there)}."
            raise click.BadParameter(message, ctx, param)
        session.settings.plugins.setdefault(plugin, {})[key] = value


def _set_rule(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Note a rule whose value is taken as it is."""
    if value is not None:
        settings = _settings(ctx)
        side, _, field = str(param.name).rpartition(_SIDE)
        (settings.side_rules[side] if side else settings.rules)[field] = value


def _set_list(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> None:
    """Note a rule that is a list."""
    _set_rule(ctx, param, list(given) or None)


def _set_patterns(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> None:
    """Note a rule of regular expressions."""
    for text in given:
        try:
            re.compile(text)
        except re.error as exc:
            message = f"{text!r} cannot be used: it is no regular expression: {exc}."
            raise click.BadParameter(message, ctx, param) from exc
    _set_rule(ctx, param, list(given) or None)


def _fields_of_rename(text: str) -> dict[str, Any] | None:
    pattern, equals, to = text.rpartition("=")  # patterns may have (?=...)
    return {"pattern": pattern, "to": to} if equals and pattern else None


def _fields_of_pack(text: str) -> dict[str, Any] | None:
    into, equals, rest = text.partition("=")
    how = _DIM.search(rest)
    dim, turned = how.groups() if how else (None, None)
    parts = _DIM.sub("", rest, count=1).split(",")
    if not equals or not into or not all(parts) or "@" in "".join(parts):
        return None
    return {"into": into, "parts": parts, "dim": int(dim or 0), "transposed": turned is not None}


def _rules_option(
    names: tuple[str, str],
    kind: type[BaseModel],
    form: str,
    fields_of: Callable[[str], dict[str, Any] | None],
    about: str,
) -> Callable[[Command], Command]:
    """An option that can be given several times, a rule each time.

    Args:
        names: Its flag, and the name of its parameter.
        kind: What rules are.
        form: How one is written, for help and errors.
        fields_of: Fields of a rule, or None for a text that is not of this form.
        about: What help says of it.
    """

    def note(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> None:
        made = []
        for text in given:
            fields = fields_of(text)
            if fields is None:
                raise click.BadParameter(f"{text!r} is not of the form {form}.", ctx, param)
            made.append(_valid(ctx, param, text, kind, **fields))
        _set_rule(ctx, param, made or None)

    return acting_option(*names, metavar=form, multiple=True, callback=note, help=about)


def _valid(
    ctx: click.Context, param: click.Parameter, text: str, kind: type[BaseModel], **fields: Any
) -> dict[str, Any]:
    """A rule as plain data.

    Raises:
        click.BadParameter: Its parts cannot be used; says why, for each.
    """
    try:
        return kind(**fields).model_dump()
    except ValidationError as exc:
        why = "; ".join(error["msg"].removeprefix("Value error, ") for error in exc.errors())
        raise click.BadParameter(f"{text!r} cannot be used: {why}.", ctx, param) from exc


_CONFIG = (
    file_option(
        "--config",
        metavar="FILE",
        callback=_read_config,
        expose_value=False,
        help="Settings in a .toml or .json file, by fields of refitkit.Config; flags win over it.",
    ),
    acting_option(
        "--set",
        metavar="PLUGIN.KEY=JSON",
        multiple=True,
        callback=_set_plugins,
        help="A setting of a plugin. Can be given several times.",
    ),
)


def _rules(side: str = "") -> tuple[Callable[[Command], Command], ...]:
    """Options for all rules, or those for one side of a comparison alone.

    Args:
        side: Letter of the side.
    """

    def named(flag: str, field: str = "") -> tuple[str, str]:
        field = field or flag
        return (f"--{side}-{flag}", f"{side}{_SIDE}{field}") if side else (f"--{flag}", field)

    def about(flag: str, text: str) -> str:
        return f"--{flag} for {side.upper()} alone." if side else text

    return (
        acting_option(
            *named("subtree"),
            metavar="PREFIX",
            callback=_set_rule,
            help=about("subtree", "Use only weights whose names begin so, without it."),
        ),
        acting_option(
            *named("ignore"),
            metavar="PATTERN",
            multiple=True,
            callback=_set_patterns,
            help=about(
                "ignore",
                r"Leave out weights whose whole names match: 'lm_head\..*'. Can be given several "
                "times.",
            ),
        ),
        _rules_option(
            named("rename"),
            Rename,
            "PATTERN=TO",
            _fields_of_rename,
            about(
                "rename",
                r"Rename weights whose whole names match: 'encoder\.(.*)=\1'. Can be given "
                "several times; the first that matches counts.",
            ),
        ),
        _rules_option(
            named("pack"),
            Pack,
            "INTO=PART,PART[@DIM][@T]",
            _fields_of_pack,
            about(
                "pack",
                "Put parts in one piece, end to end or stacked in a dimension (0), or cut a piece "
                "into them: '{}.qkv.weight={}.q.weight,{}.k.weight,{}.v.weight'. A * stands for "
                "numbers from 0 on; @T: parts are transposed in the piece. Can be given several "
                "times.",
            ),
        ),
        acting_option(
            *named("family", "families"),
            type=click.Choice(list(FAMILIES)),
            multiple=True,
            callback=_set_list,
            help=about(
                "family",
                "Ready rules for pieces and parts of a family of models. Can be given several "
                "times.",
            ),
        ),
        acting_option(
            *named("cast"),
            type=click.Choice(["no", "lossless", "any"]),
            callback=_set_rule,
            help=about(
                "cast",
                "Cast weights of other dtypes: where every value stays what it is, or any.  "
                "[default: no]",
            ),
        ),
    )


def config_options(command: Command) -> Command:
    """Give a command ``--config`` and ``--set``; both work by themselves."""
    return with_options(command, *_CONFIG)


def weight_options(command: Command) -> Command:
    """Give a command that reads weights all settings; see ``Config.rules`` for what rules do."""
    return with_options(command, *_CONFIG, *_rules())


def side_options(command: Command) -> Command:
    """Give a command that compares two sets of weights all rules for each of them alone."""
    return with_options(command, *_rules("a"), *_rules("b"))
