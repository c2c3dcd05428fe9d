"""What is computed on the way into a slot has to be finite, where the present value is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import refitkit
from refitkit.errors import WeightMismatchError
from refitkit.protocols import Mapped, MapRequest, SlotValue
from tests.fakes import (
    BACKEND,
    FakeModule,
    OpenEngine,
    call_row,
    leaf_for,
    make_plan,
    make_slot,
    op_call,
    pipeline_with,
    recipe_row,
    with_plan,
)

ROOT, W = make_slot("root"), make_slot("w")
PLAN = make_plan(
    [call_row(ROOT, 0, "var"), recipe_row(W)],
    leaves=[leaf_for(ROOT, fqn="var"), leaf_for(W)],
    calls=[op_call("sqrt.default", "@var")],
)
GOOD = {"var": torch.ones(2), "w": torch.ones(2)}


def folded(**settings: Any) -> tuple[Any, Any]:
    """A module with a slot that holds the root of a weight, and its pipeline."""
    module = FakeModule([OpenEngine("model", {"root": torch.ones(2), "w": torch.ones(2)})])
    pipeline = pipeline_with(**settings)
    return pipeline, pipeline.load(module)


def refit(pipeline: Any, compiled: Any, **new: list[float]) -> Any:
    weights = {**GOOD, **{name: torch.tensor(value) for name, value in new.items()}}
    return pipeline.refit(compiled, weights, plan=PLAN, verify="none").report


def test_a_recipe_that_makes_nan_of_finite_weights() -> None:
    pipeline, compiled = folded()
    with pytest.raises(WeightMismatchError) as info:
        refit(pipeline, compiled, var=[-1.0, 4.0], w=[5.0, 5.0])
    (problem,) = info.value.problems
    assert (problem.subject, problem.kind) == ("root", "non-finite")
    assert problem.found == "1 of 2 elements, the first at (0,)"
    assert "'var'" in problem.hint
    assert "check_finite=False" in problem.hint
    assert compiled.read("root").tolist() == compiled.read("w").tolist() == [1.0, 1.0]
    assert compiled.version == 0
    assert refit(pipeline, compiled, var=[9.0, 4.0]).outcome == "committed"
    assert compiled.read("root").tolist() == [3.0, 2.0]


def test_it_can_be_allowed_and_then_is_no_longer_wrong() -> None:
    pipeline, compiled = folded(check_finite=False)
    refit(pipeline, compiled, var=[-1.0, 4.0])
    assert math.isnan(compiled.read("root")[0])
    strict = pipeline_with()
    assert refit(strict, compiled, var=[-2.0, 9.0]).outcome == "committed"
    with pytest.raises(WeightMismatchError, match="1 of 2"):
        refit(strict, compiled, var=[-2.0, -9.0])


def test_the_way_back_is_not_judged() -> None:
    """What a module held at first is what it is."""
    pipeline, compiled = folded(check_finite=False)
    refit(pipeline, compiled, var=[-1.0, 4.0])
    result = pipeline_with().refit(compiled, GOOD, plan=PLAN, verify="none")
    result.undo()
    assert math.isnan(compiled.read("root")[0])


class Spoiling:
    """A plugin whose strategy gives NaN."""

    name = "spoiling"
    priority = 1

    def map(self, request: MapRequest) -> Mapped:
        rows = request.wanted
        value = torch.tensor([math.nan, 1.0])
        return Mapped(
            {r.slot.key: SlotValue(r.slot, self.name, r.sources, lambda: value) for r in rows}
        )

    @refitkit.hookimpl
    def refitkit_mapping_strategies(self) -> list[Any]:
        return [self]


def test_a_strategy_that_gives_nan() -> None:
    pipeline = pipeline_with(Spoiling())
    compiled = pipeline.load(with_plan(FakeModule([OpenEngine("model", {"w": torch.ones(2)})])))
    with pytest.raises(WeightMismatchError) as info:
        pipeline.refit(compiled, {"w": torch.ones(2)}, verify="none")
    (problem,) = info.value.problems
    assert (problem.subject, problem.found) == ("w", "1 of 2 elements, the first at (0,)")
    assert compiled.read("w").tolist() == [1.0, 1.0]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


class Dividing(Spoiling):
    """Gives NaN for the weights of one program, as 0 / 0 would, and others as they are."""

    def __init__(self, own: torch.Tensor) -> None:
        self.own = own

    def map(self, request: MapRequest) -> Mapped:
        (row,) = (r for r in request.wanted if r.slot.name == "first.bias")
        value = request.source.get("first.bias")
        given = value.sub(self.own).div(value.sub(self.own)).mul(value)
        return Mapped({row.slot.key: SlotValue(row.slot, self.name, (), lambda: given)})


def test_a_proof_brings_back_what_the_program_has() -> None:
    """Moved weights may make finite what the program's own do not."""
    x = torch.zeros(1, 4)
    program = torch.export.export(Net().eval(), (x,))
    own = program.state_dict["first.bias"].detach().clone()
    pipeline = pipeline_with(Dividing(own))
    compiled = pipeline.compile(program, BACKEND)
    assert compiled.read("first.bias").isnan().all()
    assert pipeline.config.check_finite
