"""Rules that convert names and layouts of checkpoint entries to those of a program.

:class:`Rules` is the setting ``Config.rules``. It consists of :class:`Rename` and :class:`Pack`
rules. ``FAMILIES`` has ready ``Pack`` rules for families of models whose weights exist in two
layouts. A rule works in both directions, so it does not matter which layout the program has.
"""

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
"""Parts that wrappers add to names, in this order: DataParallel, Lightning and transformers,
``torch.compile``, fully sharded data parallel of torch, the same of older versions and fairscale,
activation checkpointing, and Lightning Fabric."""


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as exc:
        raise ValueError(f"not a regular expression: {exc}") from exc
    return text


def _family(name: str) -> str:
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}; known families: {', '.join(FAMILIES)}")
    return name


Pattern = Annotated[str, AfterValidator(_pattern)]


class Rename(Frozen):
    r"""A rule that replaces names of entries.

    Attributes:
        pattern: Regular expression that must match a whole name, such as ``encoder\.(.*)``.
        to: Replacement as for :func:`re.sub`; ``\1`` is the first group.
    """

    pattern: Pattern
    to: str

    @model_validator(mode="after")
    def _with_its_groups(self) -> Self:
        try:  # re.sub reads the replacement only if there is a match; "|" adds an empty match
            re.sub(f"{self.pattern}|", self.to, "")
        except (re.error, IndexError) as exc:
            raise ValueError(f"{self.to!r} is not a valid replacement: {exc}") from exc
        return self


class Rules(Frozen):
    r"""Rules that convert the entries of a checkpoint to weights of the program.

    An entry that the program reads as it is stays unchanged, unless a rule of ``rename`` gives it
    another name of the program. The report lists all changes.

    If names still do not fit and exactly one prefix to drop or add makes all names and shapes of
    the program fit, refitkit applies it and reports it. It never does so in a partial refit. If
    several prefixes fit, the error lists a rule for each.

    Attributes:
        subtree: Prefix of the names to use. The prefix is removed, and all other entries are left
            out.
        ignore: Regular expressions of entries to leave out, such as ``lm_head\..*``. They must
            match a whole name, with or without the subtree. Entries that are not weights, such as
            ``n_averaged`` and the state of optimizers, are always left out if the program does not
            have them.
        wrappers: Parts of names that wrappers add. If the program lacks a name but has it without
            some of these parts, they are removed.
        rename: Rules for names. The first one that matches is applied.
        pack: Rules for weights that are one tensor in the program and several in the checkpoint,
            or the other way round; see :class:`Pack`.
        families: Keys of :data:`refitkit.model.rules.FAMILIES`: names of ready sets of ``pack``
            rules. Rules in ``pack`` are tried first.
        cast: Whether an entry is cast to the dtype of the program. ``no``: another dtype is an
            error. ``lossless``: cast only if every value is preserved. ``any``: cast between floats
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
        """All ``Pack`` rules, in the order in which they are tried."""
        return (*self.pack, *(rule for name in self.families for rule in FAMILIES[name]))


# -- packing ----------------------------------------------------------------------------------


def _template(text: str) -> str:
    if text.count("{}") != 1:
        raise ValueError("must contain exactly one {}, for the text that differs between layers")
    return text


Template = Annotated[str, AfterValidator(_template)]


class Pack(Frozen):
    """A rule for a weight that is one tensor (the piece) in one layout and several in the other.

    It works in both directions. If the checkpoint has the parts, refitkit computes the piece for
    the program. If the checkpoint has the piece, refitkit computes the parts.

    Parts with as many dimensions as the piece are concatenated (``torch.cat``). Parts with one
    dimension less, such as experts, are stacked in a new dimension (``torch.stack``).

    Attributes:
        into: Name of the piece, with ``{}`` for the text that differs between layers:
            ``{}.qkv_proj.weight``.
        parts: Names of the parts, in their order in the piece, with ``{}`` for the same text. If
            each has a ``*``, for the numbers 0, 1, ..., the parts of each name are first stacked in
            dimension 0. A rule with one part only renames it.
        dim: Dimension of the piece in which the parts are concatenated or stacked. Shapes do not
            show whether attention heads are interleaved in it, so refitkit cannot check that.
        transposed: Whether the last two dimensions of each part are swapped in the piece, as in
            ``Conv1D`` of transformers. A single part may have the name of the piece; the weight is
            then transposed in both directions.
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
                "a * stands for numbers: put one in each part, or in none, and not in into"
            )
        if len(set(self.parts)) < len(self.parts):
            raise ValueError("two parts have the same name")
        if self.into in self.parts and not (len(self.parts) == 1 and self.transposed):
            raise ValueError("a part has the name of the piece; only one transposed part may")
        return self

    @property
    def numbered(self) -> bool:
        """Whether the names of the parts contain numbers."""
        return "*" in self.parts[0]


# -- families of models -----------------------------------------------------------------------

# The names come from conversion_mapping.py of transformers 5.23; loaders/single_file_utils.py and
# models/attention_processor.py of diffusers 0.42; nn/modules/activation.py of torch 2.14.


def _renamed(piece: str, part: str) -> Pack:
    """Return a rule that only renames a weight."""
    return Pack(into=piece, parts=(part,))


def _fused(piece: str, *parts: str) -> tuple[Pack, Pack]:
    """Return rules for the weights and biases of linear layers that are fused into one layer."""
    weights, biases = (
        Pack(into=f"{{}}.{piece}.{kind}", parts=tuple(f"{{}}.{part}.{kind}" for part in parts))
        for kind in ("weight", "bias")
    )
    return weights, biases


def _experts(into: str, of: str, gate: str, down: str, up: str) -> tuple[Pack, Pack]:
    """Return rules that stack expert weights ``[out, in]`` into two tensors ``[E, out, in]``."""
    gate_up = (f"{{}}.{of}.*.{gate}.weight", f"{{}}.{of}.*.{up}.weight")
    return (
        Pack(into=f"{{}}.{into}.gate_up_proj", parts=gate_up, dim=1),
        Pack(into=f"{{}}.{into}.down_proj", parts=(f"{{}}.{of}.*.{down}.weight",)),
    )


def _in_proj() -> tuple[Pack, Pack]:
    """Return rules that pack three projections into ``in_proj`` of ``nn.MultiheadAttention``."""
    weights, biases = (
        Pack(
            into=f"{{}}.in_proj_{kind}",
            parts=tuple(f"{{}}.{name}_proj.{kind}" for name in "qkv"),
        )
        for kind in ("weight", "bias")
    )
    return weights, biases


def _ldm_resnet(ours: str, theirs: str) -> Iterator[Pack]:
    """Yield rules for one residual block: names of diffusers, names of latent-diffusion (LDM)."""
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    for our, their in names.items():
        yield _renamed(f"{ours}.{our}.{{}}", f"{theirs}.{their}.{{}}")


def _ldm_unet() -> Iterator[Pack]:
    """Yield rules for UNets of Stable Diffusion 1, 2 and XL, which have two layers in a block."""
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
        yield _renamed(f"{our}.{{}}", f"{their}.{{}}")
    last = 2
    for number in range(12):
        block, layer = divmod(number, last + 1)
        ours, theirs = f"down_blocks.{block}", f"input_blocks.{number + 1}"
        if layer == last:
            yield _renamed(f"{ours}.downsamplers.0.conv.{{}}", f"{theirs}.0.op.{{}}")
        else:
            yield from _ldm_resnet(f"{ours}.resnets.{layer}", f"{theirs}.0")
            yield _renamed(f"{ours}.attentions.{layer}.{{}}", f"{theirs}.1.{{}}")
        ours, theirs = f"up_blocks.{block}", f"output_blocks.{number}"
        yield from _ldm_resnet(f"{ours}.resnets.{layer}", f"{theirs}.0")
        yield _renamed(f"{ours}.attentions.{layer}.{{}}", f"{theirs}.1.{{}}")
        # LDM numbers the modules of a block: the upsampler follows the attention, if there is one
        for index in (1, 2) if layer == last else ():
            yield _renamed(f"{ours}.upsamplers.0.conv.{{}}", f"{theirs}.{index}.conv.{{}}")
    yield from _ldm_resnet("mid_block.resnets.0", "middle_block.0")
    yield _renamed("mid_block.attentions.0.{}", "middle_block.1.{}")
    yield from _ldm_resnet("mid_block.resnets.1", "middle_block.2")


def _ldm_vae() -> Iterator[Pack]:
    """Yield rules for autoencoders of Stable Diffusion, which have four blocks.

    LDM has the projections of attention as 1 x 1 convolutions.
    """
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    for side in ("encoder", "decoder"):
        yield _renamed(f"{side}.conv_norm_out.{{}}", f"{side}.norm_out.{{}}")
        for number in (0, 1):
            theirs = f"{side}.mid.block_{number + 1}.{{}}"
            yield _renamed(f"{side}.mid_block.resnets.{number}.{{}}", theirs)
        for our, their in attention.items():
            ours = f"{side}.mid_block.attentions.0.{our}.{{}}"
            yield _renamed(ours, f"{side}.mid.attn_1.{their}.{{}}")
    for number in range(4):
        sides = (
            (f"encoder.down_blocks.{number}", f"encoder.down.{number}", "down"),
            # LDM counts the blocks of the decoder from the output
            (f"decoder.up_blocks.{number}", f"decoder.up.{3 - number}", "up"),
        )
        for ours, theirs, kind in sides:
            yield _renamed(f"{ours}.{kind}samplers.0.conv.{{}}", f"{theirs}.{kind}sample.conv.{{}}")
            for layer in range(3):
                there = f"{theirs}.block.{layer}.nin_shortcut.{{}}"
                yield _renamed(f"{ours}.resnets.{layer}.conv_shortcut.{{}}", there)
            yield _renamed(f"{ours}.resnets.{{}}", f"{theirs}.block.{{}}")


FAMILIES: dict[str, tuple[Pack, ...]] = {
    # checkpoints have one tensor for each expert; transformers 5 has two for all experts
    "moe": (
        *_experts("experts", "experts", "gate_proj", "down_proj", "up_proj"),
        _renamed(
            "{}.gate.moe_statics.e_score_correction_bias", "{}.moe_statics.e_score_correction_bias"
        ),
    ),
    "mixtral": (
        *_experts("mlp.experts", "block_sparse_moe.experts", "w1", "w2", "w3"),
        *_experts("experts", "experts", "w1", "w2", "w3"),
        _renamed("{}.mlp.gate.weight", "{}.block_sparse_moe.gate.weight"),
        _renamed("{}.mlp.router.weight", "{}.block_sparse_moe.gate.weight"),
        _renamed("{}.mlp.e_score_correction_bias", "{}.block_sparse_moe.e_score_correction_bias"),
    ),
    "granitemoe": (
        _renamed("{}.experts.gate_up_proj", "{}.input_linear.weight"),
        _renamed("{}.experts.down_proj", "{}.output_linear.weight"),
        _renamed("{}.router.weight", "{}.router.layer.weight"),
    ),
    # one layer for q, k and v, and one for gate and up: Phi-3, and models in vLLM
    "fused": (
        *_fused("qkv_proj", "q_proj", "k_proj", "v_proj"),
        *_fused("gate_up_proj", "gate_proj", "up_proj"),
    ),
    "in_proj": _in_proj(),
    # GPT-2 and similar models: Conv1D has weights [in, out]
    "conv1d": tuple(
        Pack(into=f"{{}}.{name}.weight", parts=(f"{{}}.{name}.weight",), transposed=True)
        for name in ("c_attn", "q_attn", "c_proj", "c_fc")
    ),
    # models of diffusers after fuse_qkv_projections()
    "diffusers-fused": (
        *_fused("to_qkv", "to_q", "to_k", "to_v"),
        *_fused("to_kv", "to_k", "to_v"),
        *_fused("to_added_qkv", "add_q_proj", "add_k_proj", "add_v_proj"),
    ),
    # names of diffusers and names in the files of CompVis and Stability AI
    "ldm-unet": tuple(_ldm_unet()),
    "ldm-vae": tuple(_ldm_vae()),
}
"""``Pack`` rules by the name of a family, for ``Rules.families``."""
