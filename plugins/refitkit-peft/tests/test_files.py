"""Adapter files of diffusers and kohya's scripts, and names of bases and adapters."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft_models import assert_close, make_adapter, make_net, open_weights, same, weights_of
from refitkit.errors import SourceError, WeightMismatchError
from safetensors.torch import load_file, save_file

import refitkit_peft
from refitkit_peft import Lora
from refitkit_peft.keys import Role, read_key

pytest.importorskip("peft")

MODULES = ["lin", "two", "small"]


def factors_of(made):
    """The factors that peft saved, by module: down, up."""
    found = load_file(made.path / "adapter_model.safetensors")
    names = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in found}
    return {
        name: tuple(found[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        for name in names
    }


def equal_to(found, wanted):
    for name, value in wanted.items():
        assert_close(found[name], value, name)


# -- forms of keys --------------------------------------------------------------------------

FORMS = {
    "diffusers": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "diffusers-old": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "diffusers-linear-layer": (
        "{}.lora_linear_layer.down.weight",
        "{}.lora_linear_layer.up.weight",
    ),
    "peft-with-a-name": (
        "base_model.model.{}.lora_A.default.weight",
        "base_model.model.{}.lora_B.default.weight",
    ),
    "peft-without-a-prefix": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "dotted-kohya": ("{}.lora_down.weight", "{}.lora_up.weight"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_without_alpha_is_read_with_the_one_that_a_user_gives(form, net, adapter, tmp_path):
    made = adapter(target_modules=MODULES)
    tensors = {
        key.format(name): factor.contiguous()
        for name, pair in factors_of(made).items()
        for key, factor in zip(FORMS[form], pair, strict=True)
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    file = str(tmp_path / "lora.safetensors")
    with pytest.raises(WeightMismatchError, match=r"The alpha of '.*' is unknown") as caught:
        open_weights(Lora(net, {file: 0.5}))
    assert {p.kind for p in caught.value.problems} == {"alpha unknown"}
    layers = (p.subject.removeprefix(f"{file}: ") for p in caught.value.problems)
    assert {layer.removeprefix("unet.") for layer in layers} == set(MODULES)
    source = open_weights(Lora(net, {file: 0.5}, alphas={file: 6}))
    equal_to(weights_of(source), made.merged(0.5))
    assert {name.rpartition(".")[0] for name in source.touched} == set(MODULES)


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_"])
def test_kohya_names_modules_with_underscores_and_keeps_alpha(prefix, tmp_path):
    net = torch.nn.ModuleDict({"outer": make_net(0), "other_two": torch.nn.Linear(3, 3)})
    names = [f"outer.{name}" for name in MODULES]
    made = make_adapter(net, tmp_path / "a", target_modules=names)
    tensors = {}
    for name, (down, up) in factors_of(made).items():
        flat = prefix + name.replace(".", "_")
        tensors[f"{flat}.lora_down.weight"], tensors[f"{flat}.lora_up.weight"] = down, up
        tensors[f"{flat}.alpha"] = torch.tensor(6.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    source = open_weights(Lora(net, {str(tmp_path / "lora.safetensors"): 1.0}))
    equal_to(weights_of(source), made.merged())
    assert len(source.touched) == 3


def test_two_modules_of_one_name_with_underscores_are_an_error(tmp_path):
    linear = torch.nn.Linear(3, 3)
    net = torch.nn.ModuleDict(
        {"a_b": linear, "a": torch.nn.ModuleDict({"b": torch.nn.Linear(3, 3)})}
    )
    tensors = {"lora_unet_a_b.lora_down.weight": torch.ones(2, 3)}
    tensors["lora_unet_a_b.lora_up.weight"] = torch.ones(3, 2)
    save_file(tensors, tmp_path / "lora.safetensors")
    file = str(tmp_path / "lora.safetensors")
    with pytest.raises(WeightMismatchError) as caught:
        open_weights(Lora(net, {file: 1.0}, alphas={file: 2}))
    (problem,) = caught.value.problems
    assert (problem.kind, problem.found) == ("ambiguous", "'a_b', 'a.b'")


def test_dora_scale_of_kohya(net, adapter, tmp_path):
    made = adapter(target_modules=MODULES, use_dora=True)
    saved = load_file(made.path / "adapter_model.safetensors")
    tensors = {}
    for name in MODULES:
        lead = f"base_model.model.{name}.lora_"
        magnitude = saved[f"{lead}magnitude_vector"]
        outputs = magnitude.numel()
        ones = (1,) * (net.get_submodule(name).weight.dim() - 1)
        tensors[f"lora_unet_{name}.lora_down.weight"] = saved[f"{lead}A.weight"]
        tensors[f"lora_unet_{name}.lora_up.weight"] = saved[f"{lead}B.weight"]
        tensors[f"lora_unet_{name}.dora_scale"] = magnitude.reshape(outputs, *ones)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(6.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    source = open_weights(Lora(net, {str(tmp_path / "lora.safetensors"): 1.0}))
    equal_to(weights_of(source), made.merged())


def test_a_file_for_a_pipeline_has_to_be_told_which_model_is_meant(net, adapter, tmp_path):
    one, other = adapter(1, target_modules=["lin"]), adapter(2, target_modules=["two"])
    tensors, metadata = {}, {}
    for component, made in (("unet", one), ("text_encoder", other)):
        for name, (down, up) in factors_of(made).items():
            tensors[f"{component}.{name}.lora_A.weight"] = down
            tensors[f"{component}.{name}.lora_B.weight"] = up
        metadata |= {f"{component}.r": 4, f"{component}.lora_alpha": 6}
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(metadata)})
    for component, made in (("unet", one), ("text_encoder", other)):
        source = open_weights(Lora(net, {str(file): 1.0}, component))
        equal_to(weights_of(source), made.merged())
    with pytest.raises(SourceError, match="is for several models") as caught:
        open_weights(Lora(net, {str(file): 1.0}))
    assert [problem.subject for problem in caught.value.problems] == ["text_encoder", "unet"]
    with pytest.raises(SourceError, match="has nothing for 'vae'"):
        open_weights(Lora(net, {str(file): 1.0}, "vae"))


@pytest.mark.parametrize(
    ("text", "role", "module", "more"),
    [
        ("base_model.model.a.b.lora_A.weight", Role.DOWN, "a.b", {}),
        ("base_model.model.a.lora_A.x.weight", Role.DOWN, "a", {"adapter": "x"}),
        ("base_model.model.a.lora_B.bias", Role.UP_BIAS, "a", {}),
        ("base_model.model.e.lora_embedding_A", Role.TABLE_DOWN, "e", {}),
        ("base_model.model.e.lora_embedding_B.x", Role.TABLE_UP, "e", {"adapter": "x"}),
        ("base_model.model.a.lora_magnitude_vector", Role.MAGNITUDE, "a", {}),
        ("base_model.model.a.lora_magnitude_vector.weight", Role.MAGNITUDE, "a", {}),
        ("base_model.model.a.lora_magnitude_vector.x", Role.MAGNITUDE, "a", {"adapter": "x"}),
        (
            "base_model.model.a.lora_magnitude_vector.x.weight",
            Role.MAGNITUDE,
            "a",
            {"adapter": "x"},
        ),
        ("base_model.model.m.base_layer.out_proj.lora_A.weight", Role.DOWN, "m.out_proj", {}),
        ("base_model.model.a.base_layer.bias", Role.WHOLE, "a.bias", {"of_base": True}),
        (
            "base_model.model.head.modules_to_save.x.weight",
            Role.WHOLE,
            "head.weight",
            {"adapter": "x"},
        ),
        ("base_model.model.head.modules_to_save.weight", Role.WHOLE, "head.weight", {}),
        (
            "unet.a.attn1.processor.to_q_lora.down.weight",
            Role.DOWN,
            "unet.a.attn1.to_q",
            {"component": "unet"},
        ),
        (
            "unet.a.attn1.processor.to_out_lora.up.weight",
            Role.UP,
            "unet.a.attn1.to_out.0",
            {"component": "unet"},
        ),
        ("a.processor.lora_A.weight", Role.DOWN, "a.processor", {}),
        ("lora_te2_a_b.alpha", Role.ALPHA, "a_b", {"component": "text_encoder_2", "flat": True}),
        ("a.hada_w1_a", Role.FOREIGN, "a.hada_w1_a", {}),
        (
            "base_model.model.a.lora_diag.weight",
            Role.FOREIGN,
            "base_model.model.a.lora_diag.weight",
            {},
        ),
    ],
)
def test_keys(text, role, module, more):
    key = read_key(text)
    assert (key.role, key.module) == (role, module)
    for name in ("adapter", "component", "flat", "of_base"):
        assert getattr(key, name) == more.get(
            name, "" if name in {"adapter", "component"} else False
        )


# -- names of bases -------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.", "encoder.model."])
def test_a_base_whose_names_have_more_before_them(prefix, net, adapter):
    made = adapter(target_modules=MODULES, modules_to_save=["head"])
    base = {f"{prefix}{name}": value for name, value in net.state_dict().items()}
    source = open_weights(Lora(base, {str(made.path): 1.0}))
    found = {name.removeprefix(prefix): value for name, value in weights_of(source).items()}
    equal_to(found, made.merged())


def test_an_adapter_whose_names_have_more_before_them(net, tmp_path):
    outer = torch.nn.ModuleDict({"model": make_net(0)})
    made = make_adapter(outer, tmp_path / "a", target_modules=MODULES, modules_to_save=["head"])
    found = weights_of(open_weights(Lora(net, {str(made.path): 1.0})))
    equal_to({f"model.{name}": value for name, value in found.items()}, made.merged())


def test_two_places_that_would_do_are_an_error(net, adapter):
    made = adapter(target_modules=MODULES)
    base = {f"{tower}.{n}": v for tower in ("left", "right") for n, v in net.state_dict().items()}
    with pytest.raises(WeightMismatchError) as caught:
        open_weights(Lora(base, {str(made.path): 1.0}))
    (problem,) = caught.value.problems
    assert problem.kind == "ambiguous"
    assert "'left." in problem.found
    assert "'right." in problem.found
    # a model beside its copy is not ambiguous: names that fit unchanged win
    both = {**net.state_dict(), **base}
    assert all("." + n not in n for n in open_weights(Lora(both, {str(made.path): 1.0})).touched)


def test_one_prefix_has_to_do_for_the_whole_adapter(net, adapter):
    made = adapter(target_modules=MODULES)
    base = {f"{'x' if 'lin' in n else 'y'}.{n}": v for n, v in net.state_dict().items()}
    with pytest.raises(WeightMismatchError) as caught:
        open_weights(Lora(base, {str(made.path): 1.0}))
    assert {problem.kind for problem in caught.value.problems} == {"unknown module"}


def test_two_modules_never_share_a_place(tmp_path):
    torch.manual_seed(0)
    towers = torch.nn.ModuleDict(
        {side: torch.nn.ModuleDict({"lin": torch.nn.Linear(3, 3)}) for side in ("left", "right")}
    )
    made = make_adapter(towers, tmp_path / "a", target_modules=["lin"])
    one = {f"lin.{name}": value for name, value in torch.nn.Linear(3, 3).state_dict().items()}
    with pytest.raises(WeightMismatchError) as caught:
        open_weights(Lora(one, {str(made.path): 1.0}))
    assert {p.subject.rpartition(": ")[2] for p in caught.value.problems} == {
        "left.lin",
        "right.lin",
    }


def test_one_module_that_is_nowhere_does_not_hide_where_the_others_are(net, adapter):
    made = adapter(target_modules=["lin", "two", "small", "flat"])
    base = {f"model.{n}": v for n, v in net.state_dict().items()}
    names = [name for name, _ in factors_of(made).items()]
    for lacking in names:
        some = {n: v for n, v in base.items() if not n.startswith(f"model.{lacking}.")}
        with pytest.raises(WeightMismatchError) as caught:
            open_weights(Lora(some, {str(made.path): 1.0}))
        assert [p.subject.rpartition(": ")[2] for p in caught.value.problems] == [lacking]


@pytest.mark.parametrize("live", [True, False])
def test_a_base_that_has_adapters_in_it_is_taken_without_them(live, net, adapter):
    inside = adapter(5, target_modules=[*MODULES, "emb"], modules_to_save=["head"])
    made = adapter(1, target_modules=MODULES)
    weights = inside.model if live else dict(inside.model.state_dict())
    source = open_weights(Lora(weights, {str(made.path): 1.0}))
    equal_to(weights_of(source), made.merged())
    assert set(source.names()) == set(net.state_dict())
    assert "without its 10 entries of adapters" in source.description
    assert same(weights_of(open_weights(Lora(weights))), net.state_dict())


def test_a_live_model_with_merged_adapters_is_no_base(adapter):
    made = adapter(target_modules=MODULES)
    model = copy.deepcopy(made.model)
    model.merge_adapter()
    with pytest.raises(SourceError, match="merged into its weights") as caught:
        refitkit_peft.Base(model)
    assert {problem.kind for problem in caught.value.problems} == {"merged"}
    assert len(caught.value.problems) == 3


def test_an_embedding_that_was_saved_untrained_beside_its_factors(net, adapter, tmp_path):
    made = adapter(target_modules=["emb"])
    tensors = load_file(made.path / "adapter_model.safetensors")
    key = "base_model.model.emb.base_layer.weight"
    config = {"r": 4, "lora_alpha": 6}
    base = refitkit_peft.Base(net)
    base.add("same", {**tensors, key: net.emb.weight.detach()}, config)
    equal_to(weights_of(open_weights(Lora(base, {"same": 0.5}))), made.merged(0.5))
    # a trained weight replaces the base's, which has no scale of one half
    base.add("other", {**tensors, key: net.emb.weight.detach() + 1}, config)
    found = open_weights(Lora(base, {"other": 1.0})).get("emb.weight")
    assert_close(found, made.merged()["emb.weight"] + 1)
    with pytest.raises(WeightMismatchError, match=r"scale, found 0\.5, wanted 1"):
        open_weights(Lora(base, {"other": 0.5}))


# -- diffusers itself, where it is installed ------------------------------------------------


def test_what_diffusers_saves_and_fuses(tmp_path):
    pytest.importorskip("diffusers")
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()
    base = {name: value.clone() for name, value in unet.state_dict().items()}
    targets = ["to_q", "to_k", "to_out.0", "conv1", "proj_in"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False))
    unet.save_lora_adapter(tmp_path / "one")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    metadata = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "two", unet_lora_layers=layers, unet_lora_adapter_metadata=metadata
    )
    unet.fuse_lora(lora_scale=0.5)
    unet.unload_lora()
    for folder in ("one", "two"):
        (file,) = (tmp_path / folder).iterdir()
        source = open_weights(Lora(base, {str(file): 0.5}))
        equal_to(weights_of(source), unet.state_dict())
        assert len(source.touched) > 10
