"""One source for the tensors of one refit after another, as long as their headers are the same.

What reads this source can be used again: it then reads the tensors that the source has at the time.
"""

from __future__ import annotations

from operator import attrgetter, is_
from typing import TYPE_CHECKING, TypeGuard

import torch

from refitkit.errors import SourceError
from refitkit.recipe.sources import ModuleWeights, TensorMap, are_plain, have_own_bits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.protocols import WeightSource

_HEADER = attrgetter("dtype", "shape", "device", "layout")


class SteadyTensors(TensorMap):
    """The tensors of a state_dict or module, and later of others with the same headers."""

    def __init__(self, source: TensorMap, tensors: Mapping[str, torch.Tensor]) -> None:
        """Called by ``of``."""
        super().__init__(tensors, source.description)
        self.is_donated = source.is_donated
        values = list(tensors.values())
        self._kinds = list(map(type, values))
        self._headers = list(map(_HEADER, values))
        self._strides = list(map(torch.Tensor.stride, values))

    @classmethod
    def of(cls, source: WeightSource) -> SteadyTensors | None:
        """The tensors of a source; None if it gives anything but plain tensors in memory."""
        if not _may_be_steady(source):
            return None
        tensors = source.in_memory
        if tensors is None or not are_plain(list(tensors.values())):
            return None
        return cls(source, tensors)

    def take(self, source: WeightSource) -> bool:
        """Give the tensors of a source from now on, if they have the same headers.

        Args:
            source: The source.

        Returns:
            Whether they have.
        """
        if not _may_be_steady(source) or source.is_donated != self.is_donated:
            return False
        tensors = source.in_memory
        if tensors is None or list(tensors) != list(self._names):
            return False
        # in this order: only of plain types all of this can be asked
        values = list(tensors.values())
        if (
            list(map(type, values)) != self._kinds
            or any(value.is_nested for value in values)
            or list(map(_HEADER, values)) != self._headers
            or list(map(torch.Tensor.stride, values)) != self._strides
            or not have_own_bits(values)
        ):
            return False
        self._tensors, self.description = tensors, source.description
        return True

    def still_gives(self, source: WeightSource) -> bool:
        """Whether the tensors are those that a source has now: the same objects."""
        now = source.in_memory if _may_be_steady(source) else None
        mine = self._tensors
        return now is not None and all(map(is_, now.values(), map(mine.__getitem__, now)))

    def drop(self) -> None:
        """Keep no tensor alive. Nothing can be read until ``take`` takes others."""
        self._tensors = _Ended()


class _Ended(dict[str, torch.Tensor]):
    """No entries: the refit has ended."""

    def __missing__(self, name: str) -> torch.Tensor:
        raise SourceError(
            f"{name!r} cannot be read any more: its refit has ended.",
            hint="Values can be loaded until Engine.stage returns; stage_over until the commit.",
        )


def _may_be_steady(source: WeightSource) -> TypeGuard[TensorMap]:
    # other sources may read what they give, or compute it
    return type(source) is TensorMap or type(source) is ModuleWeights
