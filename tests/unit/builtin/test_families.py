"""Ready rules, held against what transformers and diffusers themselves write and convert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from refitkit.errors import WeightMismatchError
from refitkit.model.rules import FAMILIES
from tests.fakes import UnderRules, same_state

if TYPE_CHECKING:
    from pathlib import Path

    State = dict[str, torch.Tensor]

SMALL = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "moe_intermediate_size": 6,
    "shared_expert_intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 16,
    "num_experts": 3,
    "num_local_experts": 3,
    "n_routed_experts": 4,
    "moe_num_experts": 3,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 4,
    "q_lora_rank": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}


def both_ways(one: State, other: State, *families: str) -> bool:
    there = UnderRules(other, families=families).refit(one)
    return same_state(there, other) and same_state(
        UnderRules(one, families=families).refit(there), one
    )


def whole(state: State) -> State:
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


MOE = ["qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe"]
KINDS = [
    *((kind, "moe") for kind in MOE),
    *((kind, "mixtral") for kind in ("mixtral", "phimoe", "minimax")),
    ("granitemoe", "granitemoe"),
]


@pytest.mark.parametrize(("kind", "family"), KINDS)
def test_files_of_transformers(tmp_path: Path, kind: str, family: str) -> None:
    """Experts are one by one in a file, and stacked in the model."""
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.AutoConfig.for_model(kind)
    for name, value in SMALL.items():
        if hasattr(config, name):
            setattr(config, name, value)
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name)[:2])
    model = transformers.AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(tmp_path)
    state, file = whole(model.state_dict()), load_file(tmp_path / "model.safetensors")
    if len(file) < len(state) and "lm_head.weight" not in file:  # of tied ones a file has one
        state.pop("lm_head.weight")
    assert state.keys() != file.keys()
    assert same_state(UnderRules(state, families=(family,)).refit(tmp_path), state)
    assert both_ways(file, state, family)
    with pytest.raises(WeightMismatchError, match=f"pass --family {family}"):
        UnderRules(state).refit(tmp_path)
    with pytest.raises(WeightMismatchError, match=f"pass --family {family}"):
        UnderRules(file).refit(state)


def test_phi_3_has_one_layer_for_three() -> None:
    transformers = pytest.importorskip("transformers")
    config = {n: v for n, v in SMALL.items() if n != "head_dim"}
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**config))
    fused, apart = whole(model.state_dict()), {}
    for name, value in fused.items():
        at, _, layer = name.removesuffix(".weight").rpartition(".")
        if layer == "qkv_proj":
            for part, rows in zip("qkv", value.split([8, 4, 4]), strict=True):
                apart[f"{at}.{part}_proj.weight"] = rows.clone()
        elif layer == "gate_up_proj":
            for part, rows in zip(("gate", "up"), value.chunk(2), strict=True):
                apart[f"{at}.{part}_proj.weight"] = rows.clone()
        else:
            apart[name] = value
    assert len(apart) > len(fused)
    assert both_ways(apart, fused, "fused")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    assert apart.keys() == llama.state_dict().keys()


def test_gpt_2_has_transposed_layers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 16, "n_positions": 8}
    model = transformers.GPT2Model(transformers.GPT2Config(**sizes))
    conv1d = transformers.pytorch_utils.Conv1D
    turned = whole(model.state_dict())
    for path, part in model.named_modules():
        if isinstance(part, conv1d):
            linear = torch.nn.Linear(part.nx, part.nf)
            linear.weight.data = part.weight.data.T.contiguous()
            x = torch.randn(2, part.nx)
            torch.testing.assert_close(linear(x) - linear.bias, part(x) - part.bias)
            turned[f"{path}.weight"] = linear.weight.detach()
    assert both_ways(whole(model.state_dict()), turned, "conv1d")
    with pytest.raises(WeightMismatchError, match=r"the transposed shape; .*--family conv1d"):
        UnderRules(turned).refit(model)


def test_attention_of_torch() -> None:
    """The one weight of ``nn.MultiheadAttention``, held against its own separate ones."""
    torch.manual_seed(0)
    fused = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    apart = torch.nn.ModuleDict({n: torch.nn.Linear(8, 8) for n in ("q_proj", "k_proj", "v_proj")})
    apart["out_proj"] = fused.out_proj
    state = {f"attn.{name}": value for name, value in whole(fused.state_dict()).items()}
    program = {f"attn.{n}": v for n, v in whole(apart.state_dict()).items()}
    held = UnderRules(program, families=("in_proj",)).refit(state)
    apart.load_state_dict({name.removeprefix("attn."): value for name, value in held.items()})
    x = torch.randn(1, 3, 8)
    q, k, v = (
        apart[n](x).reshape(1, 3, 2, 4).transpose(1, 2) for n in ("q_proj", "k_proj", "v_proj")
    )
    mine = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    mine = apart["out_proj"](mine.transpose(1, 2).reshape(1, 3, 8))
    torch.testing.assert_close(mine, fused(x, x, x)[0])
    assert both_ways(state, held, "in_proj")


@pytest.mark.parametrize("prefix", ["", "net."])
def test_attention_that_is_the_whole_model(prefix: str) -> None:
    """No module is before the names of its weights."""
    fused = whole(torch.nn.MultiheadAttention(8, 2).state_dict())
    apart = {name: value for name, value in fused.items() if "in_proj" not in name}
    for kind in ("weight", "bias"):
        rows = fused[f"in_proj_{kind}"].chunk(3)
        apart |= {f"{n}_proj.{kind}": value for n, value in zip("qkv", rows, strict=True)}
    assert both_ways(whole(apart), fused, "in_proj")
    given = {f"{prefix}{name}": value for name, value in apart.items()}
    assert same_state(UnderRules(fused, families=("in_proj",)).refit(given), fused)
    with pytest.raises(WeightMismatchError, match="pass --family in_proj"):
        UnderRules(fused).refit(given)


# -- diffusers --------------------------------------------------------------------------------


def unet(diffusers: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8, 16, 16),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        sample_size=8,
    )


def original(state: State, family: str) -> State:
    """Names that the rules give to all weights of a model of diffusers."""
    found = {}
    for name, value in state.items():
        for rule in FAMILIES[family]:
            begin, end = rule.into.split("{}")
            if name.startswith(begin) and name.endswith(end):
                place = name[len(begin) : len(name) - len(end)]
                found[rule.parts[0].replace("{}", place)] = value.clone()
                break
        else:
            found[name] = value
    return found


def test_the_original_names_of_a_unet() -> None:
    """diffusers converts what the rules call the original names: it has to get all back."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    state = whole(unet(diffusers).state_dict())
    attending = ("output_blocks.5.", "output_blocks.8.")  # upsampled after their attention
    theirs = {
        name.replace(".1.conv.", ".2.conv.") if name.startswith(attending) else name: value
        for name, value in original(state, "ldm-unet").items()
    }
    assert {"output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight"} <= theirs.keys()
    file = {f"model.diffusion_model.{name}": value for name, value in theirs.items()}
    assert same_state(convert_ldm_unet_checkpoint(file, {"layers_per_block": 2}), state)
    assert both_ways(theirs, state, "ldm-unet")
    assert same_state(UnderRules(state, families=("ldm-unet",)).refit(file), state)


def test_the_original_names_of_an_autoencoder() -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    blocks = {
        f"{way}_block_types": (f"{way.title()}{side}Block2D",) * 4
        for way, side in (("down", "Encoder"), ("up", "Decoder"))
    }
    sizes = {"block_out_channels": (4, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 2}
    state = whole(diffusers.AutoencoderKL(**blocks, **sizes).state_dict())
    theirs = original(state, "ldm-vae")
    theirs |= {n: v[:, :, None, None] for n, v in theirs.items() if "attn_1" in n and v.dim() == 2}
    back = convert_ldm_vae_checkpoint(dict(theirs), blocks)
    assert same_state(back, state)
    assert both_ways(theirs, state, "ldm-vae")


@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_fused_projections_of_diffusers(kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = unet(diffusers) if kind == "unet" else diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    apart = whole(model.state_dict())
    model.fuse_qkv_projections()
    both = whole(model.state_dict())
    new = {name: value for name, value in both.items() if name not in apart}
    assert new
    fused = {name: value for name, value in both.items() if not _is_fused(name, new)}
    assert both_ways(apart, fused, "diffusers-fused")


def _is_fused(name: str, new: State) -> bool:
    """Whether a weight is a part of a new one."""
    return any(
        name == part.replace("{}", at)
        for rule in FAMILIES["diffusers-fused"]
        for part in rule.parts
        for at in [name.rpartition(part.replace("{}", ""))[0]]
        if rule.into.replace("{}", at) in new
    )
