"""``refitkit plugins check``: whether a plugin keeps its contracts, without a test file."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from refitkit.cli.known import IN_USE, SWITCHED_OFF, all_plugins
from refitkit.cli.options import common_options
from refitkit.cli.plugins_static import Check, static_checks
from refitkit.cli.session import Session
from refitkit.cli.tables import table
from refitkit.cli.text import duration
from refitkit.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from refitkit.cli.known import KnownPlugin

_NOT_ENOUGH = frozenset({"missing", "deprecated"})
"""Outcomes that are no failure, and no success either: ``--strict`` refuses them."""


@click.command("check", short_help="Check that a plugin keeps its contracts.")
@click.argument("name")
@click.option("--strict", is_flag=True, help="Fail where a suite is missing or a use deprecated.")
@common_options
@click.pass_context
def check_command(ctx: click.Context, name: str, strict: bool) -> None:  # noqa: FBT001 - click's
    """Check the installed plugin NAME: its hooks, what it offers, and its own conformance suites.

    Runs code of the plugin. Needs pytest: pip install 'refitkit[testing]'. Exits with 1 if a check
    failed.
    """
    session = ctx.ensure_object(Session)
    plugin = _found(session, name)
    session.progress.say(f"checking {name}")
    checks = list(static_checks(session, plugin))
    if plugin.state == IN_USE:
        checks += _conformance(session, name)
    bad = [one for one in checks if one.outcome == "failed"]
    lacking = [one for one in checks if one.outcome in _NOT_ENOUGH]
    ok = not bad and not (strict and lacking)
    data = {"plugin": name, "ok": ok, "checks": [one.as_dict() for one in checks]}
    session.result(data, lambda console: _print(console, checks, ok=ok))
    ctx.exit(0 if ok else 1)


def _found(session: Session, name: str) -> KnownPlugin:
    """The plugin of this name; a broken one, if there is one.

    Raises:
        ConfigError: There is none, or it is switched off.
    """
    plugins = all_plugins(session)
    named = [one for one in plugins if one.name == name]
    if not named:
        there = ", ".join(sorted({one.name for one in plugins}))
        raise ConfigError(f"There is no plugin {name!r}.", hint=f"There are: {there}.")
    if all(one.state == SWITCHED_OFF for one in named):
        hint = "Leave out --no-plugin, and look at the environment variable REFITKIT_NO_PLUGIN."
        raise ConfigError(f"The plugin {name!r} is switched off.", hint=hint)
    return next((one for one in named if one.state != IN_USE), named[0])


def _conformance(session: Session, name: str) -> list[Check]:
    from refitkit.testing.check import run

    return [Check(**one.model_dump()) for one in run(name, session.host)]


def _print(console: Console, checks: list[Check], *, ok: bool) -> None:
    rows = [(one.suite, one.check, one.outcome, duration(one.seconds)) for one in checks]
    console.print(table(("suite", "check", "outcome", "time"), rows))
    for one in checks:
        if one.outcome not in {"passed", "skipped"}:
            console.print(f"{one.suite} {one.check}: {one.outcome}\n  {one.message}\n")
    counts = Counter(one.outcome for one in checks)
    told = ", ".join(f"{number} {outcome}" for outcome, number in counts.most_common())
    console.print(f"{'ok' if ok else 'not ok'}: {told}")
