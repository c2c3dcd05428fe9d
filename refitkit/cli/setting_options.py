"""The options that settings come by: ``--config``, ``--set``, and rules for weights."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from refitkit.cli.options import Command, as_options, file_option
from refitkit.cli.session import Session
from refitkit.cli.settings import Settings
from refitkit.model.rules import Pack, Rename

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import BaseModel

_DIM = re.compile(r"@(-?\d+)$")


def config_options(command: Command) -> Command:
    """Give a command ``--config`` and ``--set``; both work by themselves."""
    for add in (_set, _config):
        command = add(command)
    return command


def weight_options(command: Command) -> Command:
    """Give a command that reads weights all settings; see ``Config.rules`` for what rules do."""
    for add in (_cast, _pack, _rename, _subtree, config_options):
        command = add(command)
    return command


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
        _settings(ctx).rules[str(param.name)] = value


def _set_renames(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> None:
    made = []
    for text in given:
        pattern, equals, to = text.rpartition("=")  # patterns may have (?=...)
        if not equals or not pattern:
            raise click.BadParameter(f"{text!r} is not of the form PATTERN=TO.", ctx, param)
        made.append(_valid(ctx, param, text, Rename, pattern=pattern, to=to))
    _set_rule(ctx, param, made or None)


def _set_packs(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> None:
    made = []
    for text in given:
        into, equals, rest = text.partition("=")
        dim = _DIM.search(rest)
        parts = (rest[: dim.start()] if dim else rest).split(",")
        if not equals or not into or not all(parts) or "@" in "".join(parts):
            message = f"{text!r} is not of the form INTO=PART,PART[@DIM]."
            raise click.BadParameter(message, ctx, param)
        fields = {"into": into, "parts": parts, "dim": int(dim[1]) if dim else 0}
        made.append(_valid(ctx, param, text, Pack, **fields))
    _set_rule(ctx, param, made or None)


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


_config = file_option(
    "--config",
    metavar="FILE",
    callback=_read_config,
    expose_value=False,
    help="Settings in a .toml or .json file, by fields of refitkit.Config; flags win over it.",
)
_set = click.option(
    "--set",
    metavar="PLUGIN.KEY=JSON",
    multiple=True,
    callback=_set_plugins,
    expose_value=False,
    help="A setting of a plugin. Can be given several times.",
)
_subtree = click.option(
    "--subtree",
    metavar="PREFIX",
    callback=_set_rule,
    expose_value=False,
    help="Use only weights whose names begin so, without it.",
)
_rename = click.option(
    "--rename",
    metavar="PATTERN=TO",
    multiple=True,
    callback=_set_renames,
    expose_value=False,
    help=r"Rename weights whose whole names match: 'encoder\.(.*)=\1'. Can be given several "
    "times; the first that matches counts.",
)
_pack = click.option(
    "--pack",
    metavar="INTO=PART,PART[@DIM]",
    multiple=True,
    callback=_set_packs,
    expose_value=False,
    help="Put parts in one piece, end to end in a dimension (0): "
    "'{}.qkv.weight={}.q.weight,{}.k.weight,{}.v.weight'. Can be given several times.",
)
_cast = click.option(
    "--cast",
    type=click.Choice(["no", "lossless", "any"]),
    callback=_set_rule,
    expose_value=False,
    help="Cast weights of other dtypes: where every value stays what it is, or any.  [default: no]",
)
