"""docs/guides/write-a-backend.md: it quotes the plugin as it is, and its code runs."""

from __future__ import annotations

import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

import refitkit
from refitkit import protocols

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "plugins" / "refitkit-openvino"
SOURCE = PLUGIN / "src"
PAGE = (ROOT / "docs" / "guides" / "write-a-backend.md").read_text()
BLOCKS = re.findall(r"<!-- (quote|run): ([\w.-]+) -->\n```python\n(.*?)```", PAGE, re.DOTALL)
QUOTES = [(name, code) for kind, name, code in BLOCKS if kind == "quote"]


def test_every_python_block_is_looked_at() -> None:
    assert PAGE.count("```python") == len(BLOCKS)


@pytest.mark.parametrize(("name", "code"), QUOTES)
def test_the_plugin_is_quoted_as_it_is(name: str, code: str) -> None:
    assert lines_of(code) in lines_of((SOURCE / "refitkit_openvino" / name).read_text())


def lines_of(code: str) -> str:
    """Without indentation and empty lines, which ruff changes in Markdown."""
    return "\n".join(line.strip() for line in code.splitlines() if line.strip())


def test_the_entry_points_are_those_of_the_plugin() -> None:
    (toml,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert toml in (PLUGIN / "pyproject.toml").read_text()


def test_names_and_links_exist() -> None:
    for name in re.findall(r"`(\w+Error)`", PAGE):
        assert issubclass(getattr(refitkit, name), refitkit.RefitError)
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE):
        assert (ROOT / "docs" / "guides" / link).exists(), link


def test_every_ability_in_the_table_is_a_member_of_a_protocol() -> None:
    table = PAGE.partition("| members |")[2].partition("\n\n")[0]
    known = {name for one in protocols.__all__ for name in vars(getattr(protocols, one))}
    for row in table.splitlines()[2:]:
        members = re.findall(r"`(\w+)`", row.split("|")[1])
        assert members
        assert known.issuperset(members)


def test_the_code_prints_what_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.syspath_prepend(SOURCE)
    import refitkit_openvino

    pipeline = refitkit.Pipeline(plugins=[refitkit_openvino])
    monkeypatch.setattr(refitkit, "compile", pipeline.compile)
    monkeypatch.setattr(refitkit, "refit", pipeline.refit)
    (code,) = [code for kind, _, code in BLOCKS if kind == "run"]
    said = StringIO()
    with redirect_stdout(said):
        exec(code, {})  # noqa: S102 - the page's
    printed = [line.removeprefix("# ") for line in code.splitlines() if line.startswith("# ")]
    assert said.getvalue().splitlines() == printed
    for name in [name for name in sys.modules if name.startswith("refitkit_openvino")]:
        monkeypatch.delitem(sys.modules, name)
