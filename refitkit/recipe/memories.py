"""Which value a stretch of memory holds: what lets a recording know tensors again.

Tensors are known by their memory, not as Python objects: parameters are wrapped anew, views are
made, arrays of NumPy are turned into tensors and back. A memory is a storage, or several that have
bytes in common. It holds the values that were seen in it since they were last written to, by the
geometry in which they were seen.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

address_of = torch.Tensor.data_ptr
"""The method itself: a recording replaces it to see who asks."""
storage_address = torch.UntypedStorage.data_ptr
"""Likewise of storages."""
_WITHOUT_DISPATCH = torch._C._disabled_torch_dispatch_impl  # noqa: SLF001 - its only name


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
        """Bytes from the start of the memory to the end of the last element."""
        if not self.size:
            return self.start
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.start + (last + 1) * self.dtype.itemsize

    @property
    def order(self) -> tuple[int, ...]:
        """Dimensions in the order in which they lie in memory, slowest first."""
        moving = {d for d, size in enumerate(self.shape) if size > 1}
        return tuple(
            sorted(range(len(self.shape)), key=lambda d: (d in moving, -self.stride[d], d))
        )

    @property
    def turned(self) -> tuple[int, ...] | None:
        """This order, if it is not that of the dimensions and there are no gaps."""
        if self.contiguous or any(self.lazy):
            return None
        order = self.order
        return order if self.permuted(order).contiguous else None

    def permuted(self, order: tuple[int, ...]) -> Geometry:
        """The same with dimensions in another order."""
        shape, stride = (tuple(part[d] for d in order) for part in (self.shape, self.stride))
        return self._replace(shape=shape, stride=stride)

    def meets(self, other: Geometry) -> bool:
        """Whether bytes from first to last element are also such bytes of another one."""
        return self.start < other.end and other.start < self.end

    def contains(self, other: Geometry) -> bool:
        """Whether the elements of another one are among its own, if it has no gaps."""
        return (
            self.dtype == other.dtype
            and self.start <= other.start
            and other.end <= self.end
            and (other.start - self.start) % self.dtype.itemsize == 0
        )


@dataclass(eq=False)
class Memory:
    """A stretch of memory.

    Attributes:
        address: Its first byte.
        nbytes: Its size.
        device: Kind of device.
        storages: What keeps it, by identity; it is gone when all of them are.
        leaves: Names of the leaves that lie in it.
        values: What it holds, by geometry.
        foreign: Whether others than torch may write to it: an array of NumPy keeps it.
        loans: Arrays of NumPy on it that were given out.
    """

    address: int
    nbytes: int
    device: str
    storages: dict[int, Any] = field(default_factory=dict)
    leaves: list[str] = field(default_factory=list)
    values: dict[Geometry, Any] = field(default_factory=dict)
    foreign: bool = False
    loans: list[Any] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        """Whether any storage of it is, and has not moved elsewhere."""
        for reference in self.storages.values():
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)  # noqa: SLF001
            if storage is not None and self.has(storage_address(storage), storage.nbytes()):
                return True
        return False

    def has(self, address: int, nbytes: int) -> bool:
        """Whether these bytes lie in it."""
        end = self.address + self.nbytes
        return self.address <= address and address + nbytes <= end


class Memories:
    """All memories that a recording has seen. No two have a byte in common.

    It keeps no data alive. A storage that is gone keeps its identity as long as this lives, so that
    no new one can be taken for it.
    """

    def __init__(self) -> None:
        """Start with none."""
        self._by_storage: dict[int, Memory] = {}
        self._sorted: list[tuple[int, int]] = []
        self._numbered: dict[int, Memory] = {}
        self._count = 0

    def find(self, tensor: torch.Tensor) -> Memory | None:
        """The memory of a tensor, if it is known: by its storage, or by its address."""
        storage = tensor.untyped_storage()
        identity = storage._cdata  # noqa: SLF001 - it has no other name
        address, nbytes = storage_address(storage), storage.nbytes()
        found = self._by_storage.get(identity)
        if found is not None and found.has(address, nbytes):
            return found
        if found is not None:  # it was resized
            del self._by_storage[identity], found.storages[identity]
        shared = list(self._sharing(address, nbytes))
        if not shared:
            return None
        memory = shared[0]
        if len(shared) > 1 or not memory.has(address, nbytes):
            memory = self._merged(shared, address, nbytes)
        self._keep(memory, storage)
        return memory

    def add(self, tensor: torch.Tensor) -> Memory:
        """The memory of a tensor of which nothing is known."""
        storage = tensor.untyped_storage()
        memory = Memory(storage_address(storage), storage.nbytes(), tensor.device.type)
        self._keep(memory, storage)
        self._number(memory)
        return memory

    def at(self, address: int, nbytes: int) -> Memory | None:
        """The living memory that has these bytes."""
        found = next(self._sharing(address, nbytes), None)
        return found if found is not None and found.has(address, nbytes) else None

    def _keep(self, memory: Memory, storage: torch.UntypedStorage) -> None:
        identity = storage._cdata  # noqa: SLF001 - it has no other name
        memory.storages[identity] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._by_storage[identity] = memory

    def _number(self, memory: Memory) -> None:
        if memory.nbytes:
            self._numbered[self._count] = memory
            insort(self._sorted, (memory.address, self._count))
            self._count += 1

    def _sharing(self, address: int, nbytes: int) -> Iterator[Memory]:
        """Living memories that have some of these bytes, by address; dead ones are forgotten."""
        position = bisect_right(self._sorted, (address, self._count))
        while position and not self._numbered[self._sorted[position - 1][1]].alive:
            position -= 1
            self._forget(position)
        if position and nbytes:
            before = self._numbered[self._sorted[position - 1][1]]
            if address < before.address + before.nbytes:
                yield before
        while position < len(self._sorted) and self._sorted[position][0] < address + nbytes:
            memory = self._numbered[self._sorted[position][1]]
            if memory.alive:
                position += 1
                yield memory
            else:
                self._forget(position)

    def _forget(self, position: int) -> None:
        self._numbered.pop(self._sorted.pop(position)[1]).values.clear()

    def _merged(self, parts: Iterable[Memory], address: int, nbytes: int) -> Memory:
        """One memory of several and of a storage that has bytes of all of them."""
        parts = list(parts)
        start = min(address, *(part.address for part in parts))
        end = max(address + nbytes, *(part.address + part.nbytes for part in parts))
        whole = Memory(start, end - start, parts[0].device)
        for part in parts:
            shift = part.address - start
            whole.values |= {g._replace(start=g.start + shift): v for g, v in part.values.items()}
            whole.storages |= part.storages
            whole.leaves += part.leaves
            whole.foreign |= part.foreign
            whole.loans += part.loans
            self._by_storage |= dict.fromkeys(part.storages, whole)
        gone = {id(part) for part in parts}
        self._sorted = [one for one in self._sorted if id(self._numbered[one[1]]) not in gone]
        self._numbered = {n: one for n, one in self._numbered.items() if id(one) not in gone}
        self._number(whole)
        return whole


def geometry_of(tensor: torch.Tensor, memory: Memory) -> Geometry:
    """How a tensor lies in its memory."""
    shape = tuple(tensor.shape)
    empty = 0 in shape
    stride = tuple(
        0 if empty or size == 1 else step for size, step in zip(shape, tensor.stride(), strict=True)
    )
    start = 0 if empty else address_of(tensor) - memory.address
    return Geometry(start, shape, stride, tensor.dtype, (tensor.is_conj(), tensor.is_neg()))


def is_followed(value: Any) -> bool:
    """Whether it is a tensor with data of its own, in the ordinary layout: known by its memory."""
    return (
        isinstance(value, torch.Tensor)
        and type(value).__torch_dispatch__ is _WITHOUT_DISPATCH
        and not value.is_meta
        and value.layout is torch.strided
        and not value.is_quantized
        and not torch._is_functional_tensor(value)  # noqa: SLF001 - there is no other way
        and _has_memory(value)
    )


def _has_memory(value: torch.Tensor) -> bool:
    """Whether it is more than a promise: tracing makes tensors that say they are on a device."""
    try:
        address_of(value)
    except RuntimeError:
        return False
    return True
