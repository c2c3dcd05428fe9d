"""Bad input never harms a module: a typed error that names everything, or the exact result.

Raw AOTInductor answers silently wrong or crashes on most of these, so each runs in a process of its
own (forked by ``children/bad_input.py``), and one that dies of a signal fails its test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from aoti_helpers import answer_of, start_child

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WEIGHT = "float32 (24, 16)"

REFUSED: dict[str, list[tuple[str, str, str, str]]] = {
    "smaller": [("a.weight", "shape", "(23, 16)", "(24, 16)")],
    "bigger": [("a.weight", "shape", "(48, 16)", "(24, 16)")],
    "transposed": [("a.weight", "shape", "(16, 24)", "(24, 16)")],
    "flattened": [("a.weight", "shape", "(384,)", "(24, 16)")],
    "one row, which would broadcast": [("a.weight", "shape", "(1, 16)", "(24, 16)")],
    "float16": [("a.weight", "dtype", "float16", "float32")],
    "bfloat16": [("a.weight", "dtype", "bfloat16", "float32")],
    "float64": [("a.weight", "dtype", "float64", "float32")],
    "int32": [("a.weight", "dtype", "int32", "float32")],
    "int32 of the same bits": [("a.weight", "dtype", "int32", "float32")],
    "sparse": [("a.weight", "unusable", "sparse_coo", WEIGHT)],
    "meta": [("a.weight", "unusable", "meta", WEIGHT)],
    "quantized": [("a.weight", "unusable", "quantized", WEIGHT)],
    "array": [("a.weight", "unusable", "ndarray", WEIGHT)],
    "nan": [("a.weight", "non-finite", "1 of 384 elements, the first at (3, 5)", "finite")],
    "infinity": [("a.weight", "non-finite", "1 of 384 elements, the first at (3, 5)", "finite")],
    "unknown name": [("a.wieght", "unexpected", "float32 (24, 16)", "")],
    "missing name": [("b.bias", "missing", "", "float32 (8,)")],
    "several": [
        ("a.weight", "shape", "(24, 3)", "(24, 16)"),
        ("a.bias", "dtype", "float64", "float32"),
        ("b.weight", "non-finite", "192 of 192 elements", "finite"),
        ("typo.weight", "unexpected", "float32 (2,)", ""),
        ("scale", "missing", "", "float32 (8,)"),
    ],
    "partial, nothing": [("a state_dict of 0 entries", "nothing to refit", "0 names", "")],
    "partial, unknown name": [("x", "unexpected", "float32 (2,)", "")],
}
"""The problems that one error must list: subject, kind, parts of what was found and wanted."""

EXACT = [
    "offset",
    "turned",
    "gaps",
    "expanded",
    "trained",
    "negated lazily",
    "negated lazily, dense",
    "nan allowed",
    "partial",
]


HINTS = {
    "transposed": "the transposed shape",
    "unknown name": "did you mean 'a.weight'?",
    "missing name": "partial=True",
    "nan": "check_finite=False",
    "float16": "convert it yourself",
    "sparse": "pass value.to_dense()",
}


@pytest.fixture(scope="module")
def answers(saved: Callable[[str], Path]) -> dict[str, dict[str, Any]]:
    """What each case told, or what it died of."""
    return answer_of(start_child("bad_input.py", saved("small"), *REFUSED, *EXACT))


@pytest.mark.parametrize("bad", REFUSED)
def test_is_refused_by_name_and_changes_nothing(
    bad: str, answers: dict[str, dict[str, Any]]
) -> None:
    told = answers[bad]
    assert "died" not in told, told["died"]
    assert told["error"] == "WeightMismatchError"
    found = {(p["subject"], p["kind"]): p for p in told["problems"]}
    assert found.keys() == {(subject, kind) for subject, kind, _, _ in REFUSED[bad]}
    for subject, kind, has, wants in REFUSED[bad]:
        problem = found[subject, kind]
        assert has in problem["found"]
        assert wants in problem["wanted"]
        assert all(text in told["message"] for text in (subject, kind, has, wants))
    assert told["outputs kept"]
    assert told["slots kept"]


@pytest.mark.parametrize("bad", EXACT)
def test_awkward_but_right_is_exact(bad: str, answers: dict[str, dict[str, Any]]) -> None:
    told = answers[bad]
    assert "died" not in told, told["died"]
    assert told["error"] is None, told["message"]
    assert told["as a plain refit"]
    assert not told["outputs kept"]
    assert not told["live gradients"]


@pytest.mark.parametrize("bad", HINTS)
def test_the_message_says_what_to_do(bad: str, answers: dict[str, dict[str, Any]]) -> None:
    assert HINTS[bad] in answers[bad]["message"]
