"""Models of torchvision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scripts.zoo.entry import F32, HALF, RELU, Entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

SIDES: dict[str, int] = {
    "alexnet": 64,
    "convnext_tiny": 64,
    "efficientnet_b0": 64,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_large": 64,
    "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
}
IN_HALF = {
    "efficientnet_b0",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
}
FEW: dict[str, Any] = {"num_classes": 10}


def entries() -> Iterator[Entry]:
    """All of them."""
    import torch
    from torchvision.models import detection, segmentation, video

    for name, side in SIDES.items():
        image = ((1, 3, side, side),)
        yield Entry(f"torchvision/{name}", _of(name), image, HALF if name in IN_HALF else F32)
    resnet = Entry("torchvision/resnet18", _of("resnet18"), ((1, 3, 64, 64),))
    yield resnet.named(" in 18 engines", options={"torch_executed_ops": [RELU]}, dtypes=HALF)
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    yield resnet.named(" dynamic batch", dynamic=(batch,), inputs=((2, 3, 64, 64),))
    yield Entry("torchvision/vgg11_bn", _vgg, ((1, 3, 32, 32),), HALF)
    yield Entry("torchvision/vit, 2 blocks", _vit, ((1, 3, 32, 32),), HALF)
    yield Entry("torchvision/densenet, small", _densenet, ((1, 3, 64, 64),))
    yield Entry("torchvision/maxvit, small", _maxvit, ((1, 3, 64, 64),))
    for name, side in {"lraspp_mobilenet_v3_large": 64, "deeplabv3_mobilenet_v3_large": 64}.items():
        make = getattr(segmentation, name)
        yield Entry(f"torchvision/{name}", _segmenting(make), ((1, 3, side, side),))
    yield Entry(
        "torchvision/fcn_resnet50", _segmenting(segmentation.fcn_resnet50), ((1, 3, 64, 64),)
    )
    fpn = detection.backbone_utils.resnet_fpn_backbone
    yield Entry(
        "torchvision/resnet18 fpn",
        lambda: fpn(backbone_name="resnet18", weights=None),
        ((1, 3, 64, 64),),
    )
    for name in ("r3d_18", "mc3_18", "r2plus1d_18"):
        make = getattr(video, name)
        yield Entry(
            f"torchvision/{name}", lambda make=make: make(weights=None, **FEW), ((1, 3, 4, 32, 32),)
        )


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


def _segmenting(make: Any) -> Any:
    return lambda: make(weights=None, weights_backbone=None, num_classes=5)
