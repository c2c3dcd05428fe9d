"""The formulas of a refit against ModelOpt's own code."""

from __future__ import annotations

import pytest
import torch
from refitkit.errors import UnsupportedTargetError

import refitkit_quant
from refitkit_quant.modelopt_rules import formulas

pytest.importorskip("modelopt")

import modelopt.torch.quantization as mtq
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.utils import reduce_amax

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weight(seed, dtype=torch.float32, shape=(12, 40)):
    torch.manual_seed(seed)
    return (torch.randn(shape) * torch.logspace(-3, 1, shape[1])).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(12, 40), (6, 3, 2, 5)])
def test_amax(dtype, shape):
    value = weight(0, dtype, (12, 40)).reshape(-1)[: torch.Size(shape).numel()].reshape(shape)
    assert torch.equal(formulas.largest(value, None), reduce_amax(value))
    for axis in (0, 1, -1):
        others = [d for d in range(value.dim()) if d != axis % value.dim()]
        assert torch.equal(formulas.largest(value, axis), reduce_amax(value, others))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8(dtype):
    value = weight(1, dtype)
    for amax in (formulas.largest(value, None), torch.tensor(2.0, dtype=dtype)):
        wanted = tensor_quant.fp8_eager(value, amax)
        assert torch.equal(formulas.represented(value, amax, "fp8").to(dtype), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8(dtype):
    value = weight(2, dtype)
    value[3] = 0  # a row without a scale
    for amax in (formulas.largest(value, 0), formulas.largest(value, None)):
        wanted = tensor_quant._tensor_quant(value, amax, 8, unsigned=False, narrow_range=False)
        assert torch.equal(formulas.represented(value, amax, "int8").to(dtype), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_every_scale_that_was_computed_has_its_amax(dtype, kind):
    torch.manual_seed(0)
    amax = torch.cat([torch.rand(20_000) * 10, torch.logspace(-6, 4, 20_000)]).to(dtype)
    amax = amax[amax > 0]
    scale = formulas.scale_of(amax, kind)
    found = formulas.amax_for(scale, kind, dtype)
    assert found is not None
    assert found.dtype is dtype
    assert torch.equal(formulas.scale_of(found, kind), scale)


def test_a_scale_that_no_amax_gives():
    """One in eight float32 numbers is not a quotient by 448."""
    low = torch.tensor(1.25).view(torch.int32)
    scales = torch.arange(int(low), int(low) + 64, dtype=torch.int32).view(torch.float32)
    missing = [s for s in scales if formulas.amax_for(s, "fp8", torch.float32) is None]
    assert 0 < len(missing) < 16


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(16, 32)
        self.conv = torch.nn.Conv1d(4, 4, 1, bias=False)

    def forward(self, x):
        return self.conv(self.a(x))


def quantized(config, **change):
    torch.manual_seed(0)
    config = {**config, **change}
    return mtq.quantize(Net().eval(), config, forward_loop=lambda m: m(torch.randn(2, 4, 16)))


@pytest.mark.parametrize(
    ("config", "form", "axis"),
    [(mtq.FP8_DEFAULT_CFG, "fp8", None), (mtq.INT8_DEFAULT_CFG, "int8", 0)],
)
def test_a_scheme_is_read_off_the_quantizers(config, form, axis):
    scheme = refitkit_quant.scheme_of(quantized(config))
    assert scheme.versions.keys() == {"nvidia-modelopt"}
    assert [w.weight.name for w in scheme.weights] == ["a.weight", "conv.weight"]
    for one in scheme.weights:
        assert (one.format, one.axis, one.amax_is) == (form, axis, "max")
        assert one.amax.name == one.weight.name.replace("weight", "weight_quantizer._amax")
        assert one.input_amax is not None


def test_an_amax_that_is_not_the_largest_has_to_be_given():
    model = quantized(mtq.FP8_DEFAULT_CFG)
    model.a.weight_quantizer._amax.mul_(0.75)
    first, second = refitkit_quant.scheme_of(model).weights
    assert (first.amax_is, second.amax_is) == ("given", "max")


def test_quantizers_that_are_off_are_left_out():
    model = quantized(mtq.FP8_DEFAULT_CFG)
    model.a.weight_quantizer.disable()
    model.conv.input_quantizer.disable()
    (only,) = refitkit_quant.scheme_of(model).weights
    assert (only.weight.name, only.input_amax) == ("conv.weight", None)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, "StaticBlockScaleQuantizer"),
        (mtq.INT8_SMOOTHQUANT_CFG, "pre_quant_scale"),
        (mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG, "block_sizes"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(config, text):
    with pytest.raises(UnsupportedTargetError) as info:
        refitkit_quant.scheme_of(quantized(config))
    assert any(p.subject == "a.weight_quantizer" and text in p.found for p in info.value.problems)
