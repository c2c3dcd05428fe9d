"""``refitkit plugins new``: what is made, and what is refused.

``scripts/plugin_wheels.py`` builds and installs each kind, and runs all of its README.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING

import pytest

import refitkit
from refitkit.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from tests.unit.cli.conftest import Outcome

NAME, PACKAGE = "my-own-plugin", "my_own_plugin"
MODULES = {
    "source": ("conformance", "source"),
    "transform": ("conformance", "transform"),
    "strategy": ("conformance", "strategy"),
    "verifier": ("conformance", "verifier"),
    "backend": ("backend", "conformance", "engine"),
    "listener": ("listener",),
    "command": ("command",),
}
"""The modules of each kind, but ``__init__``."""
COMMON = ("README.md", "pyproject.toml", "tests/test_conformance.py", "tests/test_plugin.py")
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
EVERY = pytest.mark.parametrize("kind", MODULES)


def files_of(kind: str) -> list[str]:
    modules = ("__init__", *MODULES[kind])
    return sorted([*COMMON, *(f"src/{PACKAGE}/{name}.py" for name in modules)])


def code_lines(path: Path) -> int:
    """Lines that are neither empty, comments nor docstrings."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            node.body[:1] = [] if node.body[1:] else [ast.Pass()]
    return sum(bool(line) for line in ast.unparse(tree).splitlines())


def project_of(kind: str, run: Callable[..., Outcome], folder: Path, name: str = NAME) -> Path:
    assert run("plugins", "new", name, "--kind", kind, "--path", folder).code == 0
    return folder


def installed_in(folder: Path) -> Path:
    """The source folder of a project, with metadata as if it was installed there."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / "src" / f"{project['name'].replace('-', '_')}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n"
    )
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder / "src"


def python(*args: str, cwd: Path, paths: Iterable[Path]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), *sys.path])}
    command = [sys.executable, *args]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@EVERY
def test_the_result_says_what_was_made(
    run: Callable[..., Outcome], tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "some" / "where"
    outcome = run("plugins", "new", NAME, "--kind", kind, "--path", folder, "--json")
    assert outcome.code == 0
    assert outcome.data == {
        "plugin": NAME,
        "kind": kind,
        "package": PACKAGE,
        "path": str(folder),
        "files": files_of(kind),
    }
    there = [path for path in folder.rglob("*") if path.is_file()]
    assert sorted(path.relative_to(folder).as_posix() for path in there) == files_of(kind)


def test_without_options_it_is_a_source_in_a_folder_of_its_name(
    run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run("plugins", "new", NAME)
    assert outcome.code == 0
    assert f"cd {NAME}" in outcome.out
    for name in files_of("source"):
        assert (tmp_path / NAME / name).exists()


def test_an_unknown_kind_is_refused(run: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = run("plugins", "new", NAME, "--kind", "adapter", "--path", tmp_path / "it")
    assert outcome.code == 2
    for kind in MODULES:
        assert kind in outcome.err
    assert not (tmp_path / "it").exists()


@EVERY
def test_nothing_of_the_template_is_left(
    run: Callable[..., Outcome], tmp_path: Path, kind: str
) -> None:
    project = project_of(kind, run, tmp_path / "it")
    for name in files_of(kind):
        text = (project / name).read_text()
        for left in ("$name", "$package", "$usage", "$suites", "$$", "\n\n\n\n"):
            assert left not in text, name
        assert text.endswith("\n")


@EVERY
def test_the_project_is_a_plugin_of_this_refitkit(
    run: Callable[..., Outcome], tmp_path: Path, kind: str
) -> None:
    project = project_of(kind, run, tmp_path / "it")
    found = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert found["name"] == NAME
    assert f"refitkit>={refitkit.__version__}" in found["dependencies"]
    entries = found["entry-points"]
    assert entries["refitkit"] == {NAME: PACKAGE}
    has_suites = "conformance" in MODULES[kind]
    suites = {NAME: f"{PACKAGE}.conformance:SUITES"} if has_suites else None
    assert entries.get("refitkit.conformance") == suites


@EVERY
def test_it_needs_exactly_what_it_imports(
    run: Callable[..., Outcome], tmp_path: Path, kind: str
) -> None:
    project = project_of(kind, run, tmp_path / "it")
    found = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    imported = set()
    for path in (project / "src" / PACKAGE).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    # pytest comes with the extra: only suites import it, and an annotation needs no package
    foreign = imported - sys.stdlib_module_names - {PACKAGE, "pytest"}
    if kind == "listener":
        foreign.discard("torch")
    named = {re.split(r"[><=]", one)[0] for one in found["dependencies"]}
    assert named == foreign


@EVERY
def test_it_imports_only_public_modules(
    run: Callable[..., Outcome], tmp_path: Path, kind: str
) -> None:
    project = project_of(kind, run, tmp_path / "it")
    public = {"errors", "model", "recipe", "program", "config", "hookspecs", "protocols"}
    public |= {"testing", "cli.api"}
    for path in project.rglob("*.py"):
        for name in re.findall(r"from refitkit\.([\w.]+) import", path.read_text()):
            assert name in public or name.startswith("testing."), (path, name)


@EVERY
def test_it_is_small(run: Callable[..., Outcome], tmp_path: Path, kind: str) -> None:
    """Without its suites. A backend is four objects, and no smaller one keeps its contracts."""
    project = project_of(kind, run, tmp_path / "it")
    modules = [project / "src" / PACKAGE / f"{name}.py" for name in ("__init__", *MODULES[kind])]
    lines = sum(code_lines(path) for path in modules if path.stem != "conformance")
    assert 10 <= lines <= (200 if kind == "backend" else 120)


@EVERY
@pytest.mark.parametrize("command", [("check",), ("format", "--check")])
def test_it_passes_the_defaults_of_ruff(
    run: Callable[..., Outcome], tmp_path: Path, command: tuple[str, ...], kind: str
) -> None:
    project = project_of(kind, run, tmp_path / "it")
    ruff = [sys.executable, "-m", "ruff", *command, "--isolated", "--no-cache", "."]
    done = subprocess.run(ruff, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A project of each kind, with metadata as if all were installed together."""
    folder = tmp_path_factory.mktemp("projects")
    made = {}
    for kind in MODULES:
        made[kind] = folder / kind
        arguments = ["plugins", "new", f"new-{kind}", "--kind", kind, "--path", str(made[kind])]
        assert main(arguments) == 0
        installed_in(made[kind])
    return made


def test_their_tests_pass_while_all_are_installed(projects: dict[str, Path]) -> None:
    """One run, because each would import torch. They include refitkit's conformance suites."""
    options = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", os.devnull)
    tests = [str(project / "tests") for project in projects.values()]
    sources = [project / "src" for project in projects.values()]
    done = python("-m", "pytest", *options, *tests, cwd=projects["source"], paths=sources)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@EVERY
def test_plugins_check_passes(projects: dict[str, Path], kind: str) -> None:
    arguments = ("-m", "refitkit.cli", "plugins", "check", f"new-{kind}", "--strict")
    done = python(*arguments, cwd=projects[kind], paths=[projects[kind] / "src"])
    assert done.returncode == 0, done.stdout
    suites = {line.split()[0] for line in done.stdout.splitlines() if " passed " in line}
    expected = {"backend": 2, "listener": 0, "command": 0}.get(kind, 1)
    assert len([name for name in suites if name.startswith("Test")]) == expected


@pytest.mark.parametrize("kind", ["source", "backend"])
def test_the_python_of_its_readme_prints_what_it_says(
    projects: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Of the kinds whose example compiles nothing; ``plugin_wheels.py`` runs the others."""
    (code,) = PYTHON.findall((projects[kind] / "README.md").read_text())
    done = python("-c", code, cwd=tmp_path, paths=[projects[kind] / "src"])
    assert done.returncode == 0, done.stderr
    said = [line.removeprefix("# ") for line in code.splitlines() if line.startswith("# ")]
    assert done.stdout.splitlines() == said


COUNT_READS = """
import os, sys, zipfile
from pathlib import Path
import numpy as np

class Counting(zipfile.ZipFile):
    read = 0

    def _RealGetContents(self):
        Counting.read += 1
        return super()._RealGetContents()

def descriptors():
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum("big.npz" in os.readlink(link) for link in links if os.path.lexists(link))

np.savez("big.npz", **{str(n): np.full(3, n) for n in range(int(sys.argv[1]))})
zipfile.ZipFile = Counting
from new_source.source import NpzFile

source = NpzFile(Path("big.npz"))
assert all(int(source.get(name)[0]) == int(name) for name in source.names())
print(Counting.read, descriptors())
del source
print(descriptors())
"""


@pytest.mark.parametrize("entries", ["1", "50"])
def test_the_source_opens_and_indexes_its_file_once(
    projects: dict[str, Path], tmp_path: Path, entries: str
) -> None:
    """And closes it when it is dropped. It read the whole index again for each entry."""
    done = python("-c", COUNT_READS, entries, cwd=tmp_path, paths=[projects["source"] / "src"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "1", "0"]


@pytest.mark.parametrize(
    "name", ["My-Plugin", "my_plugin", "-x", "x-", "a--b", "1a", "", "a b", "../x", "x/y"]
)
def test_what_is_no_name(run: Callable[..., Outcome], tmp_path: Path, name: str) -> None:
    outcome = run("plugins", "new", "--path", tmp_path / "it", "--", name)
    assert outcome.code == 2
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize("name", ["weights", "cli", "torch", "json", "class"])
def test_names_that_are_taken(run: Callable[..., Outcome], tmp_path: Path, name: str) -> None:
    outcome = run("plugins", "new", name, "--path", tmp_path / "it")
    assert outcome.code == 2
    assert "another name" in outcome.err
    assert not (tmp_path / "it").exists()


def test_nothing_is_overwritten(run: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    outcome = run("plugins", "new", "my-own-plugin", "--path", tmp_path)
    assert outcome.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    file = run("plugins", "new", "my-own-plugin", "--path", tmp_path / "precious.txt")
    assert file.code == 2
