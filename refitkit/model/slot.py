"""Descriptions of single tensors: slots of engines, entries of sources, weights of layers."""

from __future__ import annotations

from math import prod
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field

from refitkit.model.base import Frozen

# sizes that do not fit the int64 of torch are refused here, where files are read
Dim = Annotated[int, Field(ge=0, lt=2**62)]

SlotKey: TypeAlias = tuple[str, str]
"""``(engine, slot)``: the key of a slot among all engines of a module."""

# a table, because the model does not import torch
ITEM_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes per element, by the name of the dtype in torch without ``torch.``."""


def _known(name: str) -> str:
    if name not in ITEM_BYTES:
        raise ValueError(f"unknown dtype {name!r}")
    return name


DtypeName = Annotated[str, AfterValidator(_known)]


class TensorInfo(Frozen):
    """The description of a source's entry, known without reading its data.

    Attributes:
        dtype: Name of the dtype in torch without ``torch.``, such as ``float32``.
        shape: Sizes of all dimensions.
        persistent: Whether a state_dict would contain the entry. A non-persistent buffer or a
            lifted constant may override a pinned value, but is never *unexpected*.
        unusable: Why the tensor cannot be a weight (sparse, no data); empty if it can.
    """

    dtype: str
    shape: tuple[Dim, ...]
    persistent: bool = True
    unusable: str = ""

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)


class Slot(Frozen):
    """One weight of an engine, as the engine describes it.

    Attributes:
        engine: Name of the engine.
        name: Name of the weight in the engine.
        dtype: Name of the dtype in torch without ``torch.``.
        shape: Sizes of all dimensions; None if the engine does not know them.
        count: Number of elements.
        device: Device of the weight, as torch writes it: ``cpu``, ``cuda:0``.
        readable: Whether the engine can read the weight.
        mutable: Whether calls of the module may write the weight (a buffer updated in place).
    """

    engine: str
    name: str
    dtype: DtypeName
    shape: tuple[Dim, ...] | None
    count: Dim
    device: str = "cpu"
    readable: bool = False
    mutable: bool = False

    @property
    def nbytes(self) -> int:
        """Size of all elements in bytes, without gaps."""
        return self.count * ITEM_BYTES[self.dtype]

    @property
    def key(self) -> SlotKey:
        """``(engine, name)``."""
        return self.engine, self.name


class LayerType(Frozen):
    """One type of TensorRT network layer that has weights, and how to access them.

    Plugins offer layer types with the hook ``refitkit_layer_types``.

    Attributes:
        name: Name in ``tensorrt.LayerType``: ``CONVOLUTION``.
        interface: Class of ``tensorrt`` with the weights as attributes: ``IConvolutionLayer``.
        weights: ``(attribute, role)`` for each weight, such as ``("kernel", "KERNEL")``. The role
            is the last word of the weight's name in the engine, after the name of the layer and a
            space; see ``IRefitter::getAllWeights`` of TensorRT.
    """

    name: str
    interface: str
    weights: tuple[tuple[str, str], ...]
