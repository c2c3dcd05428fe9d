"""Install each plugin under plugins/ as a third party's would be, use it, and take it away again.

usage: python scripts/plugin_wheels.py [--kind KIND ...] [--only-new] [FOLDER ...]

In a fresh environment that sees the packages of the one that runs this, torch for one, and not the
source tree: refitkit's own wheel; then the wheel of each plugin, which has to be found and listed,
to pass refitkit's checks and its own tests, and to be gone once it is uninstalled. Then
``refitkit plugins new`` makes a plugin of each kind. All of them are built and installed together,
their tests run in one process, and then all commands and code of their READMEs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KINDS = ("source", "transform", "strategy", "verifier", "backend", "listener", "command")
_TESTS = "test"  # name of the extra with what tests need
_BLOCKS = re.compile(r"```(console|python)\n(.*?)```", re.DOTALL)
_INSTALL = "python -m pip install"
_ADVICE = re.compile(r"^# (.*)$", re.MULTILINE)


class WrongError(Exception):
    """Something is not as it has to be."""


@dataclass(frozen=True)
class Plugin:
    """A folder with the project of a plugin.

    Attributes:
        folder: It.
        distribution: Name of its distribution.
        name: Name of the plugin: that of its entry point.
        package: The package that is the plugin.
        tested_with: The extra that its tests need; empty where there is none.
    """

    folder: Path
    distribution: str
    name: str
    package: str
    tested_with: str = ""

    @classmethod
    def of(cls, folder: Path) -> Plugin:
        """Read it off its pyproject.toml."""
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        ((name, target),) = project["entry-points"]["refitkit"].items()
        extra = _TESTS if _TESTS in project.get("optional-dependencies", {}) else ""
        return cls(folder, project["name"], name, target.partition(":")[0], extra)


class Environment:
    """A virtual environment that sees another one's packages, and not the source tree."""

    def __init__(self, folder: Path) -> None:
        """Make it: without pip, which works on it from outside."""
        self.folder = folder
        run(sys.executable, "-m", "venv", "--without-pip", str(folder))
        found = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
        (self._site() / "beside.pth").write_text("".join(f"{path}\n" for path in sorted(found)))

    def _site(self) -> Path:
        (site,) = self.folder.glob("lib/python*/site-packages")
        return site

    def install(self, *wheels: Path) -> None:
        """Install wheels; all that they depend on is there."""
        options = ("--quiet", "--no-deps", "--no-index", "--ignore-installed")
        self._pip("install", *options, *map(str, wheels))

    def install_extra(self, wheel: Path, extra: str) -> None:
        """Install what an extra of a wheel asks for beside what is there, as a user would."""
        constraints = str(ROOT / "constraints.txt")
        self._pip("install", "--quiet", "-c", constraints, f"{wheel}[{extra}]")

    def uninstall(self, *distributions: str) -> None:
        """Take distributions away."""
        self._pip("uninstall", "--quiet", "--yes", *distributions)

    def _pip(self, *args: str) -> None:
        python = str(self.folder / "bin" / "python")
        run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, *args)

    def run(self, *command: str, cwd: Path) -> str:
        """Run a command with this environment's programs first; returns what it wrote."""
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        left_out = {"PYTHONPATH", "PYTHONHOME", "REFITKIT_NO_PLUGIN"}
        environment = {k: v for k, v in os.environ.items() if k not in left_out}
        return run(*command, cwd=cwd, env={**environment, "PATH": path})

    def listed(self, cwd: Path) -> dict[str, dict[str, Any]]:
        """What ``refitkit plugins list`` tells, by name."""
        told = json.loads(self.run("refitkit", "plugins", "list", "--json", cwd=cwd))
        return {plugin["name"]: plugin for plugin in told["plugins"]}

    def check_origin(self, package: str, cwd: Path) -> None:
        """Check that a package is imported from here.

        Raises:
            WrongError: It comes from elsewhere.
        """
        code = f"import {package}; print({package}.__file__)"
        place = Path(self.run("python", "-c", code, cwd=cwd).strip())
        if not place.is_relative_to(self.folder):
            raise WrongError(f"{package} is imported from {place}, not from what was installed.")


def run(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command; returns what it wrote to stdout.

    Raises:
        WrongError: It failed; says what it wrote.
    """
    done = subprocess.run(  # noqa: S603 - commands of this file, and of a README of ours
        command, cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        shown = " ".join(command)
        raise WrongError(f"{shown}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def wheel_of(folder: Path, wheels: Path) -> Path:
    """Build the wheel of a project."""
    (wheel,) = wheels_of([folder], wheels)
    return wheel


def wheels_of(folders: list[Path], wheels: Path) -> list[Path]:
    """Build the wheels of some projects."""
    into = Path(tempfile.mkdtemp(dir=wheels))
    options = ("--quiet", "--no-deps", "--wheel-dir", str(into))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", *options, *map(str, folders))
    return sorted(into.glob("*.whl"))


def try_plugin(plugin: Plugin, environment: Environment, scratch: Path) -> None:
    """Install a plugin, use it, and take it away again.

    Raises:
        WrongError: Something is not as it has to be.
    """
    if plugin.name in environment.listed(scratch):
        raise WrongError(f"{plugin.name} is there before it was installed: uninstall it first.")
    wheel = wheel_of(plugin.folder, scratch)
    environment.install(wheel)
    if plugin.tested_with:
        environment.install_extra(wheel, plugin.tested_with)
    check_listed(plugin, environment.listed(scratch))
    environment.run("refitkit", "plugins", "check", plugin.name, cwd=scratch)
    try_tests(plugin, environment, scratch)
    environment.uninstall(plugin.distribution)
    if plugin.name in environment.listed(scratch):
        raise WrongError(f"{plugin.name} is still there after it was uninstalled.")


def check_listed(plugin: Plugin, listed: dict[str, dict[str, Any]]) -> None:
    """Check that a plugin is listed as installed.

    Raises:
        WrongError: It is not.
    """
    found = listed.get(plugin.name)
    if not found or (found["state"], found["distribution"]) != ("in use", plugin.distribution):
        raise WrongError(f"{plugin.name} is not listed as installed: {found}.")


def try_tests(plugin: Plugin, environment: Environment, scratch: Path) -> None:
    """Run the tests of a plugin from a copy, beside which there is no source."""
    copy = scratch / f"tests-of-{plugin.name}"
    shutil.copytree(plugin.folder / "tests", copy / "tests")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(plugin.folder / name, copy)
    for package in ("refitkit", plugin.package):
        environment.check_origin(package, copy)
    options = ("-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile")
    said = environment.run("python", "-m", "pytest", *options, cwd=copy)
    print(f"  {said.strip().splitlines()[-1]}")


def blocks_of(folder: Path) -> list[tuple[str, str]]:
    """The steps of a README, in order: ``console`` with one command, or ``python`` with code."""
    steps = []
    for language, text in _BLOCKS.findall((folder / "README.md").read_text()):
        whole = language == "python"
        steps += [(language, one) for one in ([text] if whole else text.splitlines())]
    return steps


def try_readme(folder: Path, environment: Environment) -> None:
    """Run what a README shows, but for the installation.

    Raises:
        WrongError: A step fails, or code does not print what the comments after it say.
    """
    for language, text in blocks_of(folder):
        if language == "console":
            command = text.removeprefix("$ ")
            if not command.startswith(_INSTALL):
                environment.run("bash", "-c", command, cwd=folder)
            continue
        said = environment.run("python", "-c", text, cwd=folder)
        told = _ADVICE.findall(text.rpartition("print(")[2])
        if said.splitlines() != told:
            raise WrongError(f"{folder.name}: the README says {told}, but the code prints {said}")
    print(f"  {folder.name}: all of its README")


def try_fresh(kinds: list[str], environment: Environment, scratch: Path) -> None:
    """Make a plugin of each kind, install all, run their tests, then what their READMEs show.

    Raises:
        WrongError: Something is not as it has to be.
    """
    folders = [scratch / f"fresh-{kind}" for kind in kinds]
    for kind, folder in zip(kinds, folders, strict=True):
        made = ("plugins", "new", folder.name, "--kind", kind, "--path", str(folder))
        environment.run("refitkit", *made, cwd=scratch)
    plugins = [Plugin.of(folder) for folder in folders]
    environment.install(*wheels_of(folders, scratch))
    listed = environment.listed(scratch)
    for plugin in plugins:
        check_listed(plugin, listed)
        environment.check_origin(plugin.package, scratch)
    tests = scratch / "tests-of-fresh"
    for folder in folders:  # beside which there is no source
        shutil.copytree(folder / "tests", tests / folder.name)
    options = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", os.devnull)
    said = environment.run("python", "-m", "pytest", *options, str(tests), cwd=tests)
    print(f"  {said.strip().splitlines()[-1]}", flush=True)
    for folder in folders:  # one after another: they write to one environment
        ((_, install),) = (step for step in blocks_of(folder) if _INSTALL in step[1])
        environment.run("bash", "-c", install.removeprefix("$ "), cwd=folder)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda folder: try_readme(folder, environment), folders))
    environment.uninstall(*(plugin.distribution for plugin in plugins))
    left = environment.listed(scratch).keys() & {plugin.name for plugin in plugins}
    if left:
        raise WrongError(f"{sorted(left)} are still there after they were uninstalled.")


def main() -> int:
    """Try the plugins in the given folders, or all; then new ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="[plugins/*]")
    parser.add_argument("--kind", action="append", choices=KINDS, help="of new plugins  [all]")
    parser.add_argument("--only-new", action="store_true", help="leave out all folders")
    given = parser.parse_args()
    found = [path.parent for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))]
    folders = [] if given.only_new else given.folders or found
    kinds = given.kind or list(KINDS)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="refitkit-wheels-") as name:
        scratch = Path(name)
        environment = Environment(scratch / "environment")
        environment.install(wheel_of(ROOT, scratch))
        for plugin in map(Plugin.of, folders):
            print(f"{plugin.distribution}: built, installed, used, uninstalled", flush=True)
            try_plugin(plugin, environment, scratch)
        print(f"new {', '.join(kinds)}: made, built, installed, used, uninstalled", flush=True)
        try_fresh(kinds, environment, scratch)
    print(f"all of it in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except WrongError as exc:
        print(exc, file=sys.stderr)
        raise SystemExit(1) from exc
