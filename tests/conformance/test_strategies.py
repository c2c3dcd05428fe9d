"""The built-in strategies, against values that torch computes from the same weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit.builtin.strategies.recipe import RecipeStrategy
from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.name_map import NameMapStrategy
from refitkit.builtin.torch_tensorrt.rebuild import RebuildStrategy
from refitkit.builtin.weights.objects import ProgramWeights
from refitkit.protocols import MapRequest
from refitkit.recipe import RefitPlan, TensorMap
from refitkit.testing import StrategySuite
from tests.conformance.test_tensorrt_network import TOOLS
from tests.unit.builtin.torch_tensorrt.test_name_map import (
    BIAS,
    F32,
    FOUR,
    KERNEL,
    SCALE,
    SHIFT,
    Case,
    Engine,
    Model,
    case,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.protocols import WeightSource

IMAGE = torch.ones(1, 2, 6, 6)
needs_torch_tensorrt = pytest.mark.skipif(
    not upstream.is_installed(), reason="torch_tensorrt is not installed: refitkit[rtx]"
)


def make_net() -> Model:
    conv, norm = torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3, eps=1e-3)
    return Model(lambda m, x: m.b(m.c(x)), c=conv, b=norm).eval()


def weights(seed: int) -> dict[str, torch.Tensor]:
    """New weights by seed, with positive variances."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator) + 0.5
        if value.is_floating_point()
        else value.clone()
        for name, value in make_net().state_dict().items()
    }


def by_hand(seed: int) -> dict[str, torch.Tensor]:
    """The right value of each slot, by the last word of its name."""
    w = weights(seed)
    scale = w["b.weight"] / torch.sqrt(w["b.running_var"] + 1e-3)
    shift = w["b.bias"] - w["b.running_mean"] * scale
    return {"KERNEL": w["c.weight"], "BIAS": w["c.bias"], "SCALE": scale, "SHIFT": shift}


def without(source: Mapping[str, torch.Tensor], name: str) -> WeightSource:
    return TensorMap({key: value for key, value in source.items() if key != name})


class ByHand(StrategySuite):
    """The common part of the suites below."""

    def slots(self) -> list[tuple[str, str]]:
        return [row.slot.key for row in self.make_request(1).wanted]

    def expected(self, seed: int) -> dict[tuple[str, str], torch.Tensor]:
        right = by_hand(seed)
        return {key: right[key[1].rpartition(" ")[2]] for key in self.slots()}

    def make_lacking(self) -> MapRequest:
        return replace(self.make_request(1), source=without(weights(1), "b.running_var"))


@cache
def compiled() -> refitkit.CompiledModule:
    program = torch.export.export(make_net(), (IMAGE,))
    return refitkit.compile(program, "tensorrt_network", {"min_block_size": 1}, prove=False)


@needs_torch_tensorrt
class TestRecipe(ByHand):
    """A recorded plan of a network that folds a batch norm."""

    def make_strategy(self) -> Any:
        return RecipeStrategy()

    def make_request(self, seed: int) -> MapRequest:
        plan = compiled().plan
        assert plan is not None
        source = TensorMap(weights(seed))
        program = compiled().program
        return MapRequest(plan, compiled().opened, source, plan.ledger, program, TOOLS)


@needs_torch_tensorrt
class TestRebuild(TestRecipe):
    """A refit with the module's own program."""

    def make_strategy(self) -> Any:
        return RebuildStrategy()


@needs_torch_tensorrt
class TestRebuildFromPrograms(TestRebuild):
    """A refit with a program as the source."""

    def make_request(self, seed: int) -> MapRequest:
        net = make_net()
        net.load_state_dict(weights(seed))
        source = ProgramWeights(torch.export.export(net, (IMAGE,)))
        return replace(super().make_request(seed), source=source, program=None)


SHAPES = {KERNEL: (3, 2, 3, 3), BIAS: (3,), SCALE: (3,), SHIFT: (3,)}


@cache
def mapped() -> Case:
    entries: Any = {name: [FOUR, F32] for name in (SCALE, SHIFT)}
    entries |= {KERNEL: ["c.weight", F32], BIAS: ["c.bias", F32]}
    return case(make_net(), IMAGE, SHAPES, entries)


class TestNameMap(ByHand):
    """A cached name map as torch-tensorrt 2.12 writes it."""

    def make_strategy(self) -> Any:
        return NameMapStrategy()

    def make_request(self, seed: int) -> MapRequest:
        found = mapped()
        module: Any = Modules({name: Engine(one) for name, one in found.maps.items()})
        plan = RefitPlan(found.data, {})
        source = TensorMap(weights(seed))
        return MapRequest(plan, module, source, plan.ledger, found.kept)


class Modules:
    """A module with engines only."""

    def __init__(self, engines: dict[str, Engine]) -> None:
        self.engines = engines
