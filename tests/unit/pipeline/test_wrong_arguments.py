"""What users pass by mistake: each time a typed error that says what to do, and nothing changed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from refitkit.errors import ConfigError, RefitError, SourceError, UnsupportedTargetError
from refitkit.pipeline import Pipeline
from tests.fakes import FakeModule, FakePlugin, Loaded, make_module, same_state, weights_for


class Scene(Loaded):
    """A module that was refitted once."""

    def __init__(self) -> None:
        super().__init__(make_module(2))
        self.new = weights_for(self.module, 20.0)
        self.result = self.pipeline.refit(self.compiled, weights_for(self.module, 10.0))
        self.held = self.module.holds()

    def require_unchanged(self) -> None:
        assert same_state(self.module.holds(), self.held)
        assert self.compiled.version == 1


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.mark.parametrize("version", ["x", "1", None, 1.0, 1.5, True, False, [1], (0,)])
def test_what_is_no_version(version: Any, scene: Scene) -> None:
    scene.compiled.base = scene.new
    for action in (
        lambda: scene.compiled.restore(version),
        lambda: scene.pipeline.restore_all([(scene.compiled, version)]),
    ):
        with pytest.raises(ConfigError, match=r"compiled\.kept") as info:
            action()
        assert [p.subject for p in info.value.problems] == ["module 1"]
    scene.require_unchanged()


@pytest.mark.parametrize("target", ["module.refit", None, 5])
def test_what_is_no_module_to_go_back(target: Any, scene: Scene) -> None:
    with pytest.raises(ConfigError, match=r"refitkit\.load"):
        scene.pipeline.restore(target)


def test_what_is_no_list_of_ways_back(scene: Scene) -> None:
    one: Any = scene.compiled
    for back in (None, one, "abc", [one], [(one,)], [(one, 0, 1)], {one: 0}):
        with pytest.raises(ConfigError, match=r"refitkit\.load"):
            scene.pipeline.restore_all(back)
    scene.require_unchanged()


def test_what_is_no_list_of_modules(scene: Scene) -> None:
    one, new = scene.compiled, scene.new
    wrong: list[Any] = [
        None,
        5,
        one,
        "abc",
        {one: new},
        (one, new),
        [one],
        [(one,)],
        [(one, new, 1, 2)],
    ]
    wrong += [[(one, new, None)], [(one, new, "x")], [(one, new, {1: 2})], [(one, new, {"no": 1})]]
    for modules in wrong:
        with pytest.raises(ConfigError, match=r"Pass \[\(module, weights\), \.\.\.\]"):
            scene.pipeline.refit_all(modules)
    scene.require_unchanged()


def test_a_generator_is_read_once(scene: Scene) -> None:
    results = scene.pipeline.refit_all((one, scene.new) for one in [scene.compiled])
    assert [r.report.version for r in results] == [2]


def test_all_that_cannot_be_opened_is_told(scene: Scene) -> None:
    jobs: list[Any] = [("no.refit", {}), (scene.compiled, scene.new), (None, {})]
    with pytest.raises(UnsupportedTargetError) as info:
        scene.pipeline.refit_all(jobs)
    assert [p.subject.partition(":")[0] for p in info.value.problems] == ["module 1", "module 3"]
    scene.require_unchanged()


def test_one_object_twice_is_one_module() -> None:
    """Two handles of one target have two gates and would each undo what the other did."""
    module: FakeModule = make_module(2)
    held = module.holds()
    pipeline = Pipeline(plugins=[FakePlugin()])
    jobs = [(module, weights_for(module, fill)) for fill in (10.0, 20.0)]
    with pytest.raises(ConfigError, match=r"module 2 \(fake\): the same module"):
        pipeline.refit_all(jobs)
    assert same_state(module.holds(), held)


@pytest.mark.parametrize("plan", ["model.refitplan", {}, 0])
def test_what_is_no_plan(plan: Any, scene: Scene) -> None:
    with pytest.raises(ConfigError, match=r"RefitPlan\.load"):
        scene.pipeline.refit(scene.compiled, scene.new, plan=plan)
    scene.require_unchanged()


@pytest.mark.parametrize("base", [5, "", "no/such", [1], {}, torch.nn.ReLU])
def test_what_is_no_base(base: Any, scene: Scene) -> None:
    scene.compiled.base = base
    for action in (scene.compiled.restore, scene.result.undo):
        with pytest.raises(RefitError) as info:
            action()
        assert isinstance(info.value, SourceError) or info.value.problems
    scene.require_unchanged()


def test_going_back_has_no_reference_of_its_own(scene: Scene) -> None:
    with pytest.raises(ConfigError, match="kept values"):
        scene.result.undo(inputs=(torch.ones(()),), verify="outputs")
    scene.require_unchanged()


def test_a_reference_without_inputs(scene: Scene) -> None:
    """Whoever passes one believes that outputs are compared."""
    pipeline, compiled = scene.pipeline, scene.compiled
    for action in (
        lambda: pipeline.refit(compiled, scene.new, reference=torch.ones(2)),
        lambda: pipeline.verify(compiled, scene.new, reference=torch.ones(2)),
        lambda: compiled.restore(reference=torch.ones(2)),
    ):
        with pytest.raises(ConfigError, match="reference=") as info:
            action()
        assert "inputs=" in info.value.hint
    scene.require_unchanged()


@pytest.mark.parametrize("act", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_module_is_not_copied_or_pickled(act: Any, scene: Scene) -> None:
    with pytest.raises(TypeError, match=r"compiled\.save\(path\).*copy=True"):
        act(scene.compiled)
    scene.require_unchanged()


@pytest.mark.parametrize("plugins", [FakePlugin(), None, "name"])
def test_plugins_that_are_no_list(plugins: Any) -> None:
    with pytest.raises(ConfigError, match=r"plugins=\[plugin\]"):
        Pipeline(plugins=plugins)
