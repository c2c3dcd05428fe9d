"""What the pipeline lends, and what modules may tell of themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import refitkit
from refitkit import Pipeline
from refitkit.config import TOLERANCES, Config
from refitkit.errors import EngineError, NotRefittableError, PluginError
from refitkit.host import make_host
from refitkit.model import LayerType, Step
from refitkit.pipeline.context import Context
from refitkit.pipeline.verify import choose, tolerances_for
from refitkit.protocols import Mapped, MapRequest, SlotValue
from tests.fakes import (
    FakeModule,
    FakePlugin,
    OpenEngine,
    make_module,
    plan_for,
    weights_for,
    with_plan,
)

CONFIG = Config()
POOL = LayerType(name="POOL", interface="IPoolLayer", weights=(("values", "VALUES"),))


class Layers:
    def __init__(self, name: str, *types: Any) -> None:
        self.name, self.types = name, types

    @refitkit.hookimpl
    def refitkit_layer_types(self) -> Any:
        return self.types


class Ear:
    name = "ear"

    def __init__(self) -> None:
        self.heard: list[Any] = []

    @refitkit.hookimpl
    def refitkit_event(self, event: Any) -> None:
        self.heard.append(event)


def test_layer_types_of_all_plugins_are_lent_by_name() -> None:
    tools = Context.of(None, [Layers("mine", POOL)]).tools("plan", "plan")
    assert set(tools.layer_types) == {"SCALE", "CONVOLUTION", "DECONVOLUTION", "CONSTANT", "POOL"}
    assert tools.layer_types["POOL"] is POOL


def test_two_layer_types_of_one_name_name_both_plugins() -> None:
    constant = LayerType(name="CONSTANT", interface="IConstantLayer", weights=())
    host = make_host(plugins=[Layers("mine", constant)])
    with pytest.raises(PluginError, match=r"'torch_tensorrt' and 'mine' both offer 'CONSTANT'"):
        Context(host, CONFIG).tools("plan", "plan")


def test_progress_is_told_as_steps_of_the_stage() -> None:
    ear = Ear()
    Context.of(None, [ear]).tools("compile", "build").progress("half done")
    assert ear.heard == [Step("compile", "build", "half done")]


def test_the_finite_check_is_lent_as_configured() -> None:
    assert Context.of(None, ()).tools("refit", "map").check_finite
    assert not Context.of(Config(check_finite=False), ()).tools("refit", "map").check_finite


class OfflineModule(FakeModule):
    """One that cannot be called here."""

    offline = "It lacks a device."
    verifier = "weights"


def offline_module() -> OfflineModule:
    return OfflineModule([OpenEngine("e0", {"w": torch.zeros(2)})])


def test_an_offline_module_is_never_judged_by_a_call() -> None:
    found = choose(make_host(), None, offline_module(), with_inputs=True)
    assert found is not None
    assert found.name == "weights"
    with pytest.raises(NotRefittableError) as info:
        choose(make_host(), "outputs", offline_module(), with_inputs=True)
    assert "It lacks a device." in info.value.hint
    assert "'weights'" in info.value.hint


def test_a_report_tells_of_inputs_that_nothing_was_called_with() -> None:
    pipeline, module = Pipeline(plugins=[FakePlugin()]), make_module()
    offline = with_plan(OfflineModule(list(module.engines.values())))
    compiled, weights = pipeline.load(offline), weights_for(offline, 5)
    told = "inputs= were given and not used: It lacks a device."
    assert told in pipeline.refit(compiled, weights, inputs=(torch.ones(2),)).report.notes
    assert told not in pipeline.refit(compiled, weights).report.notes
    given: Any = {"inputs": (torch.ones(2),), "verify": "weights"}  # who names it knows
    assert told not in pipeline.refit(compiled, weights, **given).report.notes


class LowModule(FakeModule):
    @property
    def precision(self) -> dict[str, str]:
        return {"float32": "float16"}


def test_outputs_are_judged_by_the_precision_that_they_are_computed_in() -> None:
    low = LowModule([OpenEngine("e0", {"w": torch.zeros(2)})])
    found = tolerances_for(CONFIG, low)
    assert found["float32"] == TOLERANCES["float16"]
    assert {k: v for k, v in found.items() if k != "float32"} == {
        k: v for k, v in TOLERANCES.items() if k != "float32"
    }
    assert tolerances_for(CONFIG, make_module()) == TOLERANCES


def test_a_tolerance_of_the_users_own_counts() -> None:
    low = LowModule([OpenEngine("e0", {"w": torch.zeros(2)})])
    own = Config(tolerances={"float32": (0.0, 0.0)})
    assert tolerances_for(own, low)["float32"] == (0.0, 0.0)


class WarmEngine(OpenEngine):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.warmed: list[str] = []
        self.fails = False

    def warm(self, progress: Any) -> None:
        if self.fails:
            raise RuntimeError("cold")
        progress(f"warming {self.name}")
        self.warmed.append(self.name)


def test_a_module_is_warmed_on_request_and_tells_of_it() -> None:
    engine, ear = WarmEngine("e0", {"w": torch.zeros(2)}), Ear()
    pipeline = Pipeline(plugins=[FakePlugin(), ear])
    compiled = pipeline.load(FakeModule([engine]))
    assert engine.warmed == []
    pipeline.load(FakeModule([engine]), warm=True)
    assert engine.warmed == ["e0"]
    assert Step("load", "warm", "warming e0") in ear.heard
    compiled.warm()
    assert engine.warmed == ["e0", "e0"]


def test_an_engine_that_cannot_be_warmed_is_named() -> None:
    engine = WarmEngine("e0", {"w": torch.zeros(2)})
    engine.fails = True
    compiled = Pipeline(plugins=[FakePlugin()]).load(FakeModule([engine]))
    with pytest.raises(EngineError, match=r"'e0' failed to warm up.*cold"):
        compiled.warm()


def test_engines_that_need_no_warming_are_passed_over() -> None:
    Pipeline(plugins=[FakePlugin()]).load(make_module(2), warm=True)


class Asked:
    """A strategy that keeps what it is asked, and serves everything that is left."""

    name = "asked"
    priority = 1

    def __init__(self) -> None:
        self.request: MapRequest | None = None

    def map(self, request: MapRequest) -> Mapped:
        self.request = request
        source = request.source
        return Mapped(
            {
                row.slot.key: SlotValue(
                    row.slot, "asked", (), lambda n=row.slot.name: source.get(n)
                )
                for row in request.wanted
            }
        )


class AskedPlugin:
    name = "asked"

    def __init__(self, strategy: Asked) -> None:
        self.strategy = strategy

    @refitkit.hookimpl
    def refitkit_mapping_strategies(self) -> list[Asked]:
        return [self.strategy]


def test_strategies_are_given_tools_and_their_values_serve_partial_refits_too() -> None:
    """Values without named sources are not values of the plan: a partial refit keeps them."""
    asked, module = Asked(), make_module()
    pipeline = Pipeline(plugins=[FakePlugin(), AskedPlugin(asked)])
    compiled = pipeline.load(module)
    weights = weights_for(module, 5)
    result = pipeline.refit(compiled, weights, plan=plan_for(module), partial=True)
    assert asked.request is not None
    assert "SCALE" in asked.request.tools.layer_types
    assert result.report.slots_written == len(weights)
