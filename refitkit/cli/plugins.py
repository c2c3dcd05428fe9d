"""``refitkit plugins``: who takes part; checking plugins, and making new ones."""

from __future__ import annotations

import keyword
import os
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import click

from refitkit import __version__
from refitkit.cli.known import BROKEN, IN_USE, SWITCHED_OFF, all_plugins, known_names
from refitkit.cli.options import common_options, file_option
from refitkit.cli.session import Session
from refitkit.cli.tables import duration, shown, table
from refitkit.errors import ConfigError, PluginError, RefitError
from refitkit.host import make_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from importlib.resources.abc import Traversable

    from rich.console import Console

    from refitkit.cli.known import KnownPlugin


# MERGED plugins_check: ``refitkit plugins check``: whether a plugin keeps its contracts, without
# a test file.

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
    session.result(data, lambda console: _print_checks(console, checks, ok=ok))
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


def _print_checks(console: Console, checks: list[Check], *, ok: bool) -> None:
    rows = [(one.suite, one.check, one.outcome, duration(one.seconds)) for one in checks]
    console.print(table(("suite", "check", "outcome", "time"), rows))
    for one in checks:
        if one.outcome not in {"passed", "skipped"}:
            console.print(f"{one.suite} {one.check}: {one.outcome}\n  {one.message}\n")
    counts = Counter(one.outcome for one in checks)
    told = ", ".join(f"{number} {outcome}" for outcome, number in counts.most_common())
    console.print(f"{'ok' if ok else 'not ok'}: {told}")


# MERGED plugins_static: What can be said of a plugin from outside: registration, names of offers,
# imports.

SUITE = "registration"
_HEAVY = ("torch", "numpy", "tensorrt", "torch_tensorrt", "transformers")
"""Packages that nobody should wait for who only asks for ``refitkit --help``."""

_NAMED: Mapping[str, tuple[str, ...]] = {
    "refitkit_layer_types": (),
    "refitkit_mapping_strategies": (),
    "refitkit_verifiers": (),
    "refitkit_weight_transforms": ("config",),
}
"""Hooks whose results have names of their own, with their arguments."""

_PROBE = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(" ".join(name for name in sys.argv[2:] if name in sys.modules))
"""


@dataclass(frozen=True)
class Check:
    """What became of one check; fields as in ``refitkit.testing.check.CheckResult``.

    Attributes:
        suite: What it belongs to.
        check: Its name.
        outcome: ``passed``, ``failed``, ``skipped``, ``missing`` or ``deprecated``.
        message: Why, and what to do.
        seconds: Wall-clock time.
    """

    suite: str
    check: str
    outcome: str
    message: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return asdict(self)


def static_checks(session: Session, plugin: KnownPlugin) -> Iterator[Check]:
    """Checks that need neither pytest nor anything of the plugin's but the plugin itself.

    Args:
        session: The run of the command line.
        plugin: The plugin; it may be broken, and then this says why, and no more.
    """
    if plugin.state == BROKEN:
        yield Check(SUITE, "hooks_and_arguments", "failed", plugin.problem)
        return
    yield Check(SUITE, "hooks_and_arguments", "passed")
    yield _deprecated(session, plugin)
    yield _timed("names_of_offers", lambda: _unnamed(session, plugin))
    if plugin.origin == "explicit":
        yield Check(SUITE, "light_import", "skipped", "it was given as an object, not imported")
    else:
        yield _timed("light_import", lambda: _heavy(plugin))


def _timed(name: str, find: Callable[[], str]) -> Check:
    began = time.perf_counter()
    wrong = find()
    return Check(SUITE, name, "failed" if wrong else "passed", wrong, time.perf_counter() - began)


def _deprecated(session: Session, plugin: KnownPlugin) -> Check:
    """Register everybody once more, and hear what the host warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecationWarning)
        make_host(session.config(), session.plugins, on_broken=lambda _: None)
    said = [str(one.message) for one in caught if f"plugin {plugin.name!r} " in str(one.message)]
    return Check(SUITE, "arguments_that_stay", "deprecated" if said else "passed", "\n".join(said))


def _unnamed(session: Session, plugin: KnownPlugin) -> str:
    """What is wrong with the names of what it offers: none, or taken by another plugin."""
    given = {"config": session.config()}
    for hook, arguments in _NAMED.items():
        if hook in plugin.hooks:
            try:
                session.host.offers(hook, **{name: given[name] for name in arguments})
            except PluginError as exc:
                if repr(plugin.name) in str(exc):
                    return str(exc)
            except RefitError as exc:
                return f"{hook}: {exc}"
    return ""


def _heavy(plugin: KnownPlugin) -> str:
    """What importing the plugin imports that it should not, found in a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(  # noqa: S603 - our own probe, and the plugin that was asked for
        [sys.executable, "-P", "-c", _PROBE, plugin.module, *_HEAVY],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        return f"Importing {plugin.module} alone fails: {done.stderr.strip().splitlines()[-1]}"
    loaded = done.stdout.split()
    if not loaded:
        return ""
    return (
        f"Importing {plugin.module} imports {', '.join(loaded)}, which everybody waits for who "
        "starts refitkit: import what is heavy inside the hooks."
    )


# MERGED plugins_new: ``refitkit plugins new``: a project for a plugin, which works as it is.

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_SUFFIX = ".tmpl"
_PACKAGE = "package"
"""The folder of the template that gets the name of the new package."""


@click.command("new", short_help="Make a project for a new plugin.")
@click.argument("name")
@file_option("--path", metavar="DIR", help="Where to put it; a folder NAME here by default.")
@common_options
@click.pass_obj
def new_command(session: Session, name: str, path: Path | None) -> None:
    """Make a project for a new plugin NAME, in a folder of its own.

    It has a weight source, a check and a mapping strategy that work, tests, and refitkit's
    conformance suites, and can be built and installed as it is.
    """
    package = _package_for(session, name)
    folder = path or Path(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{str(folder)!r} exists, and is no empty folder.", hint="Use --path.")
    values = {"name": name, "package": package, "version": __version__}
    written = []
    for place, text in _template():
        target = folder / place.replace(f"/{_PACKAGE}/", f"/{package}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(Template(text).substitute(values), encoding="utf-8")
        written.append(target.relative_to(folder).as_posix())
    data = {"plugin": name, "package": package, "path": str(folder), "files": sorted(written)}
    session.result(data, lambda console: _print_made(console, name, folder))


def _package_for(session: Session, name: str) -> str:
    """The name of the package.

    Raises:
        ConfigError: The name is none for a plugin, or is taken.
    """
    hint = "Use lower-case letters, digits and single hyphens, such as 'my-plugin'."
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name for a plugin.", hint=hint)
    package = name.replace("-", "_")
    if name in known_names(session.plugins):
        raise ConfigError(f"There is a plugin {name!r} already.", hint="Choose another name.")
    if keyword.iskeyword(package) or find_spec(package) is not None:
        raise ConfigError(
            f"A package {package!r} would hide something of Python, or that is installed.",
            hint="Choose another name.",
        )
    return package


def _template() -> Iterator[tuple[str, str]]:
    """Places and texts of all files of the template."""
    yield from _files_in(files("refitkit.cli") / "templates" / "plugin", "")


def _files_in(folder: Traversable, before: str) -> Iterator[tuple[str, str]]:
    for one in folder.iterdir():
        if one.is_dir():
            yield from _files_in(one, f"{before}{one.name}/")
        elif one.name.endswith(_SUFFIX):
            yield before + one.name.removesuffix(_SUFFIX), one.read_text(encoding="utf-8")


def _print_made(console: Console, name: str, folder: Path) -> None:
    console.print(f"The plugin {name!r} is in {shown(folder)}. Next:\n")
    console.print(f"  cd {shown(folder)}")
    console.print("  python -m pip install -e '.[test]'")
    console.print(f"  python -m pytest\n  refitkit plugins check {name}")


@click.group("plugins", invoke_without_command=True, short_help="List, check and make plugins.")
@common_options
@click.pass_context
def plugins_group(ctx: click.Context) -> None:
    """List the plugins in use, check one, or make a new one. Alone it lists them."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_plugins)


@plugins_group.command("list")
@common_options
@click.pass_obj
def list_plugins(session: Session) -> None:
    """List all plugins: where they come from, and the hooks that they implement.

    Those that are switched off are listed too, and those that are broken, with the reason; what
    they would do, other commands refuse to do without.
    """
    plugins = all_plugins(session)
    for one in plugins:
        if one.state == BROKEN:
            session.warn(one.problem)
    data = {"plugins": [asdict(one) for one in plugins]}
    session.result(data, lambda console: print_plugins(console, plugins))


def print_plugins(console: Console, plugins: list[KnownPlugin]) -> None:
    """Print a table of plugins."""
    columns = ("name", "state", "origin", "module", "hooks")
    rows = [
        (one.name, one.state, one.origin, one.module, "\n".join(_short(one))) for one in plugins
    ]
    console.print(table(columns, rows))


def _short(plugin: KnownPlugin) -> list[str]:
    """Hooks without the prefix that all of them have, with their kinds."""
    return [f"{hook.removeprefix('refitkit_')} ({kind})" for hook, kind in plugin.hooks.items()]


plugins_group.add_command(check_command)
plugins_group.add_command(new_command)
