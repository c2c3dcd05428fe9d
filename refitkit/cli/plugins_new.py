"""``refitkit plugins new``: a project for a plugin, which works as it is."""

from __future__ import annotations

import keyword
import re
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import click

from refitkit import __version__
from refitkit.cli.known import known_names
from refitkit.cli.options import common_options, file_option
from refitkit.cli.text import shown
from refitkit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.resources.abc import Traversable

    from rich.console import Console

    from refitkit.cli.session import Session

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
    session.result(data, lambda console: _print(console, name, folder))


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


def _print(console: Console, name: str, folder: Path) -> None:
    console.print(f"The plugin {name!r} is in {shown(folder)}. Next:\n")
    console.print(f"  cd {shown(folder)}")
    console.print("  python -m pip install -e '.[test]'")
    console.print(f"  python -m pytest\n  refitkit plugins check {name}")
