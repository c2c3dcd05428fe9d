"""``plan(prove=True)``: what recipes compute, held against what an interpreter gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import refitkit
from refitkit.pipeline.proof import prove_plan
from tests.tensorrt.helpers import needs_torch_tensorrt

if TYPE_CHECKING:
    from refitkit.model import OpCall

pytestmark = needs_torch_tensorrt
OPTIONS = {"min_block_size": 1}


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ConvTranspose2d(4, 4, 3)
    ).eval()
    return torch.export.export(model, (torch.randn(1, 3, 8, 8),))


def proof(plan: refitkit.RefitPlan, program: torch.export.ExportedProgram) -> str:
    pipeline = refitkit.Pipeline()
    return prove_plan(pipeline.context, plan, program, None, OPTIONS).missing


@pytest.mark.parametrize("backend", ["tensorrt_network", "torch_tensorrt"])
def test_a_plan_made_offline_can_be_proved(
    program: torch.export.ExportedProgram, backend: str
) -> None:
    plan = refitkit.plan(program, backend=backend, options=OPTIONS, prove=True)
    assert {row.state for row in plan.ledger} == {"recipe"}
    assert proof(plan, program) == ""


def test_a_wrong_recipe_is_found(program: torch.export.ExportedProgram) -> None:
    plan = refitkit.plan(program, backend="tensorrt_network", options=OPTIONS)

    def spoilt(call: OpCall) -> OpCall:
        is_epsilon = call.op == "aten.add.Tensor"
        return call.model_copy(update={"args": (call.args[0], 1e-3)}) if is_epsilon else call

    assert any(spoilt(call) != call for call in plan.data.calls)
    data = plan.data.model_copy(update={"calls": tuple(map(spoilt, plan.data.calls))})
    wrong = refitkit.RefitPlan(data, {name: plan.pinned(name) for name in data.pinned})
    with pytest.raises(refitkit.NotRefittableError) as info:
        proof(wrong, program)
    found = {problem.subject.rpartition(" ")[2] for problem in info.value.problems}
    assert found == {"SCALE", "SHIFT"}


class Converted(torch.nn.Module):
    """A weight whose converter makes a number of what lies at its address: nobody sees that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.5, 2.5, 0.5, 0.75]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.zeta(torch.relu(x), self.weight)


def test_what_nobody_can_watch_is_found() -> None:
    unseen = torch.export.export(Converted().eval(), (torch.randn(2, 4),))
    options = {**OPTIONS, "imports": ["tests.tensorrt.children.looking_converters"]}
    plan = refitkit.plan(unseen, backend="tensorrt_network", options=options)
    assert [row.state for row in plan.ledger] == ["recipe"]
    assert not plan.data.guards
    with pytest.raises(refitkit.NotRefittableError, match="The plan is wrong") as info:
        refitkit.plan(unseen, backend="tensorrt_network", options=options, prove=True)
    assert [problem.subject for problem in info.value.problems] == [
        f"{row.slot.engine}/{row.slot.name}" for row in plan.ledger
    ]
