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


def signature(name: str, function: Any) -> str:
    """A hook's arguments and result as it is written, an argument a line where there are many."""
    found = inspect.signature(function)
    arguments = [f"{one.name}: {one.annotation}" for one in found.parameters.values()]
    line = f"def {name}({', '.join(arguments)}) -> {found.return_annotation}"
    if len(line) <= 100:  # noqa: PLR2004 - as long as a line of code
        return line
    inside = "".join(f"    {one},\n" for one in arguments)
    return f"def {name}(\n{inside}) -> {found.return_annotation}"


def deprecated(function: Any) -> list[str]:
    """A line for each argument that is on its way out."""
    marked = function.refitkit_spec["warn_on_impl_args"] or {}
    return [f"**Deprecated:** the argument `{name}`. {said}" for name, said in marked.items()]


def page(specifications: dict[str, Any] | None = None) -> str:
    """The whole page.

    Args:
        specifications: Hooks by name; all that there are where None.
    """
    parts = ["# Hooks", "<!-- written by scripts/hook_reference.py: edit refitkit/hookspecs.py -->"]
    parts.append(inspect.getdoc(hookspecs) or "")
    for name, function in (specifications or hooks()).items():
        text = inspect.getdoc(function) or ""
        parts += [f"## {name}", f"```python\n{signature(name, function)}\n```"]
        parts += [*deprecated(function), f"```text\n{text}\n```"]
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
