"""One source for the tensors of one refit after another, as long as their headers are the same.

What reads this source can be used again: it then reads the tensors that the source has at the time.
"""

from __future__ import annotations

from functools import partial
from operator import attrgetter, is_
from typing import TYPE_CHECKING, TypeGuard

import torch

from refitkit.errors import SourceError
from refitkit.recipe.sources import (
    ModuleWeights,
    TensorMap,
    are_plain,
    ends_of,
    have_own_bits,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from refitkit.protocols import WeightSource

_HEADER = attrgetter("dtype", "shape", "device", "layout", "requires_grad")


class SteadyTensors(TensorMap):
    """The tensors of a state_dict or module, and later of others with the same headers."""

    def __init__(self, source: TensorMap, tensors: Mapping[str, torch.Tensor]) -> None:
        """Called by ``of``."""
        self._now = _Tensors(tensors)
        super().__init__(self._now, source.description)
        self.is_donated = source.is_donated
        values = list(tensors.values())
        self._kinds = list(map(type, values))
        self._headers = list(map(_HEADER, values))
        self._strides = list(map(torch.Tensor.stride, values))
        self._offsets = list(map(torch.Tensor.storage_offset, values))
        self._ends = ends_of(values)

    def loader(self, name: str) -> Callable[[], torch.Tensor]:
        """Return a function that does the same as ``get`` of a name, and is faster."""
        return partial(_Tensors.__getitem__, self._now, name)

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
            or not have_own_bits(values, self._ends_of(values))
        ):
            return False
        self._now.clear()
        self._now.update(tensors)
        self.description = source.description
        return True

    def _ends_of(self, values: list[torch.Tensor]) -> list[int]:
        """See ``ends_of``: usually the same as those of the tensors before."""
        same = list(map(torch.Tensor.storage_offset, values)) == self._offsets
        return self._ends if same else ends_of(values)

    def still_gives(self, source: WeightSource) -> bool:
        """Whether the tensors are those that a source has now: the same objects."""
        now = source.in_memory if _may_be_steady(source) else None
        mine = self._now
        return now is not None and all(map(is_, now.values(), map(mine.__getitem__, now)))

    def drop(self) -> None:
        """Keep no tensor alive. Nothing can be read until ``take`` takes others."""
        self._now.clear()


class _Tensors(dict[str, torch.Tensor]):
    """The tensors of a refit; none once it has ended."""

    def __missing__(self, name: str) -> torch.Tensor:
        raise SourceError(
            f"{name!r} cannot be read any more: its refit has ended.",
            hint="Values can be loaded until Engine.stage returns; stage_over until the commit.",
        )


def _may_be_steady(source: WeightSource) -> TypeGuard[TensorMap]:
    # other sources may read what they give, or compute it
    return type(source) is TensorMap or type(source) is ModuleWeights
