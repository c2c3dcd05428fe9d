"""What an engine says of one weight, and what a source says of one tensor."""

from __future__ import annotations

from math import prod
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field

from refitkit.model.base import Frozen

Dim = Annotated[int, Field(ge=0, lt=2**62)]

SlotKey: TypeAlias = tuple[str, str]
"""``(engine, slot)``: a slot among those of all engines of a module."""

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
"""Bytes per element, by torch's dtype name without the ``torch.``."""


def _known(name: str) -> str:
    if name not in ITEM_BYTES:
        raise ValueError(f"there is no dtype {name!r}")
    return name


DtypeName = Annotated[str, AfterValidator(_known)]


class TensorInfo(Frozen):
    """What a source says of one tensor without reading it.

    Attributes:
        dtype: torch's name without the ``torch.``, such as ``float32``.
        shape: Sizes of all dimensions.
        persistent: False for what a state_dict would not hold (a non-persistent buffer, a lifted
            constant). Such an entry may override a pinned value but is never *unexpected*.
        unusable: Why the tensor cannot be a weight as it is (sparse, no data); empty if it can.
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
    """One weight of an engine, with what the *engine* says of it.

    Attributes:
        engine: Name of the engine.
        name: The engine's own name of the weight.
        dtype: torch's name without the ``torch.``.
        shape: Sizes where the engine knows them, else None.
        count: Number of elements.
        device: Where the engine keeps it, as torch writes it: ``cpu``, ``cuda:0``.
        readable: Whether the engine can read the weight back.
        mutable: Whether calls of the module may change it (a buffer updated in place).
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
        """Bytes of all elements, packed."""
        return self.count * ITEM_BYTES[self.dtype]

    @property
    def key(self) -> SlotKey:
        """``(engine, name)``."""
        return self.engine, self.name


# MERGED layers: Layer types of TensorRT networks that hold weights.


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
