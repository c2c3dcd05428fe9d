"""What transforms keep in plans, see of the module, and say of missing entries."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit.errors import (
    PlanMismatchError,
    PluginError,
    UnsupportedTargetError,
    WeightMismatchError,
)
from refitkit.model import TensorInfo
from refitkit.pipeline import Pipeline
from refitkit.protocols import Made, TransformRequest, WeightGroup
from tests.fakes import BACKEND, KeyedPlugin, Loaded, make_module, same_state

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WEIGHT = torch.arange(6.0).reshape(2, 3)


class Scaled:
    """Checkpoints have each weight divided by a factor, which the plan keeps."""

    name, priority = "scaled", 50

    def __init__(self, data: Any = None) -> None:
        self.data = data
        self.requests: list[TransformRequest] = []

    def attach(self, program: Any, plan: Any) -> Any:
        assert isinstance(program, torch.export.ExportedProgram)
        assert not plan.data.attached
        if isinstance(self.data, Exception):
            raise self.data
        return self.data

    def groups(self, request: TransformRequest) -> Iterator[WeightGroup]:
        self.requests.append(request)
        if not isinstance(request.attached, dict):
            return
        factor, names = request.attached["factor"], set(request.source.names())
        for leaf in request.plan.data.leaves:
            given = f"{leaf.fqn}.divided"
            if given in names:
                gives = {leaf.fqn: TensorInfo(dtype=leaf.dtype, shape=leaf.shape)}

                def make(given: str = given, fqn: str = leaf.fqn) -> Made:
                    return Made({fqn: request.source.get(given) * factor})

                yield WeightGroup((given,), gives, make)

    def explain_missing(self, request: TransformRequest, missing: Any) -> Any:
        assert request.module is not None
        assert "weight.divided" not in request.source.names()
        return {name: f"pass '{name}.divided'" for name in missing if name != "e0.bias"}


class Plugin:
    name = "scaled-plugin"

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    @refitkit.hookimpl
    def refitkit_weight_transforms(self) -> list[Any]:
        return [self.transform]


def program() -> torch.export.ExportedProgram:
    model = torch.nn.Linear(3, 2)
    return torch.export.export(model, (torch.ones(3, 3),))


def pipeline_of(data: Any = None) -> tuple[Pipeline, Scaled]:
    transform = Scaled(data)
    return Pipeline(plugins=[KeyedPlugin(), Plugin(transform)]), transform


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> Path:
    """A saved module whose plan keeps a factor."""
    path: Path = tmp_path_factory.mktemp("attached") / "m.refitkit"
    pipeline, _ = pipeline_of({"factor": 4.0, "of": ["a", None, 1]})
    pipeline.compile(program(), "aotinductor").save(path)
    return path


def test_data_travels_with_the_saved_module(saved: Path) -> None:
    pipeline, transform = pipeline_of()
    compiled = pipeline.load(saved)
    given = {"weight.divided": WEIGHT, "bias": torch.zeros(2)}
    pipeline.refit(compiled, given)
    assert torch.equal(compiled(torch.eye(3)), (4 * WEIGHT).T)
    (request,) = transform.requests
    assert request.attached == {"factor": 4.0, "of": ["a", None, 1]}
    assert request.module is compiled.opened


def test_a_plan_file_has_the_data_too(tmp_path: Path) -> None:
    pipeline, _ = pipeline_of({"factor": 2.0})
    plan = pipeline.plan(program(), backend=BACKEND)
    plan.save(tmp_path / "p.refitplan")
    assert refitkit.RefitPlan.load(tmp_path / "p.refitplan").data.attached == {
        "scaled": {"factor": 2.0}
    }
    (need,) = plan.data.needs
    assert (need.kind, need.name, need.plugin) == ("transform", "scaled", "scaled-plugin")


def test_the_plan_cache_does_not_give_old_data(tmp_path: Path) -> None:
    keyed, one = KeyedPlugin(), program()
    for factor in (1.0, 2.0, 2.0):
        plugins = [keyed, Plugin(Scaled({"factor": factor}))]
        plan = Pipeline({"plan_cache": tmp_path}, plugins).plan(one, backend=BACKEND)
        assert plan.data.attached == {"scaled": {"factor": factor}}
    assert keyed.keyed.drafts == 1


def test_without_the_transform_a_refit_is_refused(saved: Path) -> None:
    compiled = refitkit.load(saved)
    before = compiled(torch.eye(3))
    with pytest.raises(PlanMismatchError, match=r"transform 'scaled'.*'scaled-plugin'"):
        refitkit.refit(compiled, {"weight": WEIGHT, "bias": torch.zeros(2)})
    assert torch.equal(compiled(torch.eye(3)), before)


def test_nothing_attached_is_no_need() -> None:
    pipeline, _ = pipeline_of(None)
    plan = pipeline.plan(program(), backend=BACKEND)
    assert (plan.data.attached, plan.data.needs) == ({}, ())


@pytest.mark.parametrize(
    "data",
    [{1: 2}, {"a": object()}, {"a": torch.ones(1)}, math.nan, {"a": [math.inf]}, {"a": {1, 2}}],
)
def test_what_is_no_json_is_refused(data: Any) -> None:
    pipeline, _ = pipeline_of(data)
    with pytest.raises(PluginError, match=r"'scaled' of the plugin 'scaled-plugin'.*attach.*JSON"):
        pipeline.plan(program(), backend=BACKEND)


def test_too_deep_and_too_large_data_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for data, what in ((deep, "JSON"), ("x" * (1 << 24), "16777218 bytes")):
        pipeline, _ = pipeline_of(data)
        with pytest.raises(PluginError, match=what):
            pipeline.plan(program(), backend=BACKEND)


def test_a_failure_names_the_transform() -> None:
    pipeline, _ = pipeline_of(KeyError("layer"))
    with pytest.raises(PluginError, match=r"'scaled' of the plugin 'scaled-plugin'.*attach"):
        pipeline.plan(program(), backend=BACKEND)
    pipeline, _ = pipeline_of(UnsupportedTargetError("no such layers"))
    with pytest.raises(UnsupportedTargetError, match="no such layers"):
        pipeline.plan(program(), backend=BACKEND)


def test_the_error_says_what_to_pass_instead() -> None:
    scene = Loaded(make_module(1), Plugin(Scaled()))
    before = scene.holds()
    with pytest.raises(WeightMismatchError) as info:
        scene.pipeline.refit(scene.compiled, {"e0.other": torch.ones(2)})
    hints = {p.subject: p.hint for p in info.value.problems if p.kind == "missing"}
    assert hints["e0.weight"].startswith("pass 'e0.weight.divided'; or pass it")
    assert hints["e0.bias"].startswith("pass it")
    assert same_state(scene.holds(), before)


@pytest.mark.parametrize("answer", [None, ["e0.weight"], {"e0.weight": 3}])
def test_a_wrong_explanation_names_the_transform(answer: Any) -> None:
    transform = Scaled()
    transform.explain_missing = lambda *_: answer  # type: ignore[method-assign]
    scene = Loaded(make_module(1), Plugin(transform))
    before = scene.holds()
    with pytest.raises(
        PluginError, match=r"'scaled' of the plugin 'scaled-plugin'.*explain_missing"
    ):
        scene.pipeline.refit(scene.compiled, {})
    assert same_state(scene.holds(), before)
