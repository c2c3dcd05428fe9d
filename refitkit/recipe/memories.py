"""Which value a stretch of memory holds: what lets a recording know tensors again.

Tensors are known by their memory, not as Python objects: parameters are wrapped anew, views are
made, arrays of NumPy are turned into tensors and back. A memory is a storage, or several on the
same bytes. It holds the values that were seen in it since it was last written to, by the geometry
in which they were seen.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from collections.abc import Iterator

address_of = torch.Tensor.data_ptr
"""The method itself: a recording replaces it to see who asks."""


class Geometry(NamedTuple):
    """How a tensor lies in a memory.

    Attributes:
        start: Bytes from the start of the memory to the first element.
        shape: Sizes of all dimensions.
        stride: Strides in elements; zero where a dimension has one element or none.
        dtype: Type of the elements.
        lazy: Whether elements are to be conjugated, to be negated.
    """

    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    lazy: tuple[bool, bool]

    @property
    def size(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def contiguous(self) -> bool:
        """Whether elements lie one after another, in logical order, as they are."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return not any(self.lazy)

    @property
    def end(self) -> int:
        """Bytes from the start of the memory to the end of a contiguous tensor."""
        return self.start + self.size * self.dtype.itemsize


@dataclass(eq=False)
class Memory:
    """A stretch of memory.

    Attributes:
        address: Its first byte.
        nbytes: Its size.
        storages: What keeps it; it is gone when all of them are.
        leaves: Names of the leaves that lie in it.
        values: What it holds, by geometry.
        device: Kind of device.
    """

    address: int
    nbytes: int
    storages: list[Any]
    device: str
    leaves: list[str] = field(default_factory=list)
    values: dict[Geometry, Any] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        """Whether any storage of it is."""
        return any(not storage.expired() for storage in self.storages)

    def around(self, wanted: Geometry) -> Iterator[tuple[Geometry, Any]]:
        """Contiguous values that contain another place of the same dtype, smallest first."""
        last = sum((n - 1) * s for n, s in zip(wanted.shape, wanted.stride, strict=True))
        end = wanted.start + (last + 1) * wanted.dtype.itemsize
        found = [
            (geometry, value)
            for geometry, value in self.values.items()
            if geometry.dtype == wanted.dtype
            and geometry.contiguous
            and geometry.start <= wanted.start
            and end <= geometry.end
            and (wanted.start - geometry.start) % wanted.dtype.itemsize == 0
        ]
        yield from sorted(found, key=lambda item: item[0].size)


class Memories:
    """All memories that a recording has seen.

    It keeps no data alive. A storage that is gone keeps its identity as long as this lives, so that
    no new one can be taken for it.
    """

    def __init__(self) -> None:
        """Start with none."""
        self._by_storage: dict[int, Memory] = {}
        self._sorted: list[tuple[int, int]] = []
        self._numbered: dict[int, Memory] = {}

    def find(self, tensor: torch.Tensor) -> Memory | None:
        """The memory of a tensor, if it is known: by its storage, or by its address."""
        storage = tensor.untyped_storage()
        found = self._by_storage.get(storage._cdata)  # noqa: SLF001 - its identity
        if found is None and storage.nbytes():
            found = self.at(storage.data_ptr(), storage.nbytes())
            if found is not None:
                self._keep(found, storage)
        return found

    def add(self, tensor: torch.Tensor) -> Memory:
        """The memory of a tensor whose storage is new."""
        storage = tensor.untyped_storage()
        memory = Memory(storage.data_ptr(), storage.nbytes(), [], tensor.device.type)
        self._keep(memory, storage)
        if memory.nbytes:
            number = len(self._numbered)
            self._numbered[number] = memory
            insort(self._sorted, (memory.address, number))
        return memory

    def _keep(self, memory: Memory, storage: torch.UntypedStorage) -> None:
        memory.storages.append(StorageWeakRef(storage))  # type: ignore[no-untyped-call]  # torch's
        self._by_storage[storage._cdata] = memory  # noqa: SLF001 - its identity

    def at(self, address: int, nbytes: int) -> Memory | None:
        """The living memory that has these bytes."""
        position = bisect_right(self._sorted, (address, len(self._numbered)))
        while position:
            position -= 1
            _, number = self._sorted[position]
            memory = self._numbered[number]
            if not memory.alive:
                del self._sorted[position]
                memory.values.clear()
                continue
            inside = address + nbytes <= memory.address + memory.nbytes
            return memory if inside else None
        return None


def geometry_of(tensor: torch.Tensor, memory: Memory) -> Geometry:
    """How a tensor lies in its memory."""
    shape = tuple(tensor.shape)
    empty = 0 in shape
    stride = tuple(
        0 if empty or size == 1 else step for size, step in zip(shape, tensor.stride(), strict=True)
    )
    start = 0 if empty else address_of(tensor) - memory.address
    return Geometry(start, shape, stride, tensor.dtype, (tensor.is_conj(), tensor.is_neg()))
