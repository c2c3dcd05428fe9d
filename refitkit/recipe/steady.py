"""One source for the tensors of one refit after another, as long as their headers are the same.

What reads this source can be used again: it then reads the tensors that the source has at the time.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from refitkit.recipe.sources import ModuleWeights, TensorMap, are_plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.protocols import WeightSource

_Headers: TypeAlias = tuple[list[str], list[type], list[tuple[int, ...]], list[Any]]
_HEADER = attrgetter("dtype", "shape", "device")


class SteadyTensors(TensorMap):
    """The tensors of a state_dict or module, and later of others with the same headers."""

    def __init__(self, source: TensorMap, tensors: Mapping[str, Any], headers: _Headers) -> None:
        """Called by ``of``."""
        super().__init__(tensors, source.description)
        self.is_donated = source.is_donated
        self._headers = headers

    @classmethod
    def of(cls, source: WeightSource) -> SteadyTensors | None:
        """The tensors of a source; None if it gives anything but plain tensors in memory."""
        found = _tensors_of(source)
        if found is None or not isinstance(source, TensorMap):
            return None
        return cls(source, *found)

    def take(self, source: WeightSource) -> bool:
        """Give the tensors of a source from now on, if they have the same headers.

        Args:
            source: The source.

        Returns:
            Whether they have.
        """
        found = _tensors_of(source)
        if found is None or not isinstance(source, TensorMap):
            return False
        tensors, headers = found
        if source.is_donated != self.is_donated or headers != self._headers:
            return False
        self._tensors, self.description = tensors, source.description
        return True

    def drop(self) -> None:
        """Keep no tensor alive. Nothing can be read until ``take`` takes others."""
        self._tensors = {}


def _tensors_of(source: WeightSource) -> tuple[Mapping[str, Any], _Headers] | None:
    """All entries with their headers: names, types, strides, and the rest."""
    if type(source) is not TensorMap and type(source) is not ModuleWeights:
        return None
    tensors = source.in_memory
    values = [] if tensors is None else list(tensors.values())
    if tensors is None or not are_plain(values):
        return None
    strides = list(map(torch.Tensor.stride, values))
    return tensors, (list(tensors), list(map(type, values)), strides, list(map(_HEADER, values)))
