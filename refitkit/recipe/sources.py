"""Tensors by name as a weight source, and what makes a tensor unfit to be a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from refitkit.model import TensorInfo
from refitkit.program.dtypes import dtype_name

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def unusable_reason(value: Any) -> str:
    """Why a value cannot be a weight as it is; empty if it can.

    Usable are strided tensors with data: any shape, strides, offset and device.
    """
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}, not a tensor"
    if value.layout is not torch.strided:
        return f"layout {dtype_name_of_layout(value.layout)}; pass value.to_dense()"
    if value.is_quantized:
        return "a quantized tensor; pass value.dequantize() or use a plugin that maps it"
    if value.is_meta:
        return "a meta tensor without data; load the checkpoint first"
    if type(value) not in _PLAIN:
        return f"a tensor subclass {type(value).__name__}; pass plain tensors"
    return ""


def dtype_name_of_layout(layout: torch.layout) -> str:
    """``sparse_coo`` for ``torch.sparse_coo``."""
    return str(layout).removeprefix("torch.")


def describe_tensor(value: Any, *, persistent: bool = True) -> TensorInfo:
    """What a source says of a value that it holds in memory."""
    if not isinstance(value, torch.Tensor):
        return TensorInfo(
            dtype="", shape=(), persistent=persistent, unusable=unusable_reason(value)
        )
    return TensorInfo(
        dtype=dtype_name(value.dtype),
        shape=tuple(value.shape),
        persistent=persistent,
        unusable=unusable_reason(value),
    )


class TensorMap:
    """A mapping from FQN to tensor as a weight source."""

    def __init__(
        self,
        tensors: Mapping[str, Any],
        description: str = "a state_dict",
        *,
        not_persistent: Collection[str] = (),
    ) -> None:
        """Keep references to the tensors, no copies.

        Args:
            tensors: Values by FQN. What is not a usable tensor is told by ``info``.
            description: What this is, for messages.
            not_persistent: Names that a state_dict would not hold.
        """
        self.description = description
        self._tensors = tensors
        self._not_persistent = frozenset(not_persistent)

    def names(self) -> Collection[str]:
        """All names."""
        return self._tensors.keys()

    def info(self, fqn: str) -> TensorInfo:
        """Dtype and shape of one tensor."""
        return describe_tensor(self._tensors[fqn], persistent=fqn not in self._not_persistent)

    def get(self, fqn: str) -> torch.Tensor:
        """The tensor itself, without its gradient history."""
        tensor: torch.Tensor = self._tensors[fqn]
        return tensor.detach()
