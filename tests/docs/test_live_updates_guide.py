"""docs/guides/live-updates.md: its code runs, and prints what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/guides/live-updates.md").read_text()
BLOCKS = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


def test_the_code_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert PAGE.count("```python") == len(BLOCKS) == 3
    scope: dict[str, Any] = {}
    for code in BLOCKS.values():
        exec(code, scope)  # noqa: S102 - the page's own code
        said = [line.removeprefix("# ") for line in code.splitlines() if line.startswith("# ")]
        assert capsys.readouterr().out.splitlines() == said


def test_links_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE):
        assert (ROOT / "docs/guides" / link).exists(), link
