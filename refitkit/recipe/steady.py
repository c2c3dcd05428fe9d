"""One source for the tensors of one refit after another, as long as their headers are the same.

What reads this source can be used again: it then reads the tensors that the source has at the time.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from refitkit.recipe.sources import ModuleWeights, TensorMap, are_plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.protocols import WeightSource

_HEADER = attrgetter("dtype", "shape", "device")


class SteadyTensors(TensorMap):
    """The tensors of a state_dict or module, and later of others with the same headers."""

    def __init__(self, source: TensorMap, found: _Found) -> None:
        """Called by ``of``."""
        super().__init__(found.tensors, source.description)
        self.is_donated = source.is_donated
        self._headers = found.headers

    @classmethod
    def of(cls, source: WeightSource) -> SteadyTensors | None:
        """The tensors of a source; None if it gives anything but plain tensors in memory."""
        if not isinstance(source, TensorMap):
            return None
        found = _Found.of(source)
        return None if found is None else cls(source, found)

    def take(self, source: WeightSource) -> bool:
        """Give the tensors of a source from now on, if they have the same headers.

        Args:
            source: The source.

        Returns:
            Whether they have.
        """
        if not isinstance(source, TensorMap) or source.is_donated != self.is_donated:
            return False
        found = _Found.of(source)
        if found is None or found.headers != self._headers:
            return False
        self._tensors, self.description = found.tensors, source.description
        return True

    def drop(self) -> None:
        """Keep no tensor alive. Nothing can be read until ``take`` takes others."""
        self._tensors = {}


class _Found(NamedTuple):
    """Plain tensors in memory.

    Attributes:
        tensors: All entries, by name.
        headers: Names, types, strides, and dtypes, shapes and devices.
    """

    tensors: Mapping[str, Any]
    headers: tuple[list[str], list[type], list[tuple[int, ...]], list[Any]]

    @classmethod
    def of(cls, source: TensorMap) -> _Found | None:
        """All entries of a source; None if it is of another type, or some are not plain."""
        known = type(source) is TensorMap or type(source) is ModuleWeights
        tensors = source.in_memory if known else None
        values = [] if tensors is None else list(tensors.values())
        if tensors is None or not are_plain(values):
            return None
        strides, rest = map(torch.Tensor.stride, values), map(_HEADER, values)
        return cls(tensors, (list(tensors), list(map(type, values)), list(strides), list(rest)))
