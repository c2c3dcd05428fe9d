"""Layer types of TensorRT networks that hold weights."""

from __future__ import annotations

from refitkit.model.base import Frozen


class LayerType(Frozen):
    """How weights are read from, and written into, one type of network layer.

    Attributes:
        name: The type as ``tensorrt.LayerType`` names it: ``CONVOLUTION``.
        interface: The class of ``tensorrt`` that gives access to it: ``IConvolutionLayer``.
        weights: ``(attribute, role)`` for each weight: the attribute of that class, and the word by
            which the engine's own name of the weight ends, after the layer's name and a space
            (``("kernel", "KERNEL")``; see ``IRefitter::getAllWeights`` of TensorRT).
    """

    name: str
    interface: str
    weights: tuple[tuple[str, str], ...]
