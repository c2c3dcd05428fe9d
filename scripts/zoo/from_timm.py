"""Models of timm: the smallest of many families."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scripts.zoo.entry import F32, HALF, Entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

FEW: dict[str, Any] = {"num_classes": 10}
SIZED: dict[str, Any] = {"img_size": 64}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    # side of the image, arguments of the model
    "beit_base_patch16_224": (64, {"img_size": 64, "embed_dim": 96, "depth": 2, "num_heads": 3}),
    "botnet26t_256": (256, {}),
    "caformer_s18": (64, {}),
    "cait_xxs24_224": (64, {**SIZED, "depth": 3}),
    "coat_lite_tiny": (64, SIZED),
    "coatnet_nano_rw_224": (64, SIZED),
    "convit_tiny": (64, {**SIZED, "depth": 4, "local_up_to_layer": 2}),
    "convmixer_768_32": (64, {"depth": 3, "dim": 96}),
    "convnext_atto": (64, {}),
    "convnextv2_atto": (64, {}),
    "crossvit_9_240": (240, {}),
    "cs3darknet_focus_s": (64, {}),
    "cspresnext50": (64, {}),
    "darknet17": (64, {}),
    "davit_tiny": (64, {}),
    "deit3_small_patch16_224": (64, {**SIZED, "depth": 2}),
    "deit_tiny_distilled_patch16_224": (64, {**SIZED, "depth": 2}),
    "densenetblur121d": (64, {}),
    "dla46_c": (64, {}),
    "dpn48b": (64, {}),
    "eca_botnext26ts_256": (256, {}),
    "ecaresnet26t": (64, {}),
    "edgenext_xx_small": (64, {}),
    "efficientformer_l1": (224, {}),
    "efficientformerv2_s0": (224, {}),
    "efficientnet_b0_gn": (64, {}),
    "efficientnet_cc_b0_4e": (64, {}),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (224, {}),
    "ese_vovnet19b_dw": (64, {}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56, "depth": 2}),
    "fasternet_t0": (64, {}),
    "fastvit_t8": (64, {}),
    "fbnetc_100": (64, {}),
    "focalnet_tiny_srf": (64, {}),
    "gcresnext26ts": (64, {}),
    "gcvit_xxtiny": (224, {}),
    "gernet_s": (64, {}),
    "ghostnet_050": (64, {}),
    "ghostnetv2_100": (64, {}),
    "gmixer_12_224": (64, {**SIZED, "num_blocks": 2}),
    "gmlp_ti16_224": (64, {**SIZED, "num_blocks": 2}),
    "halonet26t": (64, {}),
    "hardcorenas_a": (64, {}),
    "hgnetv2_b0": (64, {}),
    "hiera_tiny_224": (224, {}),
    "hrnet_w18_small": (64, {}),
    "inception_next_atto": (64, {}),
    "lambda_resnet26t": (64, {}),
    "lcnet_035": (64, {}),
    "levit_128s": (224, {}),
    "levit_conv_128s": (224, {}),
    "mambaout_femto": (64, {}),
    "mixer_s32_224": (64, {**SIZED, "num_blocks": 2}),
    "mixnet_s": (64, {}),
    "mobilenetv4_conv_small_050": (64, {}),
    "mobilenetv4_hybrid_medium_075": (64, {}),
    "mobileone_s0": (64, {}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "mvitv2_tiny": (64, SIZED),
    "nest_tiny": (
        64,
        {**SIZED, "num_levels": 2, "embed_dims": (32, 64), "num_heads": (1, 2), "depths": (1, 1)},
    ),
    "nf_regnet_b0": (64, {}),
    "nf_resnet26": (64, {}),
    "pit_ti_224": (64, SIZED),
    "poolformer_s12": (64, {}),
    "pvt_v2_b0": (64, {}),
    "regnetz_005": (64, {}),
    "repghostnet_050": (64, {}),
    "repvgg_a0": (64, {}),
    "repvit_m0_9": (64, {}),
    "res2net50d": (64, {}),
    "resmlp_12_224": (64, {**SIZED, "num_blocks": 2}),
    "resnest14d": (64, {}),
    "resnet10t": (64, {}),
    "resnetv2_50x1_bit": (64, {"layers": (1, 1, 1, 1)}),
    "rexnet_100": (64, {}),
    "selecsls42": (64, {}),
    "sequencer2d_s": (64, {"layers": (1, 1, 1, 1)}),
    "seresnet18": (64, {}),
    "shvit_s1": (64, {}),
    "skresnet18": (64, {}),
    "starnet_s050": (64, {}),
    "swiftformer_xs": (64, {}),
    "swin_tiny_patch4_window7_224": (64, {**SIZED, "depths": (2, 2, 2, 2)}),
    "swinv2_cr_tiny_ns_224": (64, {**SIZED, "depths": (2, 2, 2, 2)}),
    "test_efficientnet_evos": (64, {}),
    "test_maxvit": (64, SIZED),
    "test_mambaout": (64, {}),
    "test_nfnet": (64, {}),
    "test_vit": (64, SIZED),
    "test_vit4": (64, SIZED),
    "test_vit_relpos": (64, SIZED),
    "tf_efficientnet_lite0": (64, {}),
    "tiny_vit_5m_224": (224, {}),
    "tinynet_e": (64, {}),
    "tnt_s_patch16_224": (64, {**SIZED, "depth": 2}),
    "tresnet_m": (64, {}),
    "twins_svt_small": (64, SIZED),
    "visformer_tiny": (64, SIZED),
    "vit_small_patch14_reg4_dinov2": (56, {"img_size": 56, "depth": 2}),
    "vit_small_patch16_rope_224": (64, {**SIZED, "depth": 2}),
    "vit_small_patch16_rope_mixed_224": (64, {**SIZED, "depth": 2}),
    "volo_d1_224": (64, SIZED),
    "xception41": (64, {}),
    "xcit_tiny_12_p16_224": (64, {}),
    "xcit_nano_12_p8_224": (32, {}),
}
IN_HALF = {
    "convnext_atto",
    "deit_tiny_distilled_patch16_224",
    "edgenext_xx_small",
    "eva02_tiny_patch14_224",
    "ghostnet_050",
    "lcnet_035",
    "mobileone_s0",
    "mobilevit_xxs",
    "pvt_v2_b0",
    "regnetz_005",
    "repvgg_a0",
    "resnet10t",
    "starnet_s050",
    "test_nfnet",
    "test_vit",
    "tinynet_e",
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
