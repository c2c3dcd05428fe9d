"""docs/guides/weights.md: its code runs, says what it says it prints, and lists all rules."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refitkit.cli.diff import diff_command
from refitkit.cli.refit import refit_command
from refitkit.cli.settings import read_settings
from refitkit.cli.verify import verify_command
from refitkit.model import Rules
from refitkit.model.rules import FAMILIES, WRAPPERS

if TYPE_CHECKING:
    import pytest

COMMANDS = {"diff": diff_command, "refit": refit_command, "verify": verify_command}
PAGE = (Path(__file__).parents[2] / "docs/guides/weights.md").read_text()
BLOCKS = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


def test_every_rule_is_listed_with_its_default() -> None:
    table, _, more = PAGE.partition("## Names, packing and dtypes")[2].partition("### Pieces")
    listed = re.findall(r"^\| (`[\w`, -]+`) \|", more.partition("\n## ")[0], re.MULTILINE)
    assert [name.strip("`") for cell in listed for name in cell.split(", ")] == list(FAMILIES)
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(Rules.model_fields)
    (line,) = (line for line in table.splitlines() if line.startswith("| `wrappers`"))
    assert tuple(re.findall(r"`(\w+)`", line.split("|")[2])) == WRAPPERS


def test_the_commands_have_these_flags() -> None:
    section = PAGE.partition("## On the command line")[2]
    (block,) = re.findall(r"```console\n(.*?)```", section, re.DOTALL)
    listed = set(re.findall(r"^\| `(--[\w-]+)", section, re.MULTILINE))
    assert {"--rename", "--config"} < listed
    for line in block.replace("\\\n", "").splitlines():
        _, program, name, *words = shlex.split(line)
        command = COMMANDS[name]
        flags = {option for param in command.params for option in param.opts}
        assert program == "refitkit"
        assert listed < flags
        assert {word for word in words if word.startswith("-")} < flags


def test_the_toml_holds_settings(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "settings.toml").write_text(text)
    assert read_settings(tmp_path / "settings.toml")["rules"]["cast"] == "lossless"


def test_the_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert PAGE.count("```python") == len(BLOCKS) >= 3
    names: dict[str, Any] = {}
    for name, code in BLOCKS.items():
        exec(compile(code, f"weights.md:{name}", "exec"), names)  # noqa: S102
        said = capsys.readouterr().out.splitlines()
        told = [line.removeprefix("# ") for line in code.splitlines() if line.startswith("# ")]
        assert said == told
