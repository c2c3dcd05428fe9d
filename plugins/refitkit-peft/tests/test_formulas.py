"""Sums against the models that peft merges, for every kind of layer and every setting."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft_models import assert_close, make_adapter, make_net, open_weights, same, weights_of
from refitkit.errors import WeightMismatchError
from safetensors.torch import load_file

import refitkit_peft
from refitkit_peft import Lora

pytest.importorskip("peft")

LAYERS = ["emb", "one", "two", "small", "three", "lin", "flat", "head"]
CONFIGS = {
    "linear": {"target_modules": ["lin", "flat", "head"]},
    "embedding": {"target_modules": ["emb"]},
    "convolutions": {"target_modules": ["one", "two", "small", "three"]},
    "all": {"target_modules": LAYERS},
    "rslora": {"target_modules": LAYERS, "use_rslora": True},
    "patterns": {
        "target_modules": LAYERS,
        "rank_pattern": {"lin": 2, "o.e": 8},
        "alpha_pattern": {"flat": 3, "^head": 7, "t(wo|hree)": 1},
    },
    "dora": {"target_modules": LAYERS, "use_dora": True},
    "dora-rslora": {"target_modules": LAYERS, "use_dora": True, "use_rslora": True},
    "lora-bias": {"target_modules": ["lin", "head", "two", "one", "three"], "lora_bias": True},
}
WHOLE = {
    "bias-lora-only": {"target_modules": ["lin", "two"], "bias": "lora_only"},
    "bias-all": {"target_modules": ["lin", "two"], "bias": "all"},
    "modules-to-save": {"target_modules": ["lin"], "modules_to_save": ["head", "norm"]},
}


def check(made, net, scale, **how):
    source = open_weights(Lora(net, {str(made.path): scale}, **how))
    found, wanted, base = weights_of(source), made.merged(scale), net.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(found[name], value, name)
    moved = {name for name in base if not torch.equal(wanted[name], base[name])}
    assert moved <= set(source.touched)
    assert same(
        {n: found[n] for n in found if n not in source.touched},
        {n: base[n] for n in found if n not in source.touched},
    )
    return source


@pytest.mark.parametrize("scale", [1.0, 0.3, -1.25])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_sum_is_what_peft_merges(kind, scale, net, adapter):
    source = check(adapter(**CONFIGS[kind]), net, scale)
    assert source.touched


@pytest.mark.parametrize("kind", WHOLE)
def test_weights_that_are_saved_whole_replace_those_of_the_base(kind, net, adapter):
    made = adapter(**WHOLE[kind])
    source = check(made, net, 1.0)
    wholes = set(source.touched) - {"lin.weight", "two.weight"}
    assert wholes
    merged = made.merged()
    for name in wholes:
        assert torch.equal(source.get(name), merged[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["all", "dora", "lora-bias"])
def test_in_other_dtypes_the_exact_sum_is_rounded_once(kind, dtype, tmp_path):
    """The truth is peft's merge in float64; in other dtypes peft rounds several times."""
    net = make_net(3, dtype)
    made = make_adapter(net, tmp_path / "a", **CONFIGS[kind])
    source = open_weights(Lora(net, {str(made.path): 0.7}))
    model = copy.deepcopy(made.model).double()
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.7)
    exact = dict(model.merge_and_unload().state_dict())
    for name in source.touched:
        found, eps = source.get(name), torch.finfo(dtype).eps
        assert found.dtype is dtype
        error = (found.double() - exact[name]).abs()
        # half a unit in the last place, plus the error of a float32 sum
        slack = (0.5 * eps + 8 * torch.finfo(torch.float32).eps) if dtype.itemsize < 4 else 8 * eps
        tiny = torch.finfo(dtype).smallest_normal * eps
        limit = slack * exact[name].abs() + 4e-7 * float(exact[name].abs().max()) + tiny
        if dtype is torch.float64:
            limit = slack * float(exact[name].abs().max())
        assert bool((error <= limit).all()), name


class Gpt(torch.nn.Module):
    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.square, self.wide = Conv1D(12, 12), Conv1D(20, 12)

    def forward(self, x):
        return self.wide(self.square(x))


def test_layers_that_store_their_weights_transposed(tmp_path):
    torch.manual_seed(0)
    net = Gpt().eval()
    fields = {"target_modules": ["square", "wide"], "fan_in_fan_out": True}
    check(make_adapter(net, tmp_path / "a", **fields), net, 0.5)
    check(make_adapter(net, tmp_path / "b", use_dora=True, **fields), net, 1.0)


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x)[0]


def test_attention_is_what_peft_computes(tmp_path):
    """peft 0.21 adds the product for ``out_proj`` twice, also in forward."""
    torch.manual_seed(0)
    net = Attention().eval()
    made = make_adapter(net, tmp_path / "a", target_modules=["attn"])
    source = check(made, net, 1.0)
    assert set(source.touched) == {"attn.in_proj_weight", "attn.out_proj.weight"}
    ours = Attention().eval()
    ours.load_state_dict(weights_of(source))
    x = torch.randn(2, 5, 12)
    with torch.no_grad():
        assert_close(ours(x), made.model(x))


def test_of_a_later_peft_nobody_knows_how_often_it_adds_to_out_proj(tmp_path):
    net = Attention().eval()
    made = make_adapter(net, tmp_path / "a", target_modules=["attn"])
    config = made.path / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "peft_version": "0.22.0"}))
    with pytest.raises(WeightMismatchError) as caught:
        open_weights(Lora(net, {str(made.path): 1.0}))
    assert [problem.kind for problem in caught.value.problems] == ["unclear"]


def test_several_adapters_are_summed(net, adapter):
    """The truth is the base plus the delta of each adapter, without ``add_weighted_adapter``."""
    one, other = adapter(1, target_modules=LAYERS), adapter(2, r=2, target_modules=["lin", "emb"])
    source = open_weights(Lora(net, {str(one.path): 0.7, str(other.path): -0.2}))
    base, a, b = net.state_dict(), one.merged(0.7), other.merged(-0.2)
    for name, value in weights_of(source).items():
        assert_close(value, a[name] + (b[name] - base[name]), name)


def test_neither_order_nor_names_of_adapters_matter(net, adapter):
    made = [adapter(seed, target_modules=["lin", "two"]) for seed in (1, 2, 3)]
    base = refitkit_peft.Base(net, "host", keep=0)
    found = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        for place in order:
            base.add(f"{order}-{place}", made[place].path)
        scales = {f"{order}-{place}": 0.1 + place for place in order}
        found.append(weights_of(open_weights(Lora(base, scales))))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads_or_settings_around(threads, tmp_path):
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(700, 900), "b": torch.nn.Conv2d(64, 96, 3)})
    made = make_adapter(net, tmp_path / "a", r=16, target_modules=["a", "b"])
    base = refitkit_peft.Base(net, "host", keep=0)
    alone = weights_of(open_weights(Lora(base, {str(made.path): 0.7})))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
            again = weights_of(open_weights(Lora(base, {str(made.path): 0.7})))
    finally:
        torch.set_num_threads(before)
    assert same(alone, again)


def unknown() -> str:
    raise RuntimeError("precision was set in two ways")


@pytest.mark.parametrize(
    ("told", "dtype"),
    [
        (lambda: "highest", torch.float32),
        (lambda: "high", torch.float64),
        (lambda: "medium", torch.float64),
        (unknown, torch.float64),
    ],
)
def test_products_are_exact_whatever_precision_a_user_allows(
    told, dtype, net, adapter, monkeypatch
):
    """Not every CPU uses the lower precision, so the test also checks the dtypes of products."""
    made = adapter(target_modules=LAYERS)
    multiply, seen = torch.addmm, set()
    monkeypatch.setattr(torch, "get_float32_matmul_precision", told)
    monkeypatch.setattr(torch, "addmm", lambda a, b, c: seen.add(b.dtype) or multiply(a, b, c))
    found = weights_of(open_weights(Lora(net, {str(made.path): 0.7})))
    monkeypatch.undo()
    assert seen == {dtype}
    for name, value in made.merged(0.7).items():
        assert_close(found[name], value, name)


def test_a_scale_of_zero_leaves_an_adapter_out(net, adapter):
    source = open_weights(Lora(net, {str(adapter(target_modules=LAYERS).path): 0}))
    assert not source.touched
    assert same(weights_of(source), net.state_dict())


def test_nothing_that_is_given_is_changed(net, adapter):
    made = adapter(target_modules=LAYERS, use_dora=True)
    before = copy.deepcopy(net.state_dict())
    file = made.path / "adapter_model.safetensors"
    content = file.read_bytes()
    tensors = load_file(file)
    config = json.loads((made.path / "adapter_config.json").read_text())
    base = refitkit_peft.Base(net)
    base.add("a", tensors, config=config)
    kept = {name: value.clone() for name, value in tensors.items()}
    weights_of(open_weights(Lora(base, {"a": 1.0})))
    assert same(net.state_dict(), before)
    assert same(tensors, kept)
    assert file.read_bytes() == content
