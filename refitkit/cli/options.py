"""Options that several commands share, and the functions that parse their values.

``common_options``, ``config_options``, ``weight_options`` and ``side_options`` give a command a set
of options. Most of them are acting options: a callback stores the value in the ``Session``, and the
command does not get it. The second half of the module has the options for settings.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click
from pydantic import ValidationError

from refitkit.cli.session import Session
from refitkit.cli.settings import CommandSettings
from refitkit.model.rules import FAMILIES, Pack, Rename

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import BaseModel


Command = TypeVar("Command", bound="Callable[..., Any] | click.Command")
Callback: TypeAlias = "Callable[[click.Context, click.Parameter, Any], Any]"

# click does not check files, so that ``check_readable`` refuses all of them with one message.
_PATH = click.Path(path_type=Path, readable=False)


def acting_option(
    *names: str,
    callback: Callback | None = None,
    help: str,  # noqa: A002 - as in click
    **more: Any,
) -> Callable[[Command], Command]:
    """An option whose callback acts; the command does not get its value.

    Args:
        *names: Names of the option, as in click.
        callback: Function that acts on the value. None: ``parse_early_options`` has read the option
            before commands exist.
        help: Help text.
        **more: Further arguments of ``click.option``.
    """
    return click.option(*names, callback=callback, expose_value=False, help=help, **more)


def _be_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's
    session = ctx.find_object(Session)
    # never reset: -v may stand before the subcommand, whose own -v is False then
    if value and session is not None:
        session.verbose = True


_COMMON = (
    acting_option("--json", is_flag=True, help="Print only the result on stdout, as JSON."),
    acting_option(
        "--no-plugin",
        metavar="NAME",
        multiple=True,
        help="Switch a plugin off. Can be repeated.",
    ),
    acting_option(
        "-v",
        "--verbose",
        is_flag=True,
        callback=_be_verbose,
        help="Show the time of each stage, and tracebacks of errors.",
    ),
)


def common_options(command: Command) -> Command:
    """Give a command the acting options ``--json``, ``--no-plugin`` and ``-v``."""
    return with_options(command, *_COMMON)


def with_options(command: Command, *options: Callable[[Any], Any]) -> Command:
    """A command with these options; its help shows them in this order."""
    # Each decorator puts its option before those that the command has.
    for add in reversed(options):
        command = add(command)
    return command


def file_argument(name: str) -> Callable[[Command], Command]:
    """An argument for a file that a command reads. The command checks whether it is readable."""
    return click.argument(name, type=_PATH)


def file_option(
    *names: str,
    required: bool = False,
    metavar: str = "FILE",
    help: str,  # noqa: A002 - as in click
    **more: Any,
) -> Callable[[Command], Command]:
    """An option for a file or folder.

    Args:
        *names: Names of the option, as in click.
        required: Whether the option must be given.
        metavar: Name of the value in help texts.
        help: Help text.
        **more: Further arguments of ``click.option``.
    """
    return click.option(*names, type=_PATH, metavar=metavar, required=required, help=help, **more)


# -- options of the form KEY=VALUE -------------------------------------------------------------

_PYTHON_WORDS = {"True": True, "False": False, "None": None}


def as_options(
    ctx: click.Context, param: click.Parameter, pairs: tuple[str, ...]
) -> dict[str, Any]:
    """Parse KEY=VALUE pairs: ``{"max_autotune": True}`` for ``("max_autotune=true",)``.

    It is a ``callback`` of click. A value is JSON, or Python's True, False or None, or else text.

    Raises:
        click.BadParameter: A pair is not of the form KEY=VALUE, or a key is given twice.
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
    # JSON does not know these words, and as a text "False" would count as true.
    if text in _PYTHON_WORDS:
        return _PYTHON_WORDS[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


# -- options for settings: ``--config``, ``--set``, and rules for weights ----------------------

_SIDE = "_side_"
"""Text between the letter of a side and the name of a rule, in names of parameters."""
_DIM = re.compile(r"(?:@(-?\d+))?(@T)?$")


def _settings(ctx: click.Context) -> CommandSettings:
    session = ctx.find_object(Session)
    return session.settings if session is not None else CommandSettings()


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
    """Store a rule whose value needs no parsing."""
    if value is not None:
        settings = _settings(ctx)
        # ``diff`` has each rule three times: for both sides, for A and for B.
        side, _, field = str(param.name).rpartition(_SIDE)
        (settings.side_rules[side] if side else settings.rules)[field] = value


def _set_list(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> None:
    """Store a rule that is a list."""
    # click passes an empty tuple for an option that was not given.
    _set_rule(ctx, param, list(given) or None)


def _set_patterns(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> None:
    """Store a rule that is a list of regular expressions."""
    for text in given:
        try:
            re.compile(text)
        except re.error as exc:
            message = f"{text!r} cannot be used: it is not a regular expression: {exc}."
            raise click.BadParameter(message, ctx, param) from exc
    _set_rule(ctx, param, list(given) or None)


def _fields_of_rename(text: str) -> dict[str, Any] | None:
    pattern, equals, to = text.rpartition("=")  # a pattern may contain (?=...)
    return {"pattern": pattern, "to": to} if equals and pattern else None


def _fields_of_pack(text: str) -> dict[str, Any] | None:
    into, equals, rest = text.partition("=")
    how = _DIM.search(rest)
    dim, turned = how.groups() if how else (None, None)
    # An @ that is left in a part is a misspelt suffix, such as @t.
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
    """An option that can be repeated; each value is one rule.

    Args:
        names: Flag of the option, and name of its parameter.
        kind: Class of the rule.
        form: Syntax of a rule, for help and errors.
        fields_of: Function that parses a text into the fields of a rule; it returns None for a text
            of another form.
        about: Help text.
    """

    def store(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> None:
        rules = []
        for text in given:
            fields = fields_of(text)
            if fields is None:
                raise click.BadParameter(f"{text!r} is not of the form {form}.", ctx, param)
            rules.append(_validated(ctx, param, text, kind, **fields))
        _set_rule(ctx, param, rules or None)

    return acting_option(*names, metavar=form, multiple=True, callback=store, help=about)


def _validated(
    ctx: click.Context, param: click.Parameter, text: str, kind: type[BaseModel], **fields: Any
) -> dict[str, Any]:
    """A rule as plain data.

    Raises:
        click.BadParameter: Fields of the rule are invalid; gives the reason for each.
    """
    try:
        # plain data, because it is merged with a file before ``Config`` checks all of it
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
        help="Read settings, fields of refitkit.Config, from a .toml or .json file. Flags override "
        "them.",
    ),
    acting_option(
        "--set",
        metavar="PLUGIN.KEY=JSON",
        multiple=True,
        callback=_set_plugins,
        help="Set a setting of a plugin. Can be repeated.",
    ),
)


def _rules(side: str = "") -> tuple[Callable[[Command], Command], ...]:
    """Options for all rules, for all weights or for one side of a comparison.

    Args:
        side: Letter of the side; empty: all weights.
    """

    def named(flag: str, field: str = "") -> tuple[str, str]:
        field = field or flag
        return (f"--{side}-{flag}", f"{side}{_SIDE}{field}") if side else (f"--{flag}", field)

    def about(flag: str, text: str) -> str:
        return f"Like --{flag}, for {side.upper()} only." if side else text

    return (
        acting_option(
            *named("subtree"),
            metavar="PREFIX",
            callback=_set_rule,
            help=about(
                "subtree", "Use only weights whose names begin with PREFIX, and remove the prefix."
            ),
        ),
        acting_option(
            *named("ignore"),
            metavar="PATTERN",
            multiple=True,
            callback=_set_patterns,
            help=about(
                "ignore",
                r"Leave out weights whose whole name matches, such as 'lm_head\..*'. Can be "
                "repeated.",
            ),
        ),
        _rules_option(
            named("rename"),
            Rename,
            "PATTERN=TO",
            _fields_of_rename,
            about(
                "rename",
                r"Rename weights whose whole name matches, such as 'encoder\.(.*)=\1'. Can be "
                "repeated; the first match counts.",
            ),
        ),
        _rules_option(
            named("pack"),
            Pack,
            "INTO=PART,PART[@DIM][@T]",
            _fields_of_pack,
            about(
                "pack",
                "Join parts into one weight, end to end or stacked in a dimension (default: 0), or "
                "split one weight into parts: "
                "'{}.qkv.weight={}.q.weight,{}.k.weight,{}.v.weight'. A * stands for the numbers "
                "from 0; @T: the joined weight has the parts transposed. Can be repeated.",
            ),
        ),
        acting_option(
            *named("family", "families"),
            type=click.Choice(list(FAMILIES)),
            multiple=True,
            callback=_set_list,
            help=about(
                "family",
                "Use the predefined --pack rules of a family of models. Can be repeated.",
            ),
        ),
        acting_option(
            *named("cast"),
            # No click default: an option that is not given must not override the file.
            type=click.Choice(["no", "lossless", "any"]),
            callback=_set_rule,
            help=about(
                "cast",
                "Whether to cast weights of other dtypes; lossless: only if no value changes.  "
                "[default: no]",
            ),
        ),
    )


def config_options(command: Command) -> Command:
    """Give a command the acting options ``--config`` and ``--set``."""
    return with_options(command, *_CONFIG)


def weight_options(command: Command) -> Command:
    """Give a command that reads weights ``config_options`` and one option for each rule.

    ``Config.rules`` documents the rules.
    """
    return with_options(command, *_CONFIG, *_rules())


def side_options(command: Command) -> Command:
    """Give a command that compares two sets of weights the options for rules of one side each."""
    return with_options(command, *_rules("a"), *_rules("b"))
