"""Models of torchvision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scripts.zoo.entry import F32, HALF, RELU, Entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

NAMES = (
    "alexnet",
    "efficientnet_b0",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
)
IN_HALF = {"mobilenet_v3_small", "resnet18", "squeezenet1_1"}
FEW: dict[str, Any] = {"num_classes": 10}


def entries() -> Iterator[Entry]:
    """All of them."""
    import torch
    from torchvision.models import detection, segmentation, video

    image = ((1, 3, 64, 64),)
    for name in NAMES:
        yield Entry(f"torchvision/{name}", _of(name), image, HALF if name in IN_HALF else F32)
    resnet = Entry("torchvision/resnet18", _of("resnet18"), image)
    yield resnet.named(", in 18 engines", options={"torch_executed_ops": [RELU]})
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    yield resnet.named(", dynamic batch", dynamic=(batch,), inputs=((2, 3, 64, 64),))
    yield Entry("torchvision/vgg11_bn", _vgg, ((1, 3, 32, 32),), HALF)
    yield Entry("torchvision/vit, 2 blocks", _vit, ((1, 3, 32, 32),), HALF)
    yield Entry("torchvision/swin, 4 blocks", _swin, image, HALF)
    yield Entry("torchvision/swin v2, 4 blocks", _swin_v2, image)
    yield Entry("torchvision/convnext, 4 blocks", _convnext, image)
    yield Entry("torchvision/densenet, 8 layers", _densenet, image)
    yield Entry("torchvision/maxvit, 2 blocks", _maxvit, image)
    lraspp, fpn = (
        segmentation.lraspp_mobilenet_v3_large,
        detection.backbone_utils.resnet_fpn_backbone,
    )
    yield Entry("torchvision/lraspp", lambda: lraspp(weights_backbone=None, num_classes=5), image)
    yield Entry(
        "torchvision/resnet18 fpn", lambda: fpn(backbone_name="resnet18", weights=None), image
    )
    clip = ((1, 3, 4, 32, 32),)
    yield Entry("torchvision/r3d_18", lambda: video.r3d_18(weights=None, **FEW), clip)


def _of(name: str) -> Any:
    def make() -> nn.Module:
        import torchvision

        module: nn.Module = getattr(torchvision.models, name)(weights=None, **FEW)
        return module

    return make


def _vgg() -> nn.Module:
    import torch
    import torchvision

    features = torchvision.models.vgg11_bn(weights=None, init_weights=False).features
    return torch.nn.Sequential(features, torch.nn.Flatten(), torch.nn.Linear(512, 10))


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
        num_classes=10,
    )


def _swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10)


def _swin_v2() -> nn.Module:
    from torchvision.models.swin_transformer import (
        PatchMergingV2,
        SwinTransformer,
        SwinTransformerBlockV2,
    )

    return SwinTransformer(
        [4, 4],
        24,
        [2, 2],
        [2, 4],
        [4, 4],
        num_classes=10,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )


def _convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)], num_classes=10)


def _densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(8, (2, 2, 2, 2), 16, num_classes=10)


def _maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=2,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.1,
        num_classes=10,
    )
