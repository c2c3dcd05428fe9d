"""All models of the zoo, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scripts.zoo import as_exported, from_timm, from_torch_nn, from_torchvision, from_transformers
from scripts.zoo.by_hand import computed, memory, precision, programs, tables

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scripts.zoo.entry import Entry

BY_HAND = (memory, tables, precision, computed)
FAMILIES = (from_torch_nn, *BY_HAND, from_torchvision, from_timm, from_transformers)
OF_BOTH = (
    *("nn/autocast", "nn/batch norm with its own eps", "nn/bilinear", "nn/channels last"),
    *(
        "nn/chosen and sorted weights",
        "nn/complex rope",
        "nn/conv and norm, dynamic batch",
        "nn/conv3d",
    ),
    *("nn/embedding bag", "nn/embeddings", "nn/expanded parameters", "nn/flat parameter"),
    *("nn/folded weights", "nn/group norm", "nn/gru cell", "nn/instance norm with statistics"),
    *("nn/lifted constants", "nn/lora", "nn/lstm", "nn/lstm, both directions"),
    *("nn/mixed precision", "nn/modules on one storage", "nn/multihead attention"),
    *("nn/orthogonal", "nn/prelu", "nn/relative position bias", "nn/reparametrized conv"),
    *("nn/rms norm", "nn/scalars and nothing", "nn/spectral norm", "nn/spectral norm, the old one"),
    *("nn/stacked weights", "nn/tied weights", "nn/transposed conv2d", "nn/two parametrizations"),
    *("nn/unused parameters", "nn/weight norm"),
    *("nn/weights written in place", "nn/a parameter inside another"),
    *("torchvision/resnet18", "torchvision/mobilenet_v3_small", "torchvision/vit, 2 blocks"),
    *("torchvision/swin, 4 blocks", "torchvision/convnext, 4 blocks", "torchvision/resnet18 fpn"),
    *("torchvision/lraspp", "torchvision/shufflenet_v2_x0_5"),
    *("timm/test_vit", "timm/test_efficientnet", "timm/test_nfnet", "timm/mixer_s32_224"),
    *("timm/lcnet_035", "timm/repvgg_a0", "timm/test_mambaout", "timm/seresnet18"),
)
"""Models that are tried with AOTInductor, too, in float32."""


def zoo() -> dict[str, Entry]:
    """All entries for plans of TensorRT.

    Raises:
        ValueError: Two have one name.
    """
    return _by_name(entry for family in FAMILIES for entry in family.entries())


def zoo_aoti() -> dict[str, Entry]:
    """All entries for AOTInductor.

    Raises:
        ValueError: Two have one name.
    """
    shared = zoo()
    both = (shared[name].named("", dtypes=("float32",), options={}) for name in OF_BOTH)
    return _by_name([*programs.entries(), *as_exported.entries(), *both])


def _by_name(entries: Iterable[Entry]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for entry in entries:
        if entry.name in found:
            raise ValueError(f"there are two models named {entry.name!r}")
        found[entry.name] = entry
    return found
