"""docs/guides/adapters.md: its code runs with the plugin's source, and prints what it says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/guides/adapters.md").read_text()
BLOCKS = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
PACKAGE = "refitkit_peft"


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the plugin found as one that is installed is: by its entry point.

    It does without peft. Its own tests, which need that, run against its wheel.
    """
    told = tmp_path / "installed" / f"{PACKAGE}-0.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: refitkit-peft\nVersion: 0\n")
    (told / "entry_points.txt").write_text(f"[refitkit]\npeft = {PACKAGE}.plugin\n")
    monkeypatch.syspath_prepend(told.parent)
    monkeypatch.syspath_prepend(ROOT / "plugins/refitkit-peft/src")
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.mark.usefixtures("_installed")
def test_the_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert PAGE.count("```python") == len(BLOCKS) == 6
    names: dict[str, Any] = {}
    for name, code in BLOCKS.items():
        exec(compile(code, f"adapters.md:{name}", "exec"), names)  # noqa: S102
        said = capsys.readouterr().out.splitlines()
        told = [line.removeprefix("# ") for line in code.splitlines() if line.startswith("# ")]
        assert said == told
