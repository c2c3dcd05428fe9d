"""Models of timm: the smallest of many families."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scripts.zoo.entry import F32, HALF, Entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

FEW: dict[str, Any] = {"num_classes": 10}
SIZED: dict[str, Any] = {"img_size": 64}
BLOCKS: dict[str, Any] = {**SIZED, "depth": 2}
DEPTHS: dict[str, Any] = {"depths": (1, 1, 1, 1)}
LAYERS: dict[str, Any] = {"layers": (1, 1, 1, 1)}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    # side of the image, arguments of the model
    "beit_base_patch16_224": (64, {**SIZED, "embed_dim": 96, "depth": 2, "num_heads": 3}),
    "cait_xxs24_224": (64, {**SIZED, "depth": 2}),
    "convit_tiny": (64, {**SIZED, "depth": 4, "local_up_to_layer": 2}),
    "convmixer_768_32": (64, {}),
    "convnext_atto": (64, DEPTHS),
    "convnextv2_atto": (64, DEPTHS),
    "cs3darknet_focus_s": (64, {}),
    "darknet17": (64, {}),
    "davit_tiny": (64, DEPTHS),
    "deit3_small_patch16_224": (64, BLOCKS),
    "deit_tiny_distilled_patch16_224": (64, BLOCKS),
    "dla46_c": (64, {}),
    "ecaresnet26t": (64, LAYERS),
    "edgenext_xx_small": (64, DEPTHS),
    "ese_vovnet19b_dw": (64, {}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56, "depth": 2}),
    "fastvit_t8": (64, LAYERS),
    "hgnetv2_b0": (64, {}),
    "hiera_tiny_224": (224, {"stages": (1, 1, 1, 1)}),
    "inception_next_atto": (64, DEPTHS),
    "lcnet_035": (64, {}),
    "levit_128s": (224, {}),
    "mambaout_femto": (64, DEPTHS),
    "mixer_s32_224": (64, SIZED),
    "mobilevit_xxs": (64, {}),
    "nf_resnet26": (64, {}),
    "pit_ti_224": (64, SIZED),
    "pvt_v2_b0": (64, DEPTHS),
    "regnetz_005": (64, {}),
    "repvgg_a0": (64, {}),
    "resmlp_12_224": (64, SIZED),
    "resnest14d": (64, {}),
    "resnet10t": (64, {}),
    "sequencer2d_s": (64, LAYERS),
    "seresnet18": (64, {}),
    "shvit_s1": (64, {}),
    "skresnet18": (64, {}),
    "starnet_s050": (64, {}),
    "swin_tiny_patch4_window7_224": (64, {**SIZED, **DEPTHS}),
    "swinv2_cr_tiny_ns_224": (64, {**SIZED, **DEPTHS}),
    "test_efficientnet": (64, {}),
    "test_efficientnet_evos": (64, {}),
    "test_mambaout": (64, {}),
    "test_maxvit": (64, SIZED),
    "test_nfnet": (64, {}),
    "test_vit": (64, SIZED),
    "test_vit4": (64, SIZED),
    "test_vit_relpos": (64, SIZED),
    "tinynet_e": (64, {}),
    "tnt_s_patch16_224": (64, BLOCKS),
    "twins_svt_small": (64, {**SIZED, **DEPTHS}),
    "vit_small_patch14_reg4_dinov2": (56, {"img_size": 56, "depth": 2}),
    "vit_small_patch16_rope_224": (64, BLOCKS),
    "vit_small_patch16_rope_mixed_224": (64, BLOCKS),
    "xcit_tiny_12_p16_224": (64, {}),
}
IN_HALF = {
    "convnext_atto",
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "lcnet_035",
    "repvgg_a0",
    "resnet10t",
    "starnet_s050",
    "test_nfnet",
    "xcit_tiny_12_p16_224",
}


def entries() -> Iterator[Entry]:
    """All of them."""
    import torch

    for name, (side, arguments) in MODELS.items():
        image = ((1, 3, side, side),)
        dtypes = HALF if name in IN_HALF else F32
        yield Entry(f"timm/{name}", _of(name, arguments), image, dtypes)
    batch = {0: torch.export.Dim("batch", min=1, max=4)}
    vit = Entry("timm/test_vit", _of("test_vit", SIZED), ((2, 3, 64, 64),))
    yield vit.named(" dynamic batch", dynamic=(batch,))
    gelu = "torch.ops.aten.gelu.default"
    yield vit.named(" in several engines", options={"torch_executed_ops": [gelu]}, dtypes=HALF)


def _of(name: str, arguments: dict[str, Any]) -> Any:
    def make() -> nn.Module:
        import timm

        module: nn.Module = timm.create_model(name, pretrained=False, **FEW, **arguments)
        return module

    return make
