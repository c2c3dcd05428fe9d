"""One source for the tensors of one refit after another, as long as their headers are the same.

What reads this source can be used again: it then reads the tensors that the source has at the time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from refitkit.errors import SourceError
from refitkit.recipe.sources import (
    PLAIN,
    ModuleWeights,
    TensorMap,
    are_plain,
    ends_of,
    have_memory,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.protocols import WeightSource

_Alike = Callable[..., bool]


def _comparison_with(values: Sequence[torch.Tensor]) -> _Alike | None:
    """Return a function that compares headers with those of tensors; None if torch has changed.

    It is the comparison that torch.compile makes of the inputs of a function. In Python it takes 25
    times as long.

    Args:
        values: Plain tensors, each once.
    """
    try:
        guards: Any = importlib.import_module("torch._C._dynamo.guards")
        one = guards.TensorGuards(
            *values,
            dynamic_dims_sizes=[list(value.shape) for value in values],
            dynamic_dims_strides=[list(value.stride()) for value in values],
        )
    except (ImportError, AttributeError, TypeError):
        return None
    alike: _Alike = one.check
    return alike


class SteadyTensors(TensorMap):
    """The tensors of a state_dict or module, and later of others with the same headers."""

    def __init__(
        self, source: TensorMap, tensors: Mapping[str, torch.Tensor], are_alike: _Alike
    ) -> None:
        """Called by ``of``."""
        self._now = _Tensors(tensors)
        super().__init__(self._now, source.description)
        self.is_donated = source.is_donated
        values = list(tensors.values())
        self._firsts, self._are_alike = _firsts(values), are_alike
        self._offsets = list(map(torch.Tensor.storage_offset, values))
        self._ends = ends_of(values)

    def loader(self, name: str) -> Callable[[], torch.Tensor]:
        """Return a function that does the same as ``get`` of a name, and is faster."""
        return partial(_Tensors.__getitem__, self._now, name)

    @classmethod
    def of(cls, source: WeightSource) -> SteadyTensors | None:
        """The tensors of a source; None if it gives anything but plain tensors in memory.

        None, too, with a torch that cannot compare headers.
        """
        if not _may_be_steady(source):
            return None
        tensors = source.in_memory
        if tensors is None or not are_plain(list(tensors.values())):
            return None
        values = list(tensors.values())
        are_alike = _comparison_with(_at(_firsts(values), values))
        return None if are_alike is None else cls(source, tensors, are_alike)

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
        values = list(tensors.values())
        if not self._are_like(values) or not have_memory(values, self._ends_of(values)):
            return False
        self._now.clear()
        self._now.update(tensors)
        self.description = source.description
        return True

    def _are_like(self, values: list[Any]) -> bool:
        """Whether tensors have the headers of those before. Then they hold their own bits, too."""
        return (
            # in this order: subclasses run code of their own when they are asked, and the last
            # comparison ends the process at a nested tensor
            PLAIN.issuperset(map(type, values))
            and set(map(_LAYOUT, values)) <= {torch.strided}
            and not any(map(_IS_NESTED, values))
            and _firsts(values) == self._firsts
            # types, dtypes, devices, shapes, strides, requires_grad and dispatch keys. Lazily
            # negated or conjugated tensors have other keys, and so have those of transforms
            and self._are_alike(*_at(self._firsts, values))
        )

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


_LAYOUT, _IS_NESTED = attrgetter("layout"), attrgetter("is_nested")


def _firsts(values: Sequence[object]) -> list[int] | None:
    """Return where each object comes first; None if none comes twice. Tied weights do."""
    if len(set(map(id, values))) == len(values):
        return None
    found: dict[int, int] = {}
    return [found.setdefault(id(value), place) for place, value in enumerate(values)]


def _at(firsts: list[int] | None, values: list[torch.Tensor]) -> list[torch.Tensor]:
    """The values without those that came before."""
    if firsts is None:
        return values
    return [values[place] for place in dict.fromkeys(firsts)]


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
