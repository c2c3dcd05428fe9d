"""docs/reference/hooks.md is what the hook specifications say."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "hook_reference.py"))
    written = (ROOT / "docs" / "reference" / "hooks.md").read_text()
    assert written == script["page"](), "run python scripts/hook_reference.py"


def test_every_hook_is_there_with_its_exact_signature() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "hook_reference.py"))
    written = (ROOT / "docs" / "reference" / "hooks.md").read_text()
    names = list(script["hooks"]())
    assert len(names) == 12
    for name in names:
        assert f"\n## {name}\n\n`{name}(" in written
