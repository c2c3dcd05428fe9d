"""One source for the tensors of one refit after another, as long as their headers are the same.

What follows from names and headers alone is found out once, and what reads this source can be used
again: it then reads the tensors that the source has at that time.
"""

from __future__ import annotations

from operator import attrgetter, ge
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from refitkit.recipe.sources import PLAIN, ModuleWeights, TensorMap

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from refitkit.protocols import WeightSource

_PLAIN = frozenset(PLAIN)
_Headers: TypeAlias = tuple[list[str], list[type], list[tuple[int, ...]], list[Any]]
_HEADER = attrgetter("dtype", "shape", "device")


class SteadyTensors(TensorMap):
    """Contiguous tensors of a state_dict or module, and later others with the same headers.

    Attributes:
        headers: Name, type, strides, and dtype, shape and device of each tensor, as four lists.
    """

    def __init__(self, tensors: Mapping[str, Any], description: str, headers: _Headers) -> None:
        """Called by ``of``."""
        super().__init__({}, description)
        self._tensors, self._names = tensors, dict.fromkeys(tensors)
        self.headers = headers
        self._doubtful: tuple[object, list[str]] | None = None

    @classmethod
    def of(cls, source: WeightSource) -> SteadyTensors | None:
        """The tensors of a source; None if it gives anything but contiguous tensors in memory."""
        if type(source) is not TensorMap and type(source) is not ModuleWeights:
            return None
        tensors = source.in_memory
        headers = None if tensors is None else _headers(tensors)
        if tensors is None or headers is None:
            return None
        found = cls(tensors, source.description, headers)
        found.is_donated = source.is_donated
        return found

    def is_like(self, other: SteadyTensors) -> bool:
        """Whether ``take`` may take the tensors of another one."""
        return self.is_donated == other.is_donated and self.headers == other.headers

    def take(self, other: SteadyTensors) -> None:
        """Give the tensors of another one from now on."""
        self._tensors, self.description = other._tensors, other.description

    def drop(self) -> None:
        """Keep no tensor alive. Nothing can be read until ``take`` takes others."""
        self._tensors = {}

    def doubtful(
        self, names: Iterable[str], wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> Iterator[str]:
        """Names of doubtful entries; see ``TensorMap``. They follow from the headers alone."""
        if self._doubtful is None or self._doubtful[0] is not wanted:
            self._doubtful = wanted, list(super().doubtful(self._names, wanted))
        return iter([name for name in self._doubtful[1] if name in names])


def _headers(tensors: Mapping[str, Any]) -> _Headers | None:
    """Headers of all entries; None if one is no plain contiguous tensor that has its data."""
    values = list(tensors.values())
    kinds = list(map(type, values))
    # subclasses run code of their own when they are asked for an attribute
    if not _PLAIN.issuperset(kinds):
        return None
    kind, odd = torch.Tensor, torch._C._functorch.is_functorch_wrapped_tensor  # noqa: SLF001
    try:
        strides = list(map(kind.stride, values))
        held = [storage.nbytes() for storage in map(kind.untyped_storage, values)]
    except (RuntimeError, NotImplementedError):  # sparse tensors have neither
        return None
    usable = (
        all(map(kind.is_contiguous, values))
        and all(map(ge, held, [value.nbytes for value in values]))
        and not any(map(kind.is_neg, values))
        and not any(map(kind.is_conj, values))
        and not any(map(odd, values))
        and not any(value.is_meta for value in values)
    )
    return (list(tensors), kinds, strides, list(map(_HEADER, values))) if usable else None
