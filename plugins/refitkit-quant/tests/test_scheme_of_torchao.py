"""Reading a scheme from torchao's tensors, with a proof for each rule."""

from __future__ import annotations

import copy

import pytest
import torch
from refitkit.errors import ConfigError, UnsupportedTargetError

import refitkit_quant
from refitkit_quant.scheme import Int8WeightOnly, IntxWeightOnly

pytest.importorskip("torchao")

from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import (
    IntxChooseQParamsAlgorithm,
)
from torchao.utils import unwrap_tensor_subclass

INT8 = {"set_inductor_config": False}


def quantized(model, config, filter_fn=None):
    model = copy.deepcopy(model)
    quantize_(model, config, filter_fn=filter_fn)
    return model


@pytest.mark.parametrize(
    ("granularity", "rule"),
    [
        (PerRow(), Int8WeightOnly(granularity="row")),
        (PerTensor(), Int8WeightOnly(granularity="tensor")),
        (PerGroup(8), Int8WeightOnly(granularity="group", group_size=8)),
    ],
)
def test_int8_tells_everything_itself(float_net, granularity, rule):
    model = quantized(float_net(0), Int8WeightOnlyConfig(granularity=granularity, **INT8))
    scheme = refitkit_quant.scheme_of(model)
    assert [weight.weight.name for weight in scheme.weights] == [
        "a.weight",
        "b.weight",
        "head.weight",
    ]
    assert {weight.rule for weight in scheme.weights} == {rule}
    assert scheme.versions.keys() == {"torchao"}
    assert scheme == refitkit_quant.scheme_of(unwrap_tensor_subclass(model))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("mapping", list(MappingType))
def test_the_original_weights_tell_the_rule(float_net, bits, group, mapping):
    original = float_net(0)
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group) if group else PerAxis(0),
        mapping_type=mapping,
    )
    model = quantized(original, config)
    (rule,) = {w.rule for w in refitkit_quant.scheme_of(model, original).weights}
    assert rule == IntxWeightOnly(bits=bits, group_size=group, mapping=mapping.name.lower())
    assert (
        refitkit_quant.scheme_of(model, original.state_dict(), config=config).weights[0].rule
        == rule
    )
    assert refitkit_quant.scheme_of(model, config=config).weights[0].rule == rule


def test_hqq_is_told_from_the_others(float_net):
    original = float_net(0)
    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=PerGroup(16),
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
    )
    model = quantized(original, config)
    (rule,) = {w.rule for w in refitkit_quant.scheme_of(model, original).weights}
    assert rule.algorithm == "hqq_scale_only"


def test_what_the_tensors_do_not_tell_is_asked_for(float_net):
    model = quantized(float_net(0), IntxWeightOnlyConfig(weight_dtype=torch.int4))
    with pytest.raises(ConfigError) as info:
        refitkit_quant.scheme_of(model)
    problem = info.value.problems[0]
    assert (problem.subject, problem.kind) == ("a.weight", "several rules")
    assert "mapping=symmetric)" in problem.found.replace(", algorithm=affine", "")
    assert "original=" in problem.hint


def test_originals_for_which_rules_agree_decide_nothing(float_net):
    original = float_net(0)
    torch.nn.init.zeros_(original.b.weight)
    model = quantized(original, IntxWeightOnlyConfig(weight_dtype=torch.int4))
    with pytest.raises(ConfigError) as info:
        refitkit_quant.scheme_of(model, original)
    assert [problem.subject for problem in info.value.problems] == ["b.weight"]
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4)
    assert refitkit_quant.scheme_of(model, original, config=config)


def test_other_originals_are_refused(float_net):
    model = quantized(float_net(0), Int8WeightOnlyConfig(**INT8))
    with pytest.raises(UnsupportedTargetError) as info:
        refitkit_quant.scheme_of(model, float_net(1))
    assert {problem.kind for problem in info.value.problems} == {"not made from the original"}
    with pytest.raises(UnsupportedTargetError) as info:
        refitkit_quant.scheme_of(model, {})
    assert {problem.kind for problem in info.value.problems} == {"not in the original"}
    with pytest.raises(UnsupportedTargetError):
        refitkit_quant.scheme_of(model, float_net(0).half())


@pytest.mark.parametrize(
    "config",
    [
        Int8WeightOnlyConfig(granularity=PerGroup(8), **INT8),
        Int8WeightOnlyConfig(granularity=PerTensor(), **INT8),
        IntxWeightOnlyConfig(weight_dtype=torch.int8),
    ],
)
def test_another_config_is_refused(float_net, config):
    model = quantized(float_net(0), Int8WeightOnlyConfig(**INT8))
    with pytest.raises(UnsupportedTargetError) as info:
        refitkit_quant.scheme_of(model, config=config)
    assert {problem.kind for problem in info.value.problems} == {"not by this config"}


@pytest.mark.parametrize(
    "config",
    [
        IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerGroup(8)),
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
        Int8WeightOnlyConfig(granularity=PerGroup(8), **INT8),
    ],
)
def test_another_config_of_int4_is_refused(float_net, config):
    right = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(8))
    model = quantized(float_net(0), right)
    with pytest.raises(UnsupportedTargetError):
        refitkit_quant.scheme_of(model, config=config)


def test_a_config_is_checked_against_the_originals(float_net):
    original = float_net(0)
    model = quantized(original, IntxWeightOnlyConfig(weight_dtype=torch.int4))
    wrong = IntxWeightOnlyConfig(
        weight_dtype=torch.int4, mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR
    )
    with pytest.raises(UnsupportedTargetError) as info:
        refitkit_quant.scheme_of(model, original, config=wrong)
    assert {problem.kind for problem in info.value.problems} == {"not made from the original"}


def test_layers_may_differ_and_some_stay_float(float_net):
    original = float_net(0)
    model = quantized(original, Int8WeightOnlyConfig(**INT8), lambda m, name: name == "a")
    quantize_(
        model,
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(8)),
        filter_fn=lambda m, name: name == "b",
    )
    first, second = refitkit_quant.scheme_of(model, original).weights
    assert (first.rule.kind, second.rule.kind) == ("int8-weight-only", "intx-weight-only")
    assert second.weight.name == "b.weight"


def test_ties_are_learned_from_the_original(float_net):
    original = float_net(0)
    model = quantized(original, Int8WeightOnlyConfig(**INT8))
    assert refitkit_quant.scheme_of(model).weights[2].also == ()
    assert refitkit_quant.scheme_of(model, original).weights[2].also == ("emb.weight",)
    assert refitkit_quant.scheme_of(model, original.state_dict()).weights[2].also == ("emb.weight",)


def test_a_config_of_scales_in_float32(float_net):
    original = float_net(0, torch.bfloat16)
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, scale_dtype=torch.float32)
    (rule,) = {
        w.rule for w in refitkit_quant.scheme_of(quantized(original, config), original).weights
    }
    assert rule.scale_dtype == "float32"


@pytest.mark.parametrize(
    "config", [Int8DynamicActivationInt8WeightConfig(), Float8WeightOnlyConfig()]
)
def test_what_has_no_rule_is_refused_by_name(float_net, config):
    model = quantized(float_net(0), config)
    with pytest.raises(UnsupportedTargetError) as info:
        refitkit_quant.scheme_of(model)
    assert [problem.subject for problem in info.value.problems] == [
        "a.weight",
        "b.weight",
        "head.weight",
    ]


def test_a_float_model_has_no_scheme(float_net):
    with pytest.raises(UnsupportedTargetError, match="No weight of this Net is quantized"):
        refitkit_quant.scheme_of(float_net(0))


def test_nothing_is_changed_by_reading(float_net, same):
    original = float_net(0)
    model = unwrap_tensor_subclass(quantized(original, Int8WeightOnlyConfig(**INT8)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    floats = {name: value.clone() for name, value in original.state_dict().items()}
    refitkit_quant.scheme_of(model, original)
    assert same(model.state_dict(), before)
    assert same(original.state_dict(), floats)
    assert original.a.weight.requires_grad


def test_an_int8_tensor_that_the_config_does_not_make_is_refused(float_net):
    from torchao.quantization import Int8Tensor

    model = float_net(0)
    weight = model.b.weight.detach() + 1
    tensor = Int8Tensor.from_hp(weight, PerRow(), mapping_type=MappingType.ASYMMETRIC)
    model.b.weight = torch.nn.Parameter(tensor, requires_grad=False)
    with pytest.raises(UnsupportedTargetError) as info:
        refitkit_quant.scheme_of(model)
    assert [(p.subject, p.kind) for p in info.value.problems] == [("b.weight", "no rule")]


def test_a_scale_of_ones_own_is_found_out_by_the_original(float_net):
    from torchao.quantization import Int8Tensor

    original = float_net(0)
    model = copy.deepcopy(original)
    weight = original.b.weight.detach()
    tensor = Int8Tensor.from_hp(weight, PerRow(), scale=torch.full((32, 1), 0.01))
    model.b.weight = torch.nn.Parameter(tensor, requires_grad=False)
    with pytest.raises(UnsupportedTargetError):
        refitkit_quant.scheme_of(model, original)


def test_every_part_counts(float_net):
    original = float_net(0)
    model = quantized(original, Int8WeightOnlyConfig(**INT8))
    model.b.weight.scale.mul_(2)
    with pytest.raises(UnsupportedTargetError) as info:
        refitkit_quant.scheme_of(model, original)
    assert [problem.subject for problem in info.value.problems] == ["b.weight"]


def test_torchs_own_unwrapping_gives_the_same_names(float_net):
    from torch._functorch._aot_autograd.subclass_parametrization import (
        unwrap_tensor_subclass_parameters,
    )

    model = quantized(float_net(0), Int8WeightOnlyConfig(**INT8))
    scheme = refitkit_quant.scheme_of(model)
    unwrapped = unwrap_tensor_subclass_parameters(model)
    assert refitkit_quant.scheme_of(unwrapped) == scheme
    names = {part.name for weight in scheme.weights for part in weight.parts}
    assert names <= unwrapped.state_dict().keys()


def test_embeddings_are_weights_like_others(float_net):
    original = float_net(0)
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(8))
    model = quantized(original, config, lambda m, name: name == "emb")
    (weight,) = refitkit_quant.scheme_of(model, original).weights
    assert (weight.weight.name, weight.also) == ("emb.weight", ("head.weight",))
    assert weight.parts[1].shape == (10, 4)


def test_a_convolution_by_its_input_channels():
    original = torch.nn.Sequential(torch.nn.Conv2d(16, 4, 3))
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(8))
    model = quantized(original, config, lambda m, name: name == "0")
    (weight,) = refitkit_quant.scheme_of(model, original).weights
    assert weight.rule == IntxWeightOnly(bits=4, group_size=8, mapping="symmetric")
