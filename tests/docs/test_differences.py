"""docs/explanation/differences.md names a test for every fault, and each of them exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "differences.md").read_text()
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| no. |")
]


@cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_fault_has_a_row() -> None:
    numbers = [row[0] for row in ROWS if row[0]]
    wanted = [str(number) for number in range(1, 23)] + list("abcdefghi")
    assert sorted(numbers) == sorted(wanted)
    assert len(ROWS) == len(wanted) + 4


def test_every_row_names_a_test() -> None:
    for row in ROWS:
        assert len(row) == 4, row
        assert all(row[1:]), row
        assert NAMED.search(row[3]), row
        assert not NAMED.search(row[1] + row[2]), row


def test_every_named_test_exists() -> None:
    named = NAMED.findall(PAGE)
    assert len(named) >= len(ROWS)
    for path, name in named:
        assert name.startswith("test_"), name
        assert (ROOT / path).is_file(), path
        assert name in functions_of(path), f"{path}::{name}"
    assert PAGE.count("::test_") == len(named)  # none is written in another way
