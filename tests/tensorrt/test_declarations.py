"""Constants that converters make where no recording sees it: declared, suspected and proved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit.cli.api import main
from refitkit.model import SlotState
from tests.tensorrt.helpers import BACKEND, needs_torch_tensorrt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from refitkit.model import LedgerRow

pytestmark = needs_torch_tensorrt
MADE = "_run_on_acc_0/made CONSTANT"
OPTIONS: dict[str, Any] = {
    "min_block_size": 1,
    "imports": ["tests.tensorrt.children.declaring_converters"],
}
OPS: dict[str, Callable[..., torch.Tensor]] = {
    "by formula": torch.copysign,
    "by a wrong formula": torch.hypot,
    "without a formula": torch.nextafter,
    "by name": torch.igamma,
    "silently": torch.igammac,
    "table": torch.special.zeta,
}


class Model(torch.nn.Module):
    """The weight has a slot of its own, too: it reaches one whatever the converter does."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(4, 4)
        self.weight = torch.nn.Parameter(torch.rand(4) + 0.5)
        self.op = OPS[name]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(self.linear(x) * self.weight, self.weight)


def program(name: str, seed: int = 0) -> torch.export.ExportedProgram:
    return torch.export.export(Model(name, seed).eval(), (torch.ones(2, 4),))


def compiled_from(name: str, *, prove: bool = False) -> refitkit.CompiledModule:
    return refitkit.compile(program(name), BACKEND, OPTIONS, prove=prove)


def row_of(compiled: refitkit.CompiledModule) -> LedgerRow:
    assert compiled.plan
    (row,) = [row for row in compiled.plan.ledger if "/".join(row.slot.key) == MADE]
    return row


def test_a_declared_formula_is_a_recipe_that_refits_exactly() -> None:
    compiled = compiled_from("by formula", prove=True)
    row = row_of(compiled)
    assert (row.state, row.sources, row.unseen) == (SlotState.RECIPE, ("weight",), False)
    new = program("by formula", seed=1)
    report = refitkit.refit(compiled, new.state_dict, verify="engine-bytes").report
    assert report.verification
    assert report.verification.ok
    assert {row.strategy for row in report.ledger} == {"recipe"}


def test_a_wrong_formula_is_an_error_of_the_compilation() -> None:
    with pytest.raises(refitkit.CompileError, match="does not give its constant") as info:
        compiled_from("by a wrong formula")
    (problem,) = info.value.problems
    assert (problem.subject, problem.kind) == ("constant made of 'weight'", "other bits")


@pytest.mark.parametrize("name", ["without a formula", "by name"])
def test_without_a_formula_the_slot_is_left_to_other_strategies(name: str) -> None:
    compiled = compiled_from(name)
    row = row_of(compiled)
    assert (row.state, row.unseen) == (SlotState.UNMAPPED, False)
    assert "declares that it is made of 'weight'" in row.reason
    new = program(name, seed=1)
    recipes = refitkit.Pipeline({"strategies": ("recipe",)})
    with pytest.raises(refitkit.UnmappedSlotError) as info:
        recipes.refit(compiled, new.state_dict)
    (problem,) = [one for one in info.value.problems if MADE in one.subject]
    assert "made of 'weight'" in f"{problem}"
    report = refitkit.refit(compiled, new, verify="engine-bytes").report
    (served,) = [row for row in report.ledger if f"{row.engine}/{row.slot}" == MADE]
    assert served.strategy == "rebuild"


def test_a_silent_converter_is_told_from_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = compiled_from("silently")
    row = row_of(compiled)
    assert (row.state, row.unseen) == (SlotState.FROZEN, True)
    assert "did not see of what" in row.reason
    report = refitkit.refit(compiled, program("silently").state_dict).report
    (kept,) = [row for row in report.ledger if f"{row.engine}/{row.slot}" == MADE]
    assert "did not see of what" in kept.reason
    compiled.save(tmp_path / "saved")
    for command in (["inspect"], ["plan", "show"]):
        capsys.readouterr()
        assert main([*command, str(tmp_path / "saved")]) == 0
        (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("unseen")]
        assert MADE in line


def test_a_proof_by_trial_names_a_silent_converters_slot() -> None:
    with pytest.raises(refitkit.NotRefittableError, match="kept their old value") as info:
        compiled_from("silently", prove=True)
    first = info.value.problems[0]
    assert (first.subject, first.kind, first.found) == (MADE, "kept its old value", "frozen")
    assert "did not see of what" in first.hint


def test_a_proof_of_a_plan_names_it_too() -> None:
    with pytest.raises(refitkit.NotRefittableError, match="The plan is wrong") as info:
        refitkit.plan(program("silently"), backend=BACKEND, options=OPTIONS, prove=True)
    (problem,) = info.value.problems
    assert (problem.subject, problem.kind, problem.found) == (MADE, "kept its old value", "frozen")
    assert "did not see of what" in problem.hint


def test_a_proof_clears_a_table_that_holds_no_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert row_of(compiled_from("table")).unseen
    compiled = compiled_from("table", prove=True)
    row = row_of(compiled)
    assert (row.state, row.unseen) == (SlotState.FROZEN, False)
    assert "a proof by trial with other weights found it right" in row.reason
    assert refitkit.plan(program("table"), compiled).ledger == compiled.plan.ledger  # type: ignore[union-attr]
    compiled.save(tmp_path / "saved")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "saved")]) == 0
    assert "unseen" not in capsys.readouterr().out
