"""docs/explanation/life-of-a-refit.md: a refit enters every function that the page names."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import refitkit

if TYPE_CHECKING:
    from types import FrameType

PACKAGE = Path(refitkit.__file__).parent
PAGE = (PACKAGE.parent / "docs/explanation/life-of-a-refit.md").read_text()
PATH, _, _ = PAGE.partition("## If anything fails")
LINK = re.compile(r"\[`([\w/]+\.py):([\w.]+)`\]\(\.\./\.\./refitkit/([\w/]+\.py)\)")


def links(text: str) -> list[tuple[str, str]]:
    return [(file, function) for file, function, _ in LINK.findall(text)]


def test_every_function_is_a_link() -> None:
    """No name is written without its link, and each link leads to the named file."""
    assert len(re.findall(r"`[\w/]+\.py:[\w.]+`", PAGE)) == len(LINK.findall(PAGE)) > 30
    assert all(file == target for file, _, target in LINK.findall(PAGE))


@pytest.mark.parametrize(
    ("file", "function"), [pytest.param(*link, id=":".join(link)) for link in links(PAGE)]
)
def test_every_link_names_a_function(file: str, function: str) -> None:
    assert function in functions_of(ast.parse((PACKAGE / file).read_text()))


def functions_of(node: ast.AST, prefix: str = "") -> set[str]:
    found = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            found |= {prefix + child.name}
            found |= functions_of(child, f"{prefix}{child.name}.")
    return found


def test_a_refit_enters_them_in_this_order() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    inputs = (torch.randn(1, 4),)
    compiled = refitkit.compile(torch.export.export(model, inputs))
    weights = {name: value + 1 for name, value in model.state_dict().items()}
    entered: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _argument: object) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(PACKAGE)):
            entered.append((str(Path(path).relative_to(PACKAGE)), frame.f_code.co_qualname))

    sys.setprofile(note)
    try:
        refitkit.refit(compiled, weights, inputs=inputs)
    finally:
        sys.setprofile(None)
    missing = [link for link in links(PATH) if link not in entered]
    assert missing == []
    last = -1
    for link in links(PATH):
        assert link in entered[last + 1 :], f"{link} is not entered after the one before it"
        last = entered.index(link, last + 1)
