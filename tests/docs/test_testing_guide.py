"""docs/guides/testing-plugins.md: its files pass, and what it says of the kit is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import refitkit.testing as kit
from refitkit.testing import plugin
from refitkit.testing.check import ATTRIBUTE, GROUP

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/guides/testing-plugins.md").read_text()
FILES = dict(re.findall(r"<!-- file: ([\w.]+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


def test_every_python_block_is_run_here() -> None:
    assert PAGE.count("```python") == len(FILES) == 5


def test_what_it_lists_is_there() -> None:
    suites = dict(re.findall(r"^\| an? [\w ]+ \| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE))
    assert set(suites) == {name for name in kit.__all__ if name.endswith("Suite")}
    for name, methods in suites.items():
        for method in re.findall(r"`(\w+)`", methods):
            with pytest.raises(NotImplementedError, match=f"Write {method}"):
                _call(getattr(kit, name)(), method)
    fixtures = re.findall(r"^\| `(refitkit_\w+)` \|", PAGE, re.MULTILINE)
    assert fixtures == [name for name in vars(plugin) if name.startswith("refitkit_")]
    assert GROUP in PAGE
    assert f"`{ATTRIBUTE}`" in PAGE


def _call(suite: object, method: str) -> None:
    function = getattr(suite, method)
    function(*[None] * (function.__code__.co_argcount - 1))


def test_the_files_pass_as_they_are(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "failed" not in done.stdout


def test_the_message_is_the_one_that_it_shows(tmp_path: Path) -> None:
    """An engine that broadcasts what it is given."""
    shown = re.search(r"```\n(Engine.stage: .*?)\n```", PAGE, re.DOTALL)
    assert shown is not None
    broken = FILES["arena.py"].replace("value.load().detach()", "self.grown(value)")
    grown = (
        "\n    def grown(self, value):\n"
        "        tensor = value.load().detach()\n"
        "        slot = self.slots.get(value.slot.name)\n"
        "        return tensor.expand(slot.shape) if slot and tensor.shape == (1,) else tensor\n"
    )
    at = broken.index("\n    def stage(")
    (tmp_path / "arena.py").write_text(broken[:at] + grown + broken[at:])
    done = run(tmp_path, "test_arena.py")
    assert done.returncode == 1
    assert re.sub(r"\s+", " ", shown[1]) in re.sub(r"\s+", " ", done.stdout)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    for name, code in FILES.items():
        if not (folder / name).exists():
            (folder / name).write_text(code)
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    own = ["-p", "refitkit.testing.plugin", "-p", "no:cacheprovider", "--tb=short"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *own, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
