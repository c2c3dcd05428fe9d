"""docs/guides/refits.md: its code runs, says what it says it prints, and lists all settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.config import Config

PAGE = (Path(__file__).parents[2] / "docs/guides/refits.md").read_text()
BLOCKS = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


def test_every_python_block_is_run_here() -> None:
    assert PAGE.count("```python") == len(BLOCKS) == 8


def test_every_setting_is_listed() -> None:
    table = PAGE.partition("## Settings")[2]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(Config.model_fields)


@pytest.mark.skipif(not upstream.is_installed(), reason="torch_tensorrt is not installed")
def test_the_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for name, code in BLOCKS.items():
        exec(compile(code, f"refits.md:{name}", "exec"), names)  # noqa: S102
        said = capsys.readouterr().out.splitlines()
        told = [line.removeprefix("# ") for line in code.splitlines() if line.startswith("# ")]
        assert said == told
    assert len(list((tmp_path / "plans").iterdir())) == 1
