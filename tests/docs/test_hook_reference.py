"""docs/reference/hooks.md is what the hook specifications say."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from refitkit import hookspecs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "hooks.md").read_text()
SECTION = re.compile(
    r"^## (refitkit_\w+)\n\n```python\n(.*?)\n```\n\n```text\n(.*?)\n```\n\n"
    r"Example \(`([\w./]+)`\):\n\n```python\n(.*?)```$",
    re.MULTILINE | re.DOTALL,
)
SECTIONS = {name: (code, text) for name, code, text, _, _ in SECTION.findall(PAGE)}
EXAMPLES = {name: (path, code) for name, _, _, path, code in SECTION.findall(PAGE)}


def written() -> dict[str, ast.FunctionDef]:
    """The specifications as they are written, read without importing them."""
    tree = ast.parse(Path(hookspecs.__file__).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: node for node in functions if node.name.startswith("refitkit_")}


def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "reference_pages.py"))


def test_the_page_is_up_to_date() -> None:
    assert script()["hook_page"]() == PAGE, "run python scripts/reference_pages.py"


def test_every_hook_has_a_section_and_every_section_a_hook() -> None:
    assert list(SECTIONS) == list(written())
    assert len(SECTIONS) == PAGE.count("\n## refitkit_") == 13


@pytest.mark.parametrize("hook", written())
def test_a_section_has_the_exact_signature(hook: str) -> None:
    node = written()[hook]
    shown = ast.parse(f"{SECTIONS[hook][0]}: ...").body[0]
    assert isinstance(shown, ast.FunctionDef)
    assert ast.unparse(shown.args) == ast.unparse(node.args)
    assert shown.returns is not None
    assert node.returns is not None
    assert ast.unparse(shown.returns) == ast.unparse(node.returns)


@pytest.mark.parametrize("hook", written())
def test_a_section_has_the_whole_docstring(hook: str) -> None:
    assert SECTIONS[hook][1] == ast.get_docstring(written()[hook])


@pytest.mark.parametrize("hook", written())
def test_a_section_has_the_example_that_is_run(hook: str) -> None:
    """tests/docs/test_plugin_examples.py runs the files."""
    path, code = EXAMPLES[hook]
    assert path == f"examples/plugins/{hook}.py"
    assert code == (ROOT / path).read_text()


def test_a_deprecated_argument_is_told() -> None:
    @hookspecs.hookspec(warn_on_impl_args={"old": DeprecationWarning("Take 'new'; gone in 0.4.")})
    def refitkit_some(old: object, new: object) -> None:
        """Do something. Kind: all."""

    page = script()["hook_page"]({"refitkit_some": refitkit_some})
    assert "**Deprecated:** the argument `old`. Take 'new'; gone in 0.4." in page
    assert "**Deprecated:**" not in PAGE
