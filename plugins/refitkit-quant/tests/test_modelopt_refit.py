"""INT8 and FP8 of ModelOpt on AOTInductor: formulas, checkpoints and refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from refitkit.errors import ConfigError, WeightMismatchError

import refitkit_quant

pytest.importorskip("modelopt")

WEIGHT, AMAX, INPUT = "a.weight", "a.weight_quantizer._amax", "a.input_quantizer._amax"


@dataclass(frozen=True)
class Made:
    side: Any
    pipeline: Any
    compiled: Any
    scheme: Any
    dtype: torch.dtype

    def refit(self, weights, **how):
        return self.pipeline.refit(self.compiled, weights, **how).report

    def slots(self):
        (engine,) = self.compiled.opened.engines.values()
        return {name: engine.read(name).clone() for name in engine.slots}

    def quantized(self, seed):
        return self.side.quantized(seed, self.dtype)

    def calibrated(self, seed):
        """Float weights, and the calibration of inputs."""
        return {n: v.clone() for n, v in self.side.calibrated(self.quantized(seed)).items()}


def make(side, with_scheme, dtype):
    model = side.quantized(0, dtype)
    scheme = refitkit_quant.scheme_of(model)
    pipeline = with_scheme(scheme)
    return Made(side, pipeline, pipeline.compile(side.program(model)), scheme, dtype)


@pytest.fixture(scope="module")
def int8_module(modelopt, with_scheme):
    return make(modelopt("int8"), with_scheme, torch.float32)


@pytest.fixture
def int8(int8_module):
    """The INT8 case with the weights of seed 0."""
    int8_module.refit(int8_module.quantized(0).state_dict())
    return int8_module


@pytest.fixture(scope="module")
def half(modelopt, with_scheme):
    return make(modelopt("int8"), with_scheme, torch.bfloat16)


def test_a_float_checkpoint_gives_what_modelopt_makes_of_it(int8, same):
    report = int8.refit(int8.calibrated(1), inputs=(int8.side.inputs(3),))
    wanted = int8.quantized(1).state_dict()
    slots = int8.slots()
    assert same(slots, {name: wanted[name] for name in slots})
    assert slots[AMAX].shape == (32, 1)
    assert report.verification.ok
    measure = report.transforms[0].measures[0]
    assert measure.max_abs_error <= float(slots[AMAX].max()) / 127 / 2 * 1.001


def test_a_half_checkpoint_into_a_half_model(half, same):
    half.refit(half.calibrated(1))
    wanted, slots = half.quantized(1).state_dict(), half.slots()
    assert same(slots, {name: wanted[name] for name in slots})
    assert slots[AMAX].dtype is torch.bfloat16


@pytest.mark.parametrize("which", ["int8", "half"])
def test_a_checkpoint_of_quantized_weights(which, request, same):
    made = request.getfixturevalue(which)
    model = made.quantized(1)
    weights = made.side.checkpoint(model)
    made.refit(weights)
    slots = made.slots()
    assert weights[WEIGHT].dtype is torch.int8
    bound = torch.tensor(127.0)
    assert torch.equal(slots[AMAX].float().reshape(-1) / bound, weights["a.weight_scale"])
    assert torch.equal(slots[INPUT].float() / bound, weights["a.input_scale"])
    scale = slots[AMAX].float() / bound
    again = (slots[WEIGHT].float() / scale).round().to(torch.int8)
    assert torch.equal(again, weights[WEIGHT])


def problems_with(made, weights, same, **how):
    before = made.slots()
    with pytest.raises(WeightMismatchError) as info:
        made.refit(weights, **how)
    assert same(made.slots(), before)
    return {(problem.subject, problem.kind): problem for problem in info.value.problems}


def test_all_that_is_wrong_with_headers_at_once(int8, same):
    weights = int8.calibrated(1)
    weights["a.weight"] = weights["a.weight"].t()
    weights["b.weight"] = weights["b.weight"].half()
    weights["b.weight_quantizer._amax"] = torch.ones(3, 1)
    found = problems_with(int8, weights, same)
    assert found.keys() == {
        ("a.weight", "shape"),
        ("b.weight", "dtype"),
        ("b.weight_quantizer._amax", "shape"),
    }


def test_a_quantized_weight_without_its_scale(int8, same):
    weights = int8.side.checkpoint(int8.quantized(1))
    del weights["a.weight_scale"]
    found = problems_with(int8, weights, same, partial=True)
    assert found["a.weight", "weight without scale"].wanted == "a.weight_scale"


def test_scales_given_twice(int8, same):
    weights = int8.side.checkpoint(int8.quantized(1))
    state = int8.quantized(1).state_dict()
    both = {**weights, AMAX: state[AMAX], INPUT: state[INPUT]}
    found = problems_with(int8, both, same)
    assert found.keys() == {("a.weight_scale", "given twice"), (INPUT, "given twice")}


def test_the_scale_of_a_quantized_weight_beside_a_float_one(int8, same):
    weights = {**int8.calibrated(1), "a.weight_scale": torch.ones(32)}
    found = problems_with(int8, weights, same)
    assert found.keys() == {("a.weight_scale", "scale of a quantized weight")}


def test_quantized_in_another_format(int8, same):
    weights = int8.side.checkpoint(int8.quantized(1))
    weights["a.weight"] = weights["a.weight"].float().to(torch.float8_e4m3fn)
    weights["b.weight_scale"] = torch.ones(3)
    found = problems_with(int8, weights, same)
    assert found.keys() == {("a.weight", "format"), ("b.weight_scale", "shape")}


def test_every_value_that_has_no_scale(int8, same):
    weights = int8.calibrated(1)
    weights["a.weight"][4] = 0  # a whole channel
    weights["b.weight"][0, 0] = torch.nan
    found = problems_with(int8, weights, same)
    assert found.keys() == {("a.weight", "no scale"), ("b.weight", "non-finite")}
    assert found["a.weight", "no scale"].found.startswith("1 of 32 scales")
    amax = int8.quantized(1).state_dict()[AMAX].clone()
    del weights["b.weight"], weights["b.input_quantizer._amax"]
    weights[AMAX] = amax  # passing a scale helps
    int8.refit(weights, partial=True)
    assert not int8.slots()[WEIGHT][4].any()


@pytest.mark.parametrize("value", [0.0, -1.0, torch.inf, torch.nan])
def test_a_scale_must_be_positive(int8, same, value):
    weights = int8.quantized(1).state_dict()
    weights[AMAX] = weights[AMAX].clone()
    weights[AMAX][2] = value
    found = problems_with(int8, weights, same)
    assert (AMAX, "no scale") in found
    stored = int8.side.checkpoint(int8.quantized(1))
    stored["a.weight_scale"][2] = value
    found = problems_with(int8, stored, same)
    assert ("a.weight_scale", "no scale") in found


def test_a_scale_that_no_amax_has(int8, same):
    from refitkit_quant.modelopt_rules import formulas

    low = int(torch.tensor(1.99).view(torch.int32))
    candidates = torch.arange(low, low + 4096, dtype=torch.int32).view(torch.float32)
    odd = next(s for s in candidates if formulas.amax_for(s, "int8", torch.float32) is None)
    weights = int8.side.checkpoint(int8.quantized(1))
    weights["a.weight_scale"][0] = odd
    weights["b.input_scale"] = odd.clone()
    found = problems_with(int8, weights, same)
    kind = "scale without amax"
    assert found.keys() == {("a.weight_scale", kind), ("b.input_scale", kind)}


def test_a_calibration_that_is_not_max_has_to_be_given(int8, same, with_scheme):
    first = int8.scheme.weights[0].model_copy(update={"amax_is": "given"})
    scheme = int8.scheme.model_copy(update={"weights": (first, *int8.scheme.weights[1:])})
    pipeline = with_scheme(scheme)
    before = int8.slots()
    with pytest.raises(WeightMismatchError) as info:
        pipeline.refit(int8.compiled, int8.calibrated(1))
    (problem,) = info.value.problems
    assert (problem.subject, problem.wanted) == (WEIGHT, AMAX)
    assert same(int8.slots(), before)
    pipeline.refit(int8.compiled, int8.quantized(1).state_dict())


def test_a_missing_calibration_is_missing(int8, same):
    weights = int8.calibrated(1)
    del weights[INPUT]
    found = problems_with(int8, weights, same)
    assert found.keys() == {(INPUT, "missing")}


def test_a_scheme_of_another_dtype(int8, half, same):
    before = int8.slots()
    with pytest.raises(ConfigError) as info:
        half.pipeline.refit(int8.compiled, int8.calibrated(1))
    assert same(int8.slots(), before)
    assert {problem.kind for problem in info.value.problems} == {"differs"}


def test_delta_and_the_way_back(int8, same):
    int8.refit(int8.calibrated(1), delta=True)
    whole, weights = int8.slots(), int8.calibrated(1)
    weights["a.weight"] = int8.side.floats(2).a.weight.detach()
    report = int8.refit(weights, delta=True)
    assert {row.slot for row in report.ledger if row.strategy} == {WEIGHT, AMAX}
    int8.refit(int8.calibrated(1), delta=True)
    assert same(int8.slots(), whole)
