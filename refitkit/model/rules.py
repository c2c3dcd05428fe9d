"""How names and forms of a checkpoint become those of a model, where they are not the same."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from refitkit.model.base import Frozen

if TYPE_CHECKING:
    from collections.abc import Iterator


WRAPPERS = (
    "module",
    "model",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
)
"""Parts of names that wrappers put there: DataParallel, Lightning and transformers, modules that
``torch.compile`` made, fully sharded ones (of torch, and of older versions and fairscale), those
that compute again in the backward pass, and Lightning Fabric's."""


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as exc:
        raise ValueError(f"it is no regular expression: {exc}") from exc
    return text


def _family(name: str) -> str:
    if name not in FAMILIES:
        raise ValueError(f"there are the families {', '.join(FAMILIES)}")
    return name


Pattern = Annotated[str, AfterValidator(_pattern)]


class Rename(Frozen):
    r"""A name for another.

    Attributes:
        pattern: Regular expression that a whole name has to match, such as ``encoder\.(.*)``.
        to: What it becomes; ``\1`` is the first group. As for :func:`re.sub`.
    """

    pattern: Pattern
    to: str

    @model_validator(mode="after")
    def _with_its_groups(self) -> Self:
        try:  # every string has an empty match, and only what matches has its replacement read
            re.sub(f"{self.pattern}|", self.to, "")
        except (re.error, IndexError) as exc:
            raise ValueError(f"{self.to!r} is no replacement for it: {exc}") from exc
        return self


class Rules(Frozen):
    r"""What is done to weights before they are held against what a program reads.

    Nothing is done to an entry that the program reads as it is, unless a rule of ``rename`` gives
    it another name of the program. What was done is in the report.

    Where these rules leave names that do not fit, and exactly one prefix to drop or add makes all
    names of the program fit, with their shapes, that is done without a rule and reported; never in
    a refit in part. Where several do, the error lists a rule for each.

    Attributes:
        subtree: Only names that begin with this count, without it; others are left out.
        ignore: Regular expressions for entries to leave out, such as ``lm_head\..*``: they match
            a whole name, with or without the subtree. A few entries that are no weights of any
            model, such as ``n_averaged`` and the state of optimizers, are always left out if the
            program does not have them.
        wrappers: Parts that are taken out of a name that the program does not have, if it has the
            name without some of them.
        rename: Rules of which the first that matches is followed.
        pack: Weights that the program has in one piece and the weights have in parts, or the other
            way round; see :class:`Pack`.
        families: Names of sets of such rules, for families of models: keys of
            :data:`refitkit.model.rules.FAMILIES`. Rules of ``pack`` come first.
        cast: Whether an entry of another dtype than the program's is cast to it. ``no``: it is an
            error; ``lossless``: only where every value stays what it is; ``any``: between floats,
            and between integers.
    """

    subtree: str = ""
    ignore: tuple[Pattern, ...] = ()
    wrappers: tuple[str, ...] = WRAPPERS
    rename: tuple[Rename, ...] = ()
    pack: tuple[Pack, ...] = ()
    families: tuple[Annotated[str, AfterValidator(_family)], ...] = ()
    cast: Literal["no", "lossless", "any"] = "no"

    @property
    def packing(self) -> tuple[Pack, ...]:
        """All rules for pieces and parts, in the order in which they are tried."""
        return (*self.pack, *(rule for name in self.families for rule in FAMILIES[name]))


# MERGED packing: Weights that one side has in one piece, and the other in parts.


def _with_place(text: str) -> str:
    if text.count("{}") != 1:
        raise ValueError("it has to have one {}, for the part that differs from layer to layer")
    return text


Template = Annotated[str, AfterValidator(_with_place)]


class Pack(Frozen):
    """A weight that one side has in one piece, and the other side in parts.

    A rule says how the two are alike, and works in both directions: parts that are given become the
    piece that the program has, and a piece that is given becomes the parts that the program has.

    Parts that have as many dimensions as the piece lie one after another in it (``torch.cat``).
    Parts that have one less are stacked in a new dimension (``torch.stack``): experts.

    Attributes:
        into: Name of the piece, with ``{}`` for what differs: ``{}.qkv_proj.weight``.
        parts: Names of the parts, in their order in the piece, with ``{}`` for the same. With a
            ``*`` in each, for numbers from 0 on, the parts of each name are stacked in dimension 0
            first. A rule with one part renames it.
        dim: Dimension of the piece in which parts lie one after another, or are stacked. Heads that
            are interleaved in it cannot be told from heads that are not: know your model.
        transposed: Whether the last two dimensions of each part are exchanged in the piece, as in
            the ``Conv1D`` of transformers. A single part may have the name of the piece: then the
            weight is transposed in either direction.
    """

    into: Template
    parts: Annotated[tuple[Template, ...], Field(min_length=1)]
    dim: int = 0
    transposed: bool = False

    @model_validator(mode="after")
    def _unambiguous(self) -> Self:
        stars = {part.count("*") for part in self.parts}
        if "*" in self.into or stars not in ({0}, {1}):
            raise ValueError(
                "a * stands for numbers: one in each part, or in none, and not in into"
            )
        if len(set(self.parts)) < len(self.parts):
            raise ValueError("a part is named twice")
        if self.into in self.parts and not (len(self.parts) == 1 and self.transposed):
            raise ValueError("the piece has the name of a part")
        return self

    @property
    def numbered(self) -> bool:
        """Whether parts have numbers."""
        return "*" in self.parts[0]


# MERGED families: Ready rules for families of models whose weights come in two layouts.
#
# Which side a program has does not matter; see :class:`~refitkit.model.rules.Pack`. Sources:
# ``conversion_mapping.py`` of transformers 5.23; ``loaders/single_file_utils.py`` and
# ``models/attention_processor.py`` of diffusers 0.42; ``nn/modules/activation.py`` of torch 2.14.


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
