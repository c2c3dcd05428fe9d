"""docs/explanation/architecture.md: every file that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/explanation/architecture.md").read_text()
FILES = {
    str(path.relative_to(ROOT))
    for folder in ("refitkit", "scripts", "tests")
    for path in (ROOT / folder).rglob("*.py")
}
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)`", PAGE)))


def test_it_names_files() -> None:
    assert len(NAMED) > 50


@pytest.mark.parametrize("name", NAMED)
def test_a_named_file_is_there(name: str) -> None:
    assert name in FILES or any(file.endswith(f"/{name}") for file in FILES)
