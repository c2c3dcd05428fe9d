"""Room for all weights of an engine, in one piece of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from refitkit.program.dtypes import dtype_of
from refitkit.protocols import Place, Places

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from refitkit.builtin.torch_tensorrt.weighttypes import WeightFact

_ALIGNMENT = 256  # bytes; what CUDA's own allocator gives


@dataclass(frozen=True)
class Layout:
    """Where each weight lies. Weights of one dtype lie together, so that one kernel reads them.

    Attributes:
        facts: All weights, in order.
        offsets: Where each begins, in bytes, by name.
        nbytes: Size of all.
        runs: First byte and end of all weights of a dtype, by its name.
        places: The same for those who compare two sets.
    """

    facts: Mapping[str, WeightFact]
    offsets: Mapping[str, int]
    nbytes: int
    runs: Mapping[str, tuple[int, int]]
    places: Places

    @classmethod
    def of(cls, facts: Iterable[WeightFact]) -> Layout:
        """Lay out weights, each at an address that suits every type."""
        ordered = sorted(facts, key=lambda fact: (fact.dtype, fact.name))
        offsets: dict[str, int] = {}
        runs: dict[str, tuple[int, int]] = {}
        end = 0
        for fact in ordered:
            offsets[fact.name] = end
            size = fact.count * dtype_of(fact.dtype).itemsize
            first, _ = runs.get(fact.dtype, (end, end))
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
            runs[fact.dtype] = (first, end)
        places = Places(
            Place(fact.name, dtype_of(fact.dtype), offsets[fact.name], fact.count)
            for fact in ordered
        )
        return cls({fact.name: fact for fact in ordered}, offsets, end, runs, places)


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that is not expected to change, as it was at one time.

    Attributes:
        tensor: It, or a view of it; kept, so that nothing else comes to lie at its address.
        version: How often its memory had been changed.
    """

    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Constant | None:
        """A tensor as it is now; None where torch does not count its changes, or puts off some."""
        uncertain = tensor.is_inference() or tensor.is_neg() or tensor.is_conj()
        return None if uncertain else cls(tensor, tensor._version)  # noqa: SLF001

    def is_same_as(self, other: Constant | None) -> bool:
        """Whether both are the same elements of the same memory, unchanged in between."""
        if other is None or self.version != other.version:
            return False
        mine, theirs = self.tensor, other.tensor
        return mine is theirs or (
            mine.data_ptr() == theirs.data_ptr()
            and mine.device == theirs.device
            and mine.dtype is theirs.dtype
            and mine.shape == theirs.shape
            and mine.stride() == theirs.stride()
        )


class Arena:
    """One set of weights.

    Attributes:
        memory: All of it, as bytes; gaps between weights are zero, and stay so.
        views: Each weight, flat, by name.
        tensors: Each weight in its shape, where that is known, by name.
        constants: What weights were last written from, where that is a constant, by name.
    """

    def __init__(self, layout: Layout, device: torch.device, *, pinned: bool = False) -> None:
        """Allocate one, full of zeros."""
        self.memory = torch.zeros(
            layout.nbytes, dtype=torch.uint8, device=device, pin_memory=pinned
        )
        self.views = {
            name: self._view(layout.offsets[name], fact.count, fact.dtype)
            for name, fact in layout.facts.items()
        }
        self.tensors = {
            name: view if (shape := layout.facts[name].shape) is None else view.view(shape)
            for name, view in self.views.items()
        }
        self.constants: dict[str, Constant] = {}
        self.runs = {
            name: self.memory[first:end].view(dtype_of(name))
            for name, (first, end) in layout.runs.items()
        }

    def _view(self, offset: int, count: int, dtype: str) -> torch.Tensor:
        kind = dtype_of(dtype)
        return self.memory[offset : offset + count * kind.itemsize].view(kind)

    def copy_from(self, other: Arena) -> None:
        """Take over all values of another one with the same layout."""
        self.constants.clear()
        self.memory.copy_(other.memory, non_blocking=True)
