"""Refused weights: the error lists all problems, and the module keeps its weights."""

from __future__ import annotations

import pytest
import torch
from refitkit.errors import ConfigError, WeightMismatchError

from refitkit_quant.torchao_rules import groups

pytest.importorskip("torchao")

FLOAT = "a.weight"
VALUES = "a.parametrizations.weight.original0"
SCALE = "a.parametrizations.weight.original1"
POINTS = "a.parametrizations.weight.original2"


def problems_with(int8, weights, same, kind=WeightMismatchError, **how):
    before = int8.slots()
    with pytest.raises(kind) as info:
        int8.refit(weights, **how)
    assert same(int8.slots(), before)
    return {(problem.subject, problem.kind): problem for problem in info.value.problems}


@pytest.mark.parametrize("partial", [False, True])
def test_a_scale_without_its_weight(int8, same, partial):
    quantized = int8.eager(int8.floats(1)).state_dict()
    rest = {} if partial else int8.floats(1).state_dict()
    rest.pop(FLOAT, None)
    found = problems_with(int8, {**rest, SCALE: quantized[SCALE]}, same, partial=partial)
    (problem,) = found.values()
    assert (problem.subject, problem.kind) == (SCALE, "part without the others")
    assert VALUES in problem.wanted


def test_values_without_their_scale(int8, same):
    quantized = int8.eager(int8.floats(1)).state_dict()
    found = problems_with(int8, {VALUES: quantized[VALUES]}, same, partial=True)
    assert found[VALUES, "part without the others"].wanted == f"{SCALE}, {POINTS}"


def test_float_and_quantized_at_once(int8, same):
    quantized = int8.eager(int8.floats(1)).state_dict()
    weights = {**int8.floats(1).state_dict(), VALUES: quantized[VALUES], SCALE: quantized[SCALE]}
    assert (FLOAT, "given twice") in problems_with(int8, weights, same)


def test_weights_of_other_shapes_and_dtypes_all_at_once(int8, same):
    weights = int8.floats(1).state_dict()
    weights["a.weight"] = weights["a.weight"].t()
    weights["b.weight"] = weights["b.weight"].half()
    weights["head.weight"] = weights["head.weight"].bfloat16()
    found = problems_with(int8, weights, same)
    assert found.keys() == {("a.weight", "shape"), ("b.weight", "dtype"), ("head.weight", "dtype")}
    assert found["b.weight", "dtype"].wanted == "float32"


def test_a_weight_that_is_missing_is_named_as_the_checkpoint_would(int8, same):
    weights = int8.floats(1).state_dict()
    del weights["b.weight"]
    del weights["head.weight"], weights["emb.weight"]
    found = problems_with(int8, weights, same)
    assert found.keys() == {("b.weight", "missing"), ("head.weight", "missing")}
    assert "emb.weight" in found["head.weight", "missing"].hint


@pytest.mark.parametrize("check_finite", [True, False])
def test_every_weight_that_is_not_finite(int8, same, check_finite):
    weights = int8.floats(1).state_dict()
    weights["a.weight"][3, 4] = torch.nan
    weights["head.weight"] = weights["head.weight"].clone()
    weights["head.weight"][0, 1] = torch.inf
    settings = {"plugin_settings": {"quant": {"scheme": int8.scheme}}, "check_finite": check_finite}
    before = int8.slots()
    import refitkit

    with pytest.raises(WeightMismatchError) as info:
        refitkit.Pipeline(settings).refit(int8.compiled, weights)
    assert same(int8.slots(), before)
    found = {problem.subject: problem.found for problem in info.value.problems}
    assert found == {
        "a.weight": "1 of 2048 elements, the first at (3, 4)",
        "head.weight": "1 of 320 elements, the first at (0, 1)",
    }


def test_a_tensor_that_is_quantized_and_not_unwrapped(int8, same):
    import copy

    from torchao.quantization import quantize_

    model = copy.deepcopy(int8.floats(1))
    quantize_(model, int8.config)
    found = problems_with(int8, model.state_dict(), same)
    assert (FLOAT, "unusable") in found


def test_a_scheme_of_another_model(int8, made, same):
    other = made("int4-group-8")
    before = int8.slots()
    with pytest.raises(ConfigError) as info:
        other.pipeline.refit(int8.compiled, int8.floats(1))
    assert same(int8.slots(), before)
    subjects = {problem.subject for problem in info.value.problems}
    assert f"plugin_settings.quant.scheme: {SCALE}" in subjects


def test_a_scheme_with_names_that_the_program_has_not(int8, same, with_scheme):
    text = int8.scheme.model_dump_json().replace("a.parametrizations", "z.parametrizations")
    scheme = type(int8.scheme).model_validate_json(text)
    with pytest.raises(ConfigError) as info:
        with_scheme(scheme).refit(int8.compiled, int8.floats(1))
    assert {problem.kind for problem in info.value.problems} == {"not in the program"}


def test_without_torchao(int8, same, monkeypatch):
    monkeypatch.setattr(groups, "installed_version", lambda: None)
    before = int8.slots()
    with pytest.raises(ConfigError, match="not installed") as info:
        int8.refit(int8.floats(1))
    assert "refitkit-quant[torchao]" in info.value.hint
    assert same(int8.slots(), before)
    int8.refit(int8.eager(int8.floats(1)).state_dict())  # needs no torchao


@pytest.mark.parametrize(("version", "right"), [("0.19.0", False), ("0.18.7+cpu", True)])
def test_another_torchao_may_round_otherwise(int8, same, monkeypatch, version, right):
    monkeypatch.setattr(groups, "installed_version", lambda: version)
    if right:
        int8.refit(int8.floats(1))
        return
    with pytest.raises(ConfigError, match="another torchao") as info:
        int8.refit(int8.floats(1))
    assert info.value.problems[0].found == version


def test_without_a_scheme_float_names_are_strange(int8, with_scheme, same):
    before, plan = int8.slots(), int8.compiled.plan.noting(attached={})
    with pytest.raises(WeightMismatchError) as info:
        with_scheme(None).refit(int8.compiled, int8.floats(1).state_dict(), plan=plan)
    assert same(int8.slots(), before)
    assert (FLOAT, "unexpected") in {(p.subject, p.kind) for p in info.value.problems}


def test_a_plan_with_a_wrong_scheme(int8, with_scheme, same):
    before = int8.slots()
    plan = int8.compiled.plan.noting(attached={"quant": {"weights": [{"tool": "mine"}]}})
    with pytest.raises(ConfigError, match="scheme that the plan keeps is invalid") as info:
        with_scheme(None).refit(int8.compiled, int8.floats(1).state_dict(), plan=plan)
    assert same(int8.slots(), before)
    assert info.value.problems[0].subject == "weights.0"


def test_the_error_names_the_float_weight(int8, same):
    weights = int8.floats(1).state_dict()
    del weights[FLOAT]
    (problem,) = problems_with(int8, weights, same).values()
    assert (problem.subject, problem.kind) == (FLOAT, "missing")
    assert problem.hint.startswith("pass it")
