"""The backends ``torch_tensorrt`` and ``tensorrt_network``.

Importing this package imports neither torch nor torch_tensorrt; the hooks below import what they
need.
"""

from __future__ import annotations

from refitkit.hookspecs import hookimpl
from refitkit.model import LayerType

NAME = "torch_tensorrt"
NETWORK = "tensorrt_network"

LAYER_TYPES = (
    LayerType(
        name="SCALE", interface="IScaleLayer", weights=(("scale", "SCALE"), ("shift", "SHIFT"))
    ),
    LayerType(
        name="CONVOLUTION",
        interface="IConvolutionLayer",
        weights=(("kernel", "KERNEL"), ("bias", "BIAS")),
    ),
    LayerType(
        name="DECONVOLUTION",
        interface="IDeconvolutionLayer",
        weights=(("kernel", "KERNEL"), ("bias", "BIAS")),
    ),
    LayerType(name="CONSTANT", interface="IConstantLayer", weights=(("weights", "CONSTANT"),)),
)
"""What ``tensorrt`` (10 to 11, and TensorRT-RTX) has: see ``NvInfer.h``."""


@hookimpl
def refitkit_layer_types() -> list[LayerType]:
    """SCALE, CONVOLUTION, DECONVOLUTION, CONSTANT."""
    return list(LAYER_TYPES)
