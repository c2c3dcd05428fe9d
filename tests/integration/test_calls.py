"""Calls with wrong inputs raise InputMismatchError, those with awkward ones are exact.

Raw AOTInductor believes its inputs, and answers wrongly or crashes; so each call is made in a
process of its own (forked by ``children/wrong_calls.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from aoti_helpers import answer_of, digest, start_child
from aoti_models import CASES

import refitkit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WRONG: dict[str, tuple[str, ...]] = {
    "fewer rows": ("(1, 16)", "(3, 16)"),
    "more rows": ("(1500, 16)", "(3, 16)"),
    "no rows": ("(0, 16)", "(3, 16)"),
    "fewer columns": ("(3, 2)", "(3, 16)"),
    "more columns": ("(3, 1024)", "(3, 16)"),
    "turned shape": ("(16, 3)", "(3, 16)"),
    "one dimension": ("(48,)", "(3, 16)"),
    "three dimensions": ("(1, 3, 16)", "(3, 16)"),
    "a number": ("float", "Tensor"),
    "nothing": ("NoneType", "Tensor"),
    "a list": ("structure",),
    "an array": ("ndarray", "Tensor"),
    "float64": ("float64", "float32"),
    "float16": ("float16", "float32"),
    "int64": ("int64", "float32"),
    "sparse": ("sparse",),
    "meta": ("meta", "cpu"),
    "no arguments": ("structure",),
    "two arguments": ("structure",),
    "unknown keyword": ("structure", "y"),
    "0 of 1 to 64": ("0", "1 to 64"),
    "65 of 1 to 64": ("65", "1 to 64"),
    "missing keyword": ("structure", "other"),
    "extra keyword": ("structure", "z"),
    "missing part": ("structure", "q"),
    "extra part": ("structure", "r"),
    "parts in a list": ("structure",),
    "wrong part": ("(2, 2)", "(4,)"),
    "float tokens": ("float32", "int64"),
    "int32 tokens": ("int32", "int64"),
}
"""What the message must name."""

OUT_OF_RANGE = ["token too large", "token far too large", "token negative"]

EXACT = [
    "gaps",
    "an offset",
    "turned",
    "expanded",
    "negated lazily",
    "with gradient",
    "a parameter",
    "channels last",
    "image with gaps",
    "gaps in many rows",
    "keywords in another order",
    "awkward everywhere",
]


@pytest.fixture(scope="module")
def answers(saved: Callable[[str], Path]) -> dict[str, dict[str, Any]]:
    """What each call told, or what it died of."""
    folder = {saved(name).parent for name in ("small", "batch", "nested", "transformer", "convnet")}
    return answer_of(start_child("wrong_calls.py", folder.pop(), *WRONG, *OUT_OF_RANGE, *EXACT))


@pytest.mark.parametrize("call", WRONG)
def test_wrong_inputs_are_refused_by_name(call: str, answers: dict[str, dict[str, Any]]) -> None:
    told = answers[call]
    assert "died" not in told, told["died"]
    assert told["error"] == "InputMismatchError", told
    for text in WRONG[call]:
        assert text in told["message"]
    assert told["still right"]


@pytest.mark.parametrize("call", OUT_OF_RANGE)
def test_indices_out_of_range_are_refused(call: str, answers: dict[str, dict[str, Any]]) -> None:
    """Eager torch raises IndexError; the engine checks too, and its error is ours."""
    told = answers[call]
    assert "died" not in told, told["died"]
    assert told["error"] in {"InputMismatchError", "EngineError"}, told
    assert told["still right"]


@pytest.mark.parametrize("call", EXACT)
def test_awkward_inputs_are_exact(call: str, answers: dict[str, dict[str, Any]]) -> None:
    told = answers[call]
    assert "died" not in told, told["died"]
    assert told["error"] is None, told
    assert told["difference"] <= 1e-6
    assert told["as plain"] or call == "an offset"  # whose alignment matters to a gemm's rounding
    assert not told["gradient"]
    assert told["still right"]


class _Writes(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y.mul_(2.0)
        return x * self.weight + y


def test_inputs_that_the_model_writes_to_are_written_to() -> None:
    model = _Writes().eval()
    x = torch.randn(2, 3)
    compiled = refitkit.compile(torch.export.export(model, (x, torch.ones(2, 3))))
    kept = x.clone()
    ys = (torch.ones(2, 3), torch.ones(3, 2).t(), torch.ones(4, 6)[::2, ::2])
    for y in (*ys, *map(torch.ones_like, ys)):
        with torch.no_grad():
            expected = model(x, y.clone())
        assert torch.equal(compiled(x, y), expected)
        assert torch.equal(y, torch.full((2, 3), 2.0))
    assert torch.equal(x, kept)
    y = torch.ones(2, 3)
    refitkit.refit(compiled, _Writes(), inputs=(x, y))
    assert torch.equal(y, torch.ones(2, 3)), "verifying must leave the caller's inputs alone"


def test_a_package_of_torchs_own_refuses_wrong_inputs_too(
    torch_package: Callable[[bool], Path],
) -> None:
    case, compiled = CASES["small"], refitkit.load(torch_package(True))
    (x,) = case.args()
    right = digest(compiled(x))
    wrong = [x[:1], x.repeat(9, 1), x[:, :2], x.reshape(-1), x.double(), x.to_sparse(), None, [x]]
    for planned in (False, True):
        if planned:
            refitkit.plan(case.program(0), target=compiled)
        for value in wrong:
            with pytest.raises(refitkit.InputMismatchError):
                compiled(value)
        assert digest(compiled(x)) == right
        assert digest(compiled(x.t().contiguous().t())) == right
