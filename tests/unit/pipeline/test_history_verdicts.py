"""Verdicts on the way back, where the values that are staged are the engines' own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refitkit.builtin.torch_tensorrt.torch_part import TorchPartEngine
from tests.fakes import FakeModule, pipeline_with, same_state, with_plan

if TYPE_CHECKING:
    from refitkit.pipeline import CompiledModule, Pipeline


def torch_parts() -> tuple[Pipeline, CompiledModule, TorchPartEngine]:
    """A module of which torch runs all: its engine writes in place, over what was before."""
    engine = TorchPartEngine(
        "part", torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    )
    pipeline = pipeline_with(keep_base=False)
    return pipeline, pipeline.load(with_plan(FakeModule([engine]))), engine


def test_an_engine_that_writes_over_what_it_lent() -> None:
    pipeline, compiled, engine = torch_parts()
    first = {name: value.clone() for name, value in engine.live.items()}
    second = {name: value + 1 for name, value in first.items()}
    result = pipeline.refit(compiled, second)
    for wanted in (first, second):
        result = result.undo()
        assert result.report.verification is not None
        assert result.report.verification.ok
        assert same_state(engine.live, wanted)
