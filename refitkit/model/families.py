"""Ready rules for families of models whose weights come in two layouts.

Which side a program has does not matter; see :class:`~refitkit.model.packing.Pack`. Sources:
``conversion_mapping.py`` of transformers 5.23; ``loaders/single_file_utils.py`` and
``models/attention_processor.py`` of diffusers 0.42; ``nn/modules/activation.py`` of torch 2.14.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.model.packing import Pack

if TYPE_CHECKING:
    from collections.abc import Iterator


def _same(piece: str, part: str) -> Pack:
    """Another name for a weight."""
    return Pack(into=piece, parts=(part,))


def _joined(piece: str, *parts: str) -> tuple[Pack, Pack]:
    """Weights and biases of linear layers that one layer has end to end."""
    weights, biases = (
        Pack(into=f"{{}}.{piece}.{kind}", parts=tuple(f"{{}}.{part}.{kind}" for part in parts))
        for kind in ("weight", "bias")
    )
    return weights, biases


def _experts(into: str, of: str, gate: str, down: str, up: str) -> tuple[Pack, Pack]:
    """Experts one by one, ``[out, in]``, which a model has in two pieces: ``[E, out, in]``."""
    gate_up = (f"{{}}.{of}.*.{gate}.weight", f"{{}}.{of}.*.{up}.weight")
    return (
        Pack(into=f"{{}}.{into}.gate_up_proj", parts=gate_up, dim=1),
        Pack(into=f"{{}}.{into}.down_proj", parts=(f"{{}}.{of}.*.{down}.weight",)),
    )


def _in_proj() -> tuple[Pack, Pack]:
    """The one weight and bias of ``nn.MultiheadAttention``, and three layers."""
    weights, biases = (
        Pack(
            into=f"{{}}.in_proj_{kind}",
            parts=tuple(f"{{}}.{name}_proj.{kind}" for name in "qkv"),
        )
        for kind in ("weight", "bias")
    )
    return weights, biases


def _ldm_resnet(ours: str, theirs: str) -> Iterator[Pack]:
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    for our, their in names.items():
        yield _same(f"{ours}.{our}.{{}}", f"{theirs}.{their}.{{}}")


def _ldm_unet() -> Iterator[Pack]:
    """UNets of Stable Diffusion 1, 2 and XL: two layers in each block."""
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for our, their in names.items():
        yield _same(f"{our}.{{}}", f"{their}.{{}}")
    last = 2
    for number in range(12):
        block, layer = divmod(number, last + 1)
        ours, theirs = f"down_blocks.{block}", f"input_blocks.{number + 1}"
        if layer == last:
            yield _same(f"{ours}.downsamplers.0.conv.{{}}", f"{theirs}.0.op.{{}}")
        else:
            yield from _ldm_resnet(f"{ours}.resnets.{layer}", f"{theirs}.0")
            yield _same(f"{ours}.attentions.{layer}.{{}}", f"{theirs}.1.{{}}")
        ours, theirs = f"up_blocks.{block}", f"output_blocks.{number}"
        yield from _ldm_resnet(f"{ours}.resnets.{layer}", f"{theirs}.0")
        yield _same(f"{ours}.attentions.{layer}.{{}}", f"{theirs}.1.{{}}")
        for place in (1, 2) if layer == last else ():  # after the attention, where there is one
            yield _same(f"{ours}.upsamplers.0.conv.{{}}", f"{theirs}.{place}.conv.{{}}")
    yield from _ldm_resnet("mid_block.resnets.0", "middle_block.0")
    yield _same("mid_block.attentions.0.{}", "middle_block.1.{}")
    yield from _ldm_resnet("mid_block.resnets.1", "middle_block.2")


def _ldm_vae() -> Iterator[Pack]:
    """Autoencoders of Stable Diffusion: four blocks; attention as 1 x 1 convolutions."""
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    for side in ("encoder", "decoder"):
        yield _same(f"{side}.conv_norm_out.{{}}", f"{side}.norm_out.{{}}")
        for number in (0, 1):
            theirs = f"{side}.mid.block_{number + 1}.{{}}"
            yield _same(f"{side}.mid_block.resnets.{number}.{{}}", theirs)
        for our, their in attention.items():
            ours = f"{side}.mid_block.attentions.0.{our}.{{}}"
            yield _same(ours, f"{side}.mid.attn_1.{their}.{{}}")
    for number in range(4):
        sides = (
            (f"encoder.down_blocks.{number}", f"encoder.down.{number}", "down"),
            (f"decoder.up_blocks.{number}", f"decoder.up.{3 - number}", "up"),
        )
        for ours, theirs, way in sides:
            yield _same(f"{ours}.{way}samplers.0.conv.{{}}", f"{theirs}.{way}sample.conv.{{}}")
            for layer in range(3):
                there = f"{theirs}.block.{layer}.nin_shortcut.{{}}"
                yield _same(f"{ours}.resnets.{layer}.conv_shortcut.{{}}", there)
            yield _same(f"{ours}.resnets.{{}}", f"{theirs}.block.{{}}")


FAMILIES: dict[str, tuple[Pack, ...]] = {
    # experts one by one, as in files, and in two pieces, as in models of transformers since 5
    "moe": (
        *_experts("experts", "experts", "gate_proj", "down_proj", "up_proj"),
        _same(
            "{}.gate.moe_statics.e_score_correction_bias", "{}.moe_statics.e_score_correction_bias"
        ),
    ),
    "mixtral": (
        *_experts("mlp.experts", "block_sparse_moe.experts", "w1", "w2", "w3"),
        *_experts("experts", "experts", "w1", "w2", "w3"),
        _same("{}.mlp.gate.weight", "{}.block_sparse_moe.gate.weight"),
        _same("{}.mlp.router.weight", "{}.block_sparse_moe.gate.weight"),
        _same("{}.mlp.e_score_correction_bias", "{}.block_sparse_moe.e_score_correction_bias"),
    ),
    "granitemoe": (
        _same("{}.experts.gate_up_proj", "{}.input_linear.weight"),
        _same("{}.experts.down_proj", "{}.output_linear.weight"),
        _same("{}.router.weight", "{}.router.layer.weight"),
    ),
    # one layer for q, k and v, and one for gate and up: Phi-3, and models as vLLM holds them
    "fused": (
        *_joined("qkv_proj", "q_proj", "k_proj", "v_proj"),
        *_joined("gate_up_proj", "gate_proj", "up_proj"),
    ),
    "in_proj": _in_proj(),
    # GPT-2 and its kin: Conv1D has weights [in, out]
    "conv1d": tuple(
        Pack(into=f"{{}}.{name}.weight", parts=(f"{{}}.{name}.weight",), transposed=True)
        for name in ("c_attn", "q_attn", "c_proj", "c_fc")
    ),
    # diffusers after fuse_qkv_projections()
    "diffusers-fused": (
        *_joined("to_qkv", "to_q", "to_k", "to_v"),
        *_joined("to_kv", "to_k", "to_v"),
        *_joined("to_added_qkv", "add_q_proj", "add_k_proj", "add_v_proj"),
    ),
    # diffusers against the files of CompVis and Stability
    "ldm-unet": tuple(_ldm_unet()),
    "ldm-vae": tuple(_ldm_vae()),
}
"""Rules by the name of a family, for ``Rules.families``."""
