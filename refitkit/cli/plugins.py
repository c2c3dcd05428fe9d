"""``refitkit plugins``: list all plugins, check one, or create the project of a new one.

``plugins list`` and the group come first, then ``plugins check`` with the static checks that need
neither pytest nor a test file, then ``plugins new`` with its template.
"""

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


@click.group("plugins", invoke_without_command=True, short_help="List, check and create plugins.")
@common_options
@click.pass_context
def plugins_group(ctx: click.Context) -> None:
    """List plugins, check one, or create a new one. Without a command, list all plugins."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_plugins)


@plugins_group.command("list", short_help="List all plugins and their hooks.")
@common_options
@click.pass_obj
def list_plugins(session: Session) -> None:
    """List all plugins with their origin, and the hooks that they implement.

    The list includes plugins that are switched off, and broken ones with the reason. Other commands
    refuse to run while a plugin is broken.
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
        (one.name, _state(one), one.origin, one.module, "\n".join(_short(one))) for one in plugins
    ]
    console.print(table(columns, rows))


def _state(plugin: KnownPlugin) -> str:
    """The state; below it, the version that a plugin in use needs. Broken ones have a warning."""
    is_misfit = plugin.problem and plugin.state == IN_USE
    return f"{plugin.state}\n{plugin.problem}" if is_misfit else plugin.state


def _short(plugin: KnownPlugin) -> list[str]:
    """Names of the hooks without their common prefix, with their kinds."""
    return [f"{hook.removeprefix('refitkit_')} ({kind})" for hook, kind in plugin.hooks.items()]


# -- ``plugins check`` -------------------------------------------------------------------------

_STRICT_FAILURES = frozenset({"missing", "deprecated"})
"""Outcomes that are neither success nor failure; ``--strict`` counts them as failures."""


@click.command("check", short_help="Check that a plugin keeps its contracts.")
@click.argument("name")
@click.option(
    "--strict", is_flag=True, help="Fail if a suite is missing, or a deprecated argument is used."
)
@common_options
@click.pass_context
def check_command(ctx: click.Context, name: str, strict: bool) -> None:  # noqa: FBT001 - click's
    """Check the hooks of the plugin NAME, the objects that it offers, and its conformance suites.

    Runs code of the plugin. Needs pytest: pip install 'refitkit[testing]'. Exits with 1 if a check
    fails.
    """
    session = ctx.ensure_object(Session)
    plugin = _plugin_named(session, name)
    session.progress.show(f"checking {name}")
    checks = list(static_checks(session, plugin))
    if plugin.state == IN_USE:
        checks += _conformance(session, name)
    failures = {"failed"} | (_STRICT_FAILURES if strict else frozenset())
    ok = not any(one.outcome in failures for one in checks)
    data = {"plugin": name, "ok": ok, "checks": [one.as_dict() for one in checks]}
    session.result(data, lambda console: _print_checks(console, checks, ok=ok))
    ctx.exit(0 if ok else 1)


def _plugin_named(session: Session, name: str) -> KnownPlugin:
    """The plugin of this name; of several plugins, a broken one.

    Raises:
        ConfigError: There is no such plugin, or it is switched off.
    """
    plugins = all_plugins(session)
    named = [one for one in plugins if one.name == name]
    if not named:
        existing = ", ".join(sorted({one.name for one in plugins}))
        raise ConfigError(f"There is no plugin {name!r}.", hint=f"There are: {existing}.")
    if all(one.state == SWITCHED_OFF for one in named):
        hint = "Leave out --no-plugin, and look at the environment variable REFITKIT_NO_PLUGIN."
        raise ConfigError(f"The plugin {name!r} is switched off.", hint=hint)
    # Two plugins have this name if the second one was refused for it.
    return next((one for one in named if one.state != IN_USE), named[0])


def _conformance(session: Session, name: str) -> list[Check]:
    # Here, because it imports pytest, which is optional.
    from refitkit.testing.check import run

    return [Check(**one.model_dump()) for one in run(name, session.host)]


def _print_checks(console: Console, checks: list[Check], *, ok: bool) -> None:
    rows = [(one.suite, one.check, one.outcome, duration(one.seconds)) for one in checks]
    console.print(table(("suite", "check", "outcome", "time"), rows))
    for one in checks:
        if one.outcome not in {"passed", "skipped"}:
            console.print(f"{one.suite} {one.check}: {one.outcome}\n  {one.message}\n")
    counts = Counter(one.outcome for one in checks)
    summary = ", ".join(f"{number} {outcome}" for outcome, number in counts.most_common())
    console.print(f"{'ok' if ok else 'not ok'}: {summary}")


# -- static checks: registration, names of offers, imports -------------------------------------

SUITE = "registration"
_HEAVY = ("torch", "numpy", "tensorrt", "torch_tensorrt", "transformers")
"""Packages that would slow down ``refitkit --help`` if a plugin imported them."""

_NAMED: Mapping[str, tuple[str, ...]] = {
    "refitkit_layer_types": (),
    "refitkit_mapping_strategies": ("config",),
    "refitkit_verifiers": ("config",),
    "refitkit_weight_transforms": ("config",),
}
"""Hooks that return objects with unique names, and the arguments that they need."""

# Importing in another process, because this one has imported torch already.
_PROBE = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(" ".join(name for name in sys.argv[2:] if name in sys.modules))
"""


@dataclass(frozen=True)
class Check:
    """The result of one check; fields are those of ``refitkit.testing.check.CheckResult``.

    Attributes:
        suite: Name of the suite.
        check: Name of the check.
        outcome: ``passed``, ``failed``, ``skipped``, ``missing`` or ``deprecated``.
        message: Reason for the outcome, and a way to fix it.
        seconds: Wall-clock time of the check.
    """

    suite: str
    check: str
    outcome: str
    message: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The result as plain data, for JSON."""
        return asdict(self)


def static_checks(session: Session, plugin: KnownPlugin) -> Iterator[Check]:
    """Run the checks that need neither pytest nor conformance suites of the plugin.

    Args:
        session: The run of the command line.
        plugin: The plugin. If it is broken, the only results are failures with the reasons.
    """
    if plugin.state == BROKEN:
        # several if two distributions have a plugin of this name
        errors = [one.error for one in session.broken if one.candidate.name == plugin.name]
        yield from (Check(SUITE, "hooks_and_arguments", "failed", str(exc)) for exc in errors)
        return
    # The host has checked these when it registered the plugin.
    yield Check(SUITE, "hooks_and_arguments", "passed")
    yield _versions(session, plugin)
    yield _deprecated(session, plugin)
    yield _timed("names_of_offers", lambda: _naming_error(session, plugin))
    if plugin.origin == "explicit":
        reason = "the plugin was passed as an object, not imported"
        yield Check(SUITE, "light_import", "skipped", reason)
    else:
        yield _timed("light_import", lambda: _heavy_imports(plugin))


def _timed(name: str, find_failure: Callable[[], str]) -> Check:
    began = time.perf_counter()
    failure = find_failure()
    seconds = time.perf_counter() - began
    return Check(SUITE, name, "failed" if failure else "passed", failure, seconds)


def _versions(session: Session, plugin: KnownPlugin) -> Check:
    """Whether the plugin is for this version of refitkit, and which of its hooks are not."""
    if plugin.problem:
        return Check(SUITE, "versions", "failed", f"The plugin {plugin.problem}.")
    infos = (info for info in session.host.plugins() if info.name == plugin.name)
    ignored = [hook for info in infos for hook in info.ignored]
    if not ignored:
        return Check(SUITE, "versions", "passed")
    reason = f"this refitkit does not have the optional hooks {', '.join(ignored)}"
    return Check(SUITE, "versions", "skipped", reason)


def _deprecated(session: Session, plugin: KnownPlugin) -> Check:
    """Register all plugins a second time, to collect the host's deprecation warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecationWarning)
        # a new host: the first one warned before anybody recorded warnings
        make_host(session.config(), session.plugins, on_broken=lambda _: None)
    texts = [str(one.message) for one in caught if f"plugin {plugin.name!r} " in str(one.message)]
    outcome = "deprecated" if texts else "passed"
    return Check(SUITE, "arguments_that_stay", outcome, "\n".join(texts))


def _naming_error(session: Session, plugin: KnownPlugin) -> str:
    """The error if an object that the plugin offers has no name, or one that is taken."""
    given = {"config": session.config()}
    for hook, arguments in _NAMED.items():
        if hook in plugin.hooks:
            try:
                named = {name: given[name] for name in arguments}
                for _ in session.host.named_items(hook, **named):
                    pass  # reading them checks their names
            except PluginError as exc:
                # The error may be about two other plugins.
                if repr(plugin.name) in str(exc):
                    return str(exc)
            except RefitError as exc:
                return f"{hook}: {exc}"
    return ""


def _heavy_imports(plugin: KnownPlugin) -> str:
    """An error if importing the plugin imports heavy packages, found in a new interpreter."""
    # The search path of this process, without its current folder (-P): plugins that run from a
    # source folder are found, and nothing else is.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(  # noqa: S603 - a fixed script, and the plugin that the user named
        [sys.executable, "-P", "-c", _PROBE, plugin.module, *_HEAVY],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        # a process that a signal ended reports nothing
        reason = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
        return f"Importing {plugin.module} alone fails: {reason}"
    loaded = done.stdout.split()
    if not loaded:
        return ""
    return (
        f"Importing {plugin.module} imports {', '.join(loaded)}, which slows down each start of "
        "refitkit: import heavy packages inside the hooks."
    )


# -- ``plugins new`` ---------------------------------------------------------------------------

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_SUFFIX = ".tmpl"
_PACKAGE = "package"
"""Name of the template's folder that is renamed to the new package."""
_USAGE = "usage.md"
"""The part of a README that depends on the kind; it has no file of its own in the project."""
_SUITES = """
# `refitkit plugins check {name}` finds the conformance suites here.
[project.entry-points."refitkit.conformance"]
{name} = "{package}.conformance:SUITES"
"""


@dataclass(frozen=True)
class _Kind:
    """A kind of plugin that ``plugins new`` can create.

    Attributes:
        summary: What the plugin does, after "it".
        dependencies: Packages that it imports, in addition to refitkit.
        files: Its modules and what is in them.
        has_suites: Whether the conformance kit has a suite for what it offers.
    """

    summary: str
    dependencies: tuple[str, ...]
    files: Mapping[str, str]
    has_suites: bool = True


_KINDS: Mapping[str, _Kind] = {
    "source": _Kind(
        "reads weights from `.npz` files of NumPy",
        ("numpy", "torch"),
        {"source.py": "the weight source"},
    ),
    "transform": _Kind(
        "computes float weights from an int8 checkpoint with scales",
        ("numpy", "torch"),
        {"transform.py": "the weight transform"},
    ),
    "strategy": _Kind(
        "computes the table of a custom layer from its new weight",
        ("torch",),
        {"strategy.py": "the layer and the mapping strategy"},
    ),
    "verifier": _Kind(
        "verifies refits by the cosine similarity of outputs",
        ("torch",),
        {"verifier.py": "the verifier"},
    ),
    "backend": _Kind(
        "adds a backend that runs programs with torch",
        ("torch",),
        {"backend.py": "the backend and its modules", "engine.py": "their engine"},
    ),
    "listener": _Kind(
        "logs the counts and durations of refits",
        (),
        {"listener.py": "the totals and the log"},
        has_suites=False,
    ),
    "command": _Kind(
        "adds a command that prints the norm of each weight",
        ("click",),
        {"command.py": "the command"},
        has_suites=False,
    ),
}


@click.command("new", short_help="Create a project for a new plugin.")
@click.argument("name")
@click.option(
    "--kind",
    type=click.Choice(list(_KINDS)),
    default="source",
    show_default=True,
    help="What the plugin adds to refitkit.",
)
@file_option("--path", metavar="DIR", help="Folder of the project.  [default: NAME]")
@common_options
@click.pass_obj
def new_command(session: Session, name: str, kind: str, path: Path | None) -> None:
    """Create a project for a new plugin NAME, in a new folder.

    The project has a small working plugin of one kind, tests, and refitkit's conformance suites. It
    can be built and installed unchanged.
    """
    package = _package_for(session, name)
    folder = path or Path(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{str(folder)!r} exists, and is not an empty folder.", hint="Use --path."
        )
    written = []
    for place, text in _project(kind, name, package):
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        written.append(place)
    data = {
        "plugin": name,
        "kind": kind,
        "package": package,
        "path": str(folder),
        "files": sorted(written),
    }
    session.result(data, lambda console: _print_next_steps(console, name, folder))


def _project(kind: str, name: str, package: str) -> Iterator[tuple[str, str]]:
    """Relative paths and texts of all files of a new project."""
    of_kind = dict(_template(f"kinds/{kind}"))
    values = {"name": name, "package": package}
    values |= _shared_values(_KINDS[kind], values)
    # ``substitute`` raises for a misspelt name in a template; ``safe_substitute`` would not
    values["usage"] = Template(of_kind.pop(_USAGE)).substitute(values).strip()
    for place, text in (*_template("common"), *of_kind.items()):
        yield place.replace(f"/{_PACKAGE}/", f"/{package}/"), Template(text).substitute(values)


def _shared_values(kind: _Kind, named: Mapping[str, str]) -> dict[str, str]:
    """Values of the common files that depend on the kind."""
    dependencies = [*kind.dependencies, f"refitkit>={__version__}"]
    files = {**kind.files, "conformance.py": "refitkit's conformance suites"}
    if not kind.has_suites:
        del files["conformance.py"]
    return {
        "summary": kind.summary,
        "dependencies": ", ".join(f'"{one}"' for one in sorted(dependencies)),
        "suites": _SUITES.format(**named) if kind.has_suites else "",
        "files": "".join(f"; `{file}` has {what}" for file, what in files.items()),
    }


def _package_for(session: Session, name: str) -> str:
    """The name of the Python package for a plugin.

    Raises:
        ConfigError: The name is not valid for a plugin, or is taken.
    """
    hint = "Use lower-case letters, digits and single hyphens, such as 'my-plugin'."
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is not a valid name for a plugin.", hint=hint)
    package = name.replace("-", "_")
    if name in known_names(session.plugins):
        raise ConfigError(f"There is a plugin {name!r} already.", hint="Choose another name.")
    # A package of this name would hide the installed one in the project's environment.
    if keyword.iskeyword(package) or find_spec(package) is not None:
        raise ConfigError(
            f"{package!r} is a keyword of Python, or the name of an installed package.",
            hint="Choose another name.",
        )
    return package


def _template(folder: str) -> Iterator[tuple[str, str]]:
    """Relative paths and texts of all files in a folder of templates."""
    yield from _files_in(files("refitkit.cli").joinpath("templates", *folder.split("/")), "")


def _files_in(folder: Traversable, before: str) -> Iterator[tuple[str, str]]:
    for one in folder.iterdir():
        if one.is_dir():
            yield from _files_in(one, f"{before}{one.name}/")
        elif one.name.endswith(_SUFFIX):
            yield before + one.name.removesuffix(_SUFFIX), one.read_text(encoding="utf-8")


def _print_next_steps(console: Console, name: str, folder: Path) -> None:
    console.print(f"The plugin {name!r} is in {shown(folder)}. Next:\n")
    console.print(f"  cd {shown(folder)}")
    console.print("  python -m pip install -e '.[test]'")
    console.print(f"  python -m pytest\n  refitkit plugins check {name}")


plugins_group.add_command(check_command)
plugins_group.add_command(new_command)
