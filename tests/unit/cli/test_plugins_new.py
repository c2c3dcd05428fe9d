"""``refitkit plugins new``: what is made, and what is refused.

That it builds, installs and passes its tests is tried by ``scripts/plugin_wheels.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING

import pytest

import refitkit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.cli.conftest import Outcome

FILES = [
    "README.md",
    "pyproject.toml",
    "src/my_own_plugin/__init__.py",
    "src/my_own_plugin/check.py",
    "src/my_own_plugin/conformance.py",
    "src/my_own_plugin/source.py",
    "src/my_own_plugin/strategy.py",
    "tests/test_conformance.py",
    "tests/test_plugin.py",
]


@pytest.fixture
def project(run: Callable[..., Outcome], tmp_path: Path) -> Path:
    folder = tmp_path / "some" / "where"
    assert run("plugins", "new", "my-own-plugin", "--path", folder).code == 0
    return folder


def test_the_result_says_what_was_made(run: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = run("plugins", "new", "my-own-plugin", "--path", tmp_path / "it", "--json")
    assert outcome.code == 0
    made = {
        "plugin": "my-own-plugin",
        "package": "my_own_plugin",
        "path": str(tmp_path / "it"),
        "files": FILES,
    }
    assert outcome.data == made
    there = [path for path in (tmp_path / "it").rglob("*") if path.is_file()]
    assert sorted(path.relative_to(tmp_path / "it").as_posix() for path in there) == FILES


def test_without_a_path_it_is_a_folder_of_its_name(
    run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run("plugins", "new", "my-own-plugin")
    assert outcome.code == 0
    assert "cd my-own-plugin" in outcome.out
    assert (tmp_path / "my-own-plugin" / "pyproject.toml").exists()


def test_nothing_of_the_template_is_left(project: Path) -> None:
    for name in FILES:
        text = (project / name).read_text()
        assert "$name" not in text
        assert "$package" not in text
        assert "$$" not in text


def test_the_project_is_a_plugin_of_this_refitkit(project: Path) -> None:
    found = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert found["name"] == "my-own-plugin"
    assert f"refitkit>={refitkit.__version__}" in found["dependencies"]
    assert found["entry-points"]["refitkit"] == {"my-own-plugin": "my_own_plugin"}
    suites = {"my-own-plugin": "my_own_plugin.conformance:SUITES"}
    assert found["entry-points"]["refitkit.conformance"] == suites


@pytest.mark.parametrize("command", [("check",), ("format", "--check")])
def test_it_passes_the_defaults_of_ruff(project: Path, command: tuple[str, ...]) -> None:
    ruff = [sys.executable, "-m", "ruff", *command, "--isolated", "--no-cache", "."]
    done = subprocess.run(ruff, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_its_conformance_suites_pass(project: Path) -> None:
    """They import public modules of refitkit, which may be renamed."""
    pytest_run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
    done = subprocess.run(
        [*pytest_run, "tests/test_conformance.py"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(project / "src"), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


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
