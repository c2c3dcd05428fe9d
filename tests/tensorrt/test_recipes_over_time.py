"""Recipes in a module that lives on: kept, saved, refitted in part and by what changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit.model import CallRef, Step
from tests.tensorrt.helpers import BACKEND, needs_torch_tensorrt
from tests.tensorrt.models import Case

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_torch_tensorrt


class Folding(torch.nn.Module):
    """A BatchNorm, which is folded into two slots of three and four weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4, eps=1e-3)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


CASE = Case(Folding, ((1, 3, 8, 8),))


class Told:
    """Collects what was told of steps."""

    name = "told"

    def __init__(self) -> None:
        self.texts: list[str] = []

    @refitkit.hookimpl
    def refitkit_event(self, event: Any) -> None:
        if isinstance(event, Step):
            self.texts.append(event.text)


def written(report: Any) -> set[str]:
    """The parts of the model whose slots were written."""
    return {source.partition(".")[0] for row in report.ledger for source in row.sources}


def test_a_life(tmp_path: Path) -> None:
    told, settings = Told(), {"plan_cache": tmp_path / "plans", "delta": True}
    pipeline = refitkit.Pipeline(settings, plugins=[told])
    compiled = pipeline.compile(CASE.program(0), BACKEND, CASE.settings, prove=False)
    assert compiled.plan is not None
    assert any(isinstance(row.value, CallRef) for row in compiled.plan.ledger)

    one = dict(CASE.model(1).state_dict())
    assert pipeline.refit(compiled, one, verify="engine-bytes").report.slots_unchanged == 0
    two = {**one, "norm.running_var": one["norm.running_var"] * 2}
    report = pipeline.refit(compiled, two, verify="engine-bytes").report
    assert written(report) == {"norm"}
    assert (report.slots_written, report.slots_unchanged) == (2, 4)

    compiled.save(tmp_path / "module")
    again = pipeline.load(tmp_path / "module")
    assert again.plan is not None
    assert again.plan.data == compiled.plan.data
    with pytest.raises(refitkit.UnmappedSlotError):
        pipeline.refit(again, {"norm.bias": torch.ones(4)}, partial=True)
    norm = {name: two[name] + 1 for name in two if name.startswith("norm.") and two[name].dim()}
    assert written(pipeline.refit(again, norm, partial=True).report) == {"norm"}
    pipeline.verify(again, {**two, **norm}, with_="engine-bytes")

    told.texts.clear()
    assert pipeline.plan(CASE.program(3), target=again).data == again.plan.data
    assert [
        text for text in told.texts if "lowering" in text or "is read from the cache" in text
    ] == [f"the plan is read from the cache: {next((tmp_path / 'plans').iterdir())}"]
