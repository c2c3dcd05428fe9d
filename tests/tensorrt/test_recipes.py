"""Recipes of real converters: guards where those look at values, and refits by either strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from tests.tensorrt.helpers import BACKEND, needs_torch_tensorrt, values_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = needs_torch_tensorrt
OPTIONS: dict[str, Any] = {
    "min_block_size": 1,
    "imports": ["tests.tensorrt.children.looking_converters"],
}


class Looked(torch.nn.Module):
    def __init__(self, op: Callable[..., torch.Tensor], first: float, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(4, 4)
        self.seen = torch.nn.Parameter(torch.tensor([first, 0.5, -0.25, 0.125]))
        self.op = op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(self.linear(x), self.seen)


@dataclass(frozen=True)
class Kind:
    """One op whose converter looks at a weight.

    Attributes:
        op: The op.
        reason: How the guard says that it was looked at.
    """

    op: Callable[..., torch.Tensor]
    reason: str

    def program(self, first: float, seed: int = 0) -> torch.export.ExportedProgram:
        model = Looked(self.op, first, seed).eval()
        return torch.export.export(model, (torch.randn(2, 4),))


KINDS = {
    "branches": Kind(torch.copysign, "_local_scalar_dense"),
    "folds": Kind(torch.hypot, "maximum"),
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def compiled(kind: Kind) -> refitkit.CompiledModule:
    return refitkit.compile(kind.program(3.0), BACKEND, OPTIONS, prove=False)


def test_what_was_looked_at_is_a_guard(compiled: refitkit.CompiledModule, kind: Kind) -> None:
    assert compiled.plan
    (guard,) = compiled.plan.data.guards
    assert kind.reason in guard.reason
    assert {row.state for row in compiled.plan.ledger} <= {"recipe", "frozen"}


def test_while_the_guard_holds_recipes_serve(compiled: refitkit.CompiledModule, kind: Kind) -> None:
    new = kind.program(3.0, seed=1)
    report = refitkit.refit(compiled, new.state_dict, verify="engine-bytes").report
    assert report.changed
    assert report.verification
    assert report.verification.ok
    assert {row.strategy for row in report.ledger} == {"recipe"}


def test_when_it_breaks_the_interpreter_serves(
    compiled: refitkit.CompiledModule, kind: Kind
) -> None:
    """Another value that makes the same network: 4 is large, too, and the largest element."""
    new = kind.program(4.0, seed=2)
    assert compiled.plan
    with pytest.raises(refitkit.UnmappedSlotError, match="seen"):
        compiled.plan.materialize(new.state_dict)
    report = refitkit.refit(compiled, new, verify="engine-bytes").report
    assert report.verification
    assert report.verification.ok
    assert {row.strategy for row in report.ledger} == {"rebuild"}
    refitkit.refit(compiled, kind.program(3.0), verify="engine-bytes")  # and back, by recipes


def test_a_value_that_makes_another_network_is_refused() -> None:
    kind = KINDS["branches"]
    compiled = refitkit.compile(kind.program(3.0), BACKEND, OPTIONS, prove=False)
    before = values_of(compiled)
    assert before
    with pytest.raises(refitkit.RefitError):
        refitkit.refit(compiled, kind.program(0.5, seed=3), verify="engine-bytes")
    after = values_of(compiled)
    assert all(torch.equal(before[key], after[key]) for key in before)


# -- the option imports -------------------------------------------------------------------------


def test_modules_are_found_where_this_process_finds_them_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: refitkit.CompiledModule
) -> None:
    """The planning process was started before there was such a place."""
    (tmp_path / "registers_late.py").write_text("import torch_tensorrt\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {**OPTIONS, "imports": [*OPTIONS["imports"], "registers_late"]}
    again = refitkit.compile(KINDS["folds"].program(3.0), BACKEND, options, prove=False)
    assert compiled.slots
    assert again.slots


def test_a_module_that_cannot_be_imported_is_named() -> None:
    options = {**OPTIONS, "imports": ["no_module_of_this_name"]}
    with pytest.raises(refitkit.ConfigError, match=r"'imports' names 'no_module_of_this_name'"):
        refitkit.compile(KINDS["folds"].program(3.0), BACKEND, options, prove=False)
