"""FP8 in TensorRT networks: a refit gives the engine that the new model would build."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import refitkit
import torch
from refitkit.errors import VerificationError, WeightMismatchError

import refitkit_quant

pytest.importorskip("modelopt")
pytest.importorskip("tensorrt_rtx")

AMAX, INPUT = "a.weight_quantizer._amax", "a.input_quantizer._amax"
WEIGHT_SLOT = "a.weight_quantizer/quantize_op_1_quantize_input CONSTANT"


@dataclass(frozen=True)
class Network:
    """A compiled FP8 network, and ModelOpt's steps."""

    modelopt: Any
    pipeline: Any
    compiled: Any
    scheme: Any

    def refit(self, weights, **how):
        how.setdefault("verify", "engine-bytes")
        return self.pipeline.refit(self.compiled, weights, **how).report

    def built(self, seed):
        """The bytes and slots of an engine that was never refitted."""
        program = self.modelopt.program(self.modelopt.quantized(seed))
        return state_of(self.pipeline.compile(program, "tensorrt_network"))


def state_of(compiled):
    ((name, engine),) = compiled.opened.engines.items()
    return compiled.opened.engine_bytes(name), {n: engine.read(n).clone() for n in engine.slots}


@pytest.fixture(scope="module")
def network(modelopt, with_scheme):
    side = modelopt("fp8")
    model = side.quantized(0)
    scheme = refitkit_quant.scheme_of(model)
    pipeline = with_scheme(scheme)
    return Network(
        side, pipeline, pipeline.compile(side.program(model), "tensorrt_network"), scheme
    )


@pytest.fixture(scope="module")
def other(network):
    """The network that is built from the model of seed 1."""
    return network.built(1)


def test_float_weights_and_a_new_calibration(network, other, same):
    report = network.refit(network.modelopt.calibrated(network.modelopt.quantized(1)))
    engine_bytes, slots = state_of(network.compiled)
    assert same(slots, other[1])
    assert engine_bytes == other[0]
    assert report.verification.verifier == "engine-bytes"
    for row in report.transforms:
        (measure,) = row.measures
        assert row.gives[0] == measure.name == row.takes[0]
        assert 0.02 < measure.max_abs_error / measure.scale < 0.04  # half a step of E4M3


def test_the_state_dict_of_the_quantized_model(network, other):
    network.refit(network.modelopt.quantized(1).state_dict())
    assert state_of(network.compiled)[0] == other[0]


def test_a_checkpoint_of_quantized_weights(network, other, same):
    """Scales have the same bits; weights are those that the checkpoint represents."""
    weights = network.modelopt.checkpoint(network.modelopt.quantized(1))
    assert weights["a.weight"].dtype is torch.float8_e4m3fn
    report = network.refit(weights)
    _, slots = state_of(network.compiled)
    scales = {n: v for n, v in slots.items() if not n.endswith("quantize_input CONSTANT")}
    assert same(scales, {n: other[1][n] for n in scales})
    assert len(scales) == len(slots) - 2
    exact = weights["a.weight"].float() * weights["a.weight_scale"]
    assert torch.equal(slots[WEIGHT_SLOT], exact)
    again = (slots[WEIGHT_SLOT] / weights["a.weight_scale"]).to(torch.float8_e4m3fn)
    assert torch.equal(again.float(), weights["a.weight"].float())
    assert all(row.measures[0].max_abs_error < 1e-6 for row in report.transforms)
    assert state_of(network.compiled)[0] == other[0]  # TensorRT quantizes both to the same bits


def test_a_to_b_to_a(network, other):
    a = network.modelopt.calibrated(network.modelopt.quantized(0))
    network.refit(a)
    before = state_of(network.compiled)[0]
    network.refit(network.modelopt.quantized(1).state_dict())
    assert state_of(network.compiled)[0] == other[0] != before
    network.refit(a)
    assert state_of(network.compiled)[0] == before


def test_one_layer_keeps_the_scale_of_its_input(network, other, same):
    network.refit(network.modelopt.quantized(0).state_dict())
    _, before = state_of(network.compiled)
    network.refit({"a.weight": network.modelopt.floats(1).a.weight}, partial=True, verify="weights")
    _, after = state_of(network.compiled)
    changed = {name for name in after if not same({"": after[name]}, {"": before[name]})}
    assert changed == {WEIGHT_SLOT, "a.weight_quantizer/quantize_op_1_scale CONSTANT"}
    for name in changed:
        assert same({"": after[name]}, {"": other[1][name]})


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    ("name", "scheme"),  # without a scheme, names of checkpoints are no more than unexpected
    [
        (AMAX, True),
        (INPUT, True),
        (AMAX, False),
        (INPUT, False),
        ("a.weight_scale", True),
        ("a.input_scale", True),
    ],
)
def test_a_scale_without_its_weight(network, with_scheme, partial, scheme, name):
    weights = {} if partial else network.modelopt.quantized(1).state_dict()
    for own in ("a.weight", AMAX, INPUT):
        weights.pop(own, None)
    weights[name] = torch.tensor(1.0)
    before = state_of(network.compiled)[0]
    pipeline = network.pipeline if scheme else with_scheme(None)
    with pytest.raises(WeightMismatchError) as info:
        pipeline.refit(network.compiled, weights, partial=partial)
    assert state_of(network.compiled)[0] == before
    found = {p.subject: p for p in info.value.problems if p.kind == "scale without weight"}
    assert found[name].wanted == "a.weight"


def test_a_weight_without_its_scale_and_without_a_scheme(network, with_scheme):
    weights = {"a.weight": network.modelopt.floats(1).a.weight}
    plan = network.compiled.plan.noting(attached={})
    with pytest.raises(WeightMismatchError) as info:
        with_scheme(None).refit(network.compiled, weights, plan=plan, partial=True)
    (problem,) = (p for p in info.value.problems if p.kind == "weight without scale")
    assert (problem.subject, problem.wanted) == ("a.weight", AMAX)


def test_a_limit_of_the_error(network, with_scheme):
    before = state_of(network.compiled)
    weights = network.modelopt.calibrated(network.modelopt.quantized(2))
    with pytest.raises(VerificationError) as info:
        with_scheme(network.scheme, error_limit=0.01).refit(network.compiled, weights)
    assert state_of(network.compiled)[0] == before[0]
    assert {p.subject for p in info.value.problems} == {"a.weight", "b.weight"}
    assert info.value.report.transforms


def test_a_calibration_that_clips_is_measured(network, with_scheme):
    weights = network.modelopt.quantized(2).state_dict()
    weights[AMAX] = weights[AMAX] / 4
    with pytest.raises(VerificationError) as info:
        with_scheme(network.scheme, error_limit=0.5).refit(network.compiled, weights)
    (problem,) = info.value.problems
    assert problem.subject == "a.weight"
    assert "0.75 of the largest element" in problem.hint


def test_a_plan_is_proved_with_a_scheme_in_the_settings(network):
    program = network.modelopt.program(network.modelopt.quantized(0))
    network.pipeline.plan(program, network.compiled, prove=True)


def test_a_saved_network_and_its_scheme(network, other, tmp_path):
    network.compiled.save(tmp_path / "net")
    network.scheme.save(tmp_path / "net.quant.json")
    settings = {"plugin_settings": {"quant": {"scheme": tmp_path / "net.quant.json"}}}
    pipeline = refitkit.Pipeline(settings)
    compiled = pipeline.load(tmp_path / "net")
    weights = network.modelopt.calibrated(network.modelopt.quantized(1))
    pipeline.refit(compiled, weights, verify="engine-bytes")
    assert state_of(compiled)[0] == other[0]
