"""TensorRT's data types as torch has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from refitkit.errors import NotRefittableError, Problem

if TYPE_CHECKING:
    from refitkit.model import Slot

_TORCH_NAME = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
    "FP8": "float8_e4m3fn",
    "E8M0": "float8_e8m0fnu",
}
_TRT_NAME = {torch: trt for trt, torch in _TORCH_NAME.items()}
_TWO_IN_A_BYTE = {"INT4", "FP4"}
"""torch keeps such weights as ``uint8``, and TensorRT counts their halves."""


def torch_name(kind: str) -> str | None:
    """Torch's name for a ``tensorrt.DataType``, by its name; None where torch has none."""
    return "uint8" if kind in _TWO_IN_A_BYTE else _TORCH_NAME.get(kind)


@dataclass(frozen=True)
class WeightFact:
    """What an engine asks of one weight.

    Attributes:
        name: The engine's own name of it.
        dtype: torch's name without the ``torch.``.
        count: Number of elements as torch counts them.
        trt_type: Name of the ``tensorrt.DataType``.
        trt_count: Number of elements as TensorRT counts them.
        shape: Sizes where somebody knows them; TensorRT does not.
    """

    name: str
    dtype: str
    count: int
    trt_type: str
    trt_count: int
    shape: tuple[int, ...] | None = None


def fact_of_trt(name: str, data_type: Any, count: int) -> WeightFact:
    """The fact that TensorRT's own words for a weight amount to.

    Args:
        name: Name of the weight.
        data_type: A ``tensorrt.DataType``.
        count: Number of its elements.

    Raises:
        NotRefittableError: torch has no such type.
    """
    kind = data_type.name
    if kind in _TWO_IN_A_BYTE:
        return WeightFact(name, "uint8", (count + 1) // 2, kind, count)
    if kind not in _TORCH_NAME:
        problem = Problem(name, "dtype", f"TensorRT's {kind}", f"one of {sorted(_TORCH_NAME)}")
        raise NotRefittableError("torch has no such type of weights.", problems=[problem])
    return WeightFact(name, _TORCH_NAME[kind], count, kind, count)


def fact_of_slot(slot: Slot) -> WeightFact | None:
    """The fact that a slot amounts to; None where TensorRT has no such type."""
    kind = _TRT_NAME.get(slot.dtype)
    if kind is None:
        return None
    return WeightFact(slot.name, slot.dtype, slot.count, kind, slot.count, slot.shape)
