"""Write docs/reference/hooks.md from the docstrings in refitkit/hookspecs.py.

usage: python scripts/hook_reference.py [--check]
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from refitkit import hookspecs

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "hooks.md"


def hooks() -> dict[str, Any]:
    """All hook specifications by name, in the order in which they stand."""
    return {n: f for n, f in vars(hookspecs).items() if n.startswith("refitkit_")}


def page() -> str:
    """The whole page."""
    parts = ["# Hooks", "<!-- written by scripts/hook_reference.py: edit refitkit/hookspecs.py -->"]
    parts.append(inspect.getdoc(hookspecs) or "")
    for name, function in hooks().items():
        arguments = ", ".join(inspect.signature(function).parameters)
        text = inspect.getdoc(function) or ""
        parts += [f"## {name}", f"`{name}({arguments})`", f"```text\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Write the page, or with --check tell whether it is up to date."""
    if "--check" in sys.argv[1:]:
        same = PAGE.exists() and PAGE.read_text() == page()
        print("docs/reference/hooks.md is", "up to date" if same else "out of date")
        return 0 if same else 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
