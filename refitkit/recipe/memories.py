"""The memory of tensors: which value each stretch of memory holds.

A recording identifies a tensor by its memory and not by its Python object. Torch wraps parameters
anew, creates views, and turns tensors into NumPy arrays and back; only the memory stays the same.
A memory is one storage, or several storages that share bytes. It maps each :class:`Geometry` in
which a value was seen to the value's origin. A write drops the values that it overlaps.

This module hides how memory is looked up and how views are derived. Read it in this order:
:class:`Geometry`; :class:`MemoryRecord` and :class:`MemoryIndex`; the functions that update the
values of a memory; :class:`NumpyExports`, which decides whether NumPy arrays on a memory were read.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right, insort
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from refitkit.model import Tensor
from refitkit.program.dtypes import dtype_name
from refitkit.recipe.origins import ArrayExport, Call, Origin, Unknown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from refitkit.recipe.origins import HostRead, LeafOrigin, Literal


# A recording patches these methods to see who asks for addresses. refitkit itself uses the
# originals, which are looked up here before any recording starts.
address_of = torch.Tensor.data_ptr
"""``Tensor.data_ptr`` without the patch of a recording."""
storage_address = torch.UntypedStorage.data_ptr
"""``UntypedStorage.data_ptr`` without the patch of a recording."""
_WITHOUT_DISPATCH = torch._C._disabled_torch_dispatch_impl  # noqa: SLF001 - there is no public name


class Geometry(NamedTuple):
    """Position and strides of a tensor in a memory, as in ``at::TensorGeometry``.

    Attributes:
        start: Offset of the first element from the start of the memory, in bytes.
        shape: Sizes of all dimensions.
        stride: Strides in elements. Zero for dimensions of size 0 or 1.
        dtype: Dtype of the elements.
        lazy: The lazy conjugate bit and the lazy negative bit.
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
        """Whether the elements lie one after another in logical order, without lazy bits."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return not any(self.lazy)

    @property
    def end(self) -> int:
        """Offset of the end of the last element from the start of the memory, in bytes."""
        if not self.size:
            return self.start
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.start + (last + 1) * self.dtype.itemsize

    @property
    def order(self) -> tuple[int, ...]:
        """Dimensions in their order in memory, slowest first."""
        # Dimensions of size 1 come first, where they do not separate the others.
        moving = {d for d, size in enumerate(self.shape) if size > 1}
        return tuple(
            sorted(range(len(self.shape)), key=lambda d: (d in moving, -self.stride[d], d))
        )

    @property
    def dense_order(self) -> tuple[int, ...] | None:
        """The order in memory, if it is not the logical order and the elements have no gaps."""
        if self.contiguous or any(self.lazy):
            return None
        order = self.order
        return order if self.permuted(order).contiguous else None

    def permuted(self, order: tuple[int, ...]) -> Geometry:
        """Return this geometry with its dimensions in another order."""
        shape, stride = (tuple(part[d] for d in order) for part in (self.shape, self.stride))
        return self._replace(shape=shape, stride=stride)

    def overlaps(self, other: Geometry) -> bool:
        """Return whether the byte ranges from first to last element intersect."""
        return self.start < other.end and other.start < self.end

    def contains(self, other: Geometry) -> bool:
        """Return whether all elements of another geometry are elements of this one.

        Valid only if this geometry has no gaps.
        """
        return (
            self.dtype == other.dtype
            and self.start <= other.start
            and other.end <= self.end
            and (other.start - self.start) % self.dtype.itemsize == 0
        )


def geometry_of(tensor: torch.Tensor, memory: MemoryRecord) -> Geometry:
    """Return the geometry of a tensor in its memory."""
    shape = tuple(tensor.shape)
    empty = 0 in shape
    # Strides that address nothing are arbitrary in torch; zeros make equal tensors compare equal.
    stride = tuple(
        0 if empty or size == 1 else step for size, step in zip(shape, tensor.stride(), strict=True)
    )
    start = 0 if empty else address_of(tensor) - memory.address
    return Geometry(start, shape, stride, tensor.dtype, (tensor.is_conj(), tensor.is_neg()))


def is_tracked(value: Any) -> bool:
    """Return whether a recording tracks a value: a strided tensor with data of its own."""
    # A subclass with a __torch_dispatch__ of its own (FakeTensor, DTensor) holds no data itself.
    return (
        isinstance(value, torch.Tensor)
        and type(value).__torch_dispatch__ is _WITHOUT_DISPATCH
        and not value.is_meta
        and value.layout is torch.strided
        and not value.is_quantized
        and not torch._is_functional_tensor(value)  # noqa: SLF001 - there is no public name
        and _has_memory(value)
    )


def _has_memory(value: torch.Tensor) -> bool:
    """Return whether a tensor has memory; tracing creates tensors that only claim a device."""
    try:
        address_of(value)
    except RuntimeError:
        return False
    return True


# -- memories ---------------------------------------------------------------------------------


@dataclass(eq=False)
class MemoryRecord:
    """One stretch of memory and the values in it.

    Attributes:
        address: Address of the first byte.
        nbytes: Size in bytes.
        device: Device type.
        storages: Weak references to the storages on this memory, by identity of the storage.
        leaves: FQNs of the leaves in this memory.
        values: Origin of each value in this memory, by geometry.
        numpy_writable: Whether a NumPy array owns the memory, so that NumPy can write to it.
        exports: NumPy arrays on this memory that the recorded code received.
    """

    address: int
    nbytes: int
    device: str
    storages: dict[int, Any] = field(default_factory=dict)
    leaves: list[str] = field(default_factory=list)
    values: dict[Geometry, Any] = field(default_factory=dict)
    numpy_writable: bool = False
    exports: list[ArrayExport] = field(default_factory=list)

    @property
    def is_alive(self) -> bool:
        """Whether any storage of this memory exists and still lies in it."""
        for reference in self.storages.values():
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)  # noqa: SLF001
            if storage is not None and self.covers(storage_address(storage), storage.nbytes()):
                return True
        return False

    def covers(self, address: int, nbytes: int) -> bool:
        """Return whether a range of bytes lies in this memory."""
        end = self.address + self.nbytes
        return self.address <= address and address + nbytes <= end


class MemoryIndex:
    """All memories of one recording, by storage and by address. No two memories share a byte.

    The index keeps no data alive. It holds weak references, so a freed storage keeps its identity
    and no new storage can be mistaken for it.
    """

    def __init__(self) -> None:
        """Start without memories."""
        self._by_storage: dict[int, MemoryRecord] = {}
        # Address and number of each memory, sorted: the number breaks ties between a dead memory
        # and a new one at the same address, as records have no order.
        self._by_address: list[tuple[int, int]] = []
        self._by_number: dict[int, MemoryRecord] = {}
        self._next_number = 0

    def find(self, tensor: torch.Tensor) -> MemoryRecord | None:
        """Return the memory of a tensor, found by storage or else by address; None if unknown."""
        storage = tensor.untyped_storage()
        identity = storage._cdata  # noqa: SLF001 - there is no public name
        address, nbytes = storage_address(storage), storage.nbytes()
        known = self._by_storage.get(identity)
        if known is not None and known.covers(address, nbytes):
            return known
        if known is not None:  # the storage was resized or moved
            del self._by_storage[identity], known.storages[identity]
        shared = list(self._overlapping(address, nbytes))
        if not shared:
            return None
        memory = shared[0]
        if len(shared) > 1 or not memory.covers(address, nbytes):
            memory = self._merge(shared, address, nbytes)
        self._attach(memory, storage)
        return memory

    def add(self, tensor: torch.Tensor) -> MemoryRecord:
        """Return a new memory for a tensor that :meth:`find` does not know."""
        storage = tensor.untyped_storage()
        memory = MemoryRecord(storage_address(storage), storage.nbytes(), tensor.device.type)
        self._attach(memory, storage)
        self._register(memory)
        return memory

    def at(self, address: int, nbytes: int) -> MemoryRecord | None:
        """Return the living memory that covers a range of bytes; None if there is none."""
        memory = next(self._overlapping(address, nbytes), None)
        return memory if memory is not None and memory.covers(address, nbytes) else None

    def _attach(self, memory: MemoryRecord, storage: torch.UntypedStorage) -> None:
        identity = storage._cdata  # noqa: SLF001 - there is no public name
        memory.storages[identity] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._by_storage[identity] = memory

    def _register(self, memory: MemoryRecord) -> None:
        if memory.nbytes:
            self._by_number[self._next_number] = memory
            insort(self._by_address, (memory.address, self._next_number))
            self._next_number += 1

    def _overlapping(self, address: int, nbytes: int) -> Iterator[MemoryRecord]:
        """Yield living memories that share bytes with a range, by address; drop dead ones."""
        position = bisect_right(self._by_address, (address, self._next_number))
        while position and not self._by_number[self._by_address[position - 1][1]].is_alive:
            position -= 1
            self._drop(position)
        if position and nbytes:
            before = self._by_number[self._by_address[position - 1][1]]
            if address < before.address + before.nbytes:
                yield before
        while position < len(self._by_address) and self._by_address[position][0] < address + nbytes:
            memory = self._by_number[self._by_address[position][1]]
            if memory.is_alive:
                position += 1
                yield memory
            else:
                self._drop(position)

    def _drop(self, position: int) -> None:
        # Clearing the values frees the copies of literals among them.
        self._by_number.pop(self._by_address.pop(position)[1]).values.clear()

    def _merge(self, parts: Iterable[MemoryRecord], address: int, nbytes: int) -> MemoryRecord:
        """Return one memory in place of several that a storage spans."""
        parts = list(parts)
        start = min(address, *(part.address for part in parts))
        end = max(address + nbytes, *(part.address + part.nbytes for part in parts))
        whole = MemoryRecord(start, end - start, parts[0].device)
        for part in parts:
            shift = part.address - start
            whole.values |= {g._replace(start=g.start + shift): v for g, v in part.values.items()}
            whole.storages |= part.storages
            whole.leaves += part.leaves
            whole.numpy_writable |= part.numpy_writable
            whole.exports += part.exports
            self._by_storage |= dict.fromkeys(part.storages, whole)
        merged = {id(part) for part in parts}
        self._by_address = [
            one for one in self._by_address if id(self._by_number[one[1]]) not in merged
        ]
        self._by_number = {n: one for n, one in self._by_number.items() if id(one) not in merged}
        self._register(whole)
        return whole


# -- values in a memory -----------------------------------------------------------------------
#
# The values in one memory share bytes: views, parts and wholes of one another. After a write to a
# part, the enclosing value is another value. A read in a new geometry is a part of an enclosing
# value. Both are expressed by calls that the recorded program did not make. A lazy bit prevents
# this: as_strided of memory cannot conjugate or negate.

_UNSEEN = "it was created where refitkit records no ops"
_aten = torch.ops.aten


def origin_with_geometry(
    node: LeafOrigin | Literal | Unknown | Call, output: int, geometry: Geometry
) -> Origin:
    """Return the origin of a node's result that lies in memory as given.

    Args:
        node: Node that produced the result.
        output: Index of the result among the node's results.
        geometry: Geometry of the result.
    """
    return Origin(node, output, geometry.contiguous, geometry.dense_order)


def store_value(memory: MemoryRecord, geometry: Geometry, value: Origin) -> None:
    """Record a write of a value to a part of a memory.

    Drops all values that overlap the part. The largest enclosing value stays: it becomes a scatter
    of the written value into what it was before.
    """
    whole = (
        None if any(geometry.lazy) else max(_enclosing(memory, geometry), default=None, key=_size)
    )
    drop_values(memory, geometry)
    if whole is not None and whole[0].size > geometry.size:
        outer, base = whole
        offset = _element_offset(outer, geometry)
        arguments = (base, value, list(geometry.shape), list(geometry.stride), offset)
        op = _aten.as_strided_scatter.default
        memory.values[outer] = _derived(memory, op, arguments, (base, value), outer)
    memory.values[geometry] = value


def drop_values(memory: MemoryRecord, geometry: Geometry) -> None:
    """Record a write of an unknown value to a part of a memory."""
    memory.values = {at: value for at, value in memory.values.items() if not at.overlaps(geometry)}


def derive_value(memory: MemoryRecord, geometry: Geometry) -> Origin:
    """Return the origin of a value that was not seen in a geometry before.

    The value is a part of the smallest enclosing value, or unknown if there is none.
    """
    enclosing = (
        None if any(geometry.lazy) else min(_enclosing(memory, geometry), default=None, key=_size)
    )
    if enclosing is None:
        return origin_with_geometry(Unknown(_UNSEEN), 0, geometry)
    outer, base = enclosing
    # A read of all elements becomes a view and a permute, which the writer can simplify. Only a
    # read of a part needs as_strided.
    flat = geometry.permuted(geometry.order)
    if (outer.start, outer.size) != (geometry.start, geometry.size) or not flat.contiguous:
        where = list(geometry.shape), list(geometry.stride), _element_offset(outer, geometry)
        return _derived(memory, _aten.as_strided.default, (base, *where), (base,), geometry)
    if outer.shape != flat.shape:
        base = _derived(memory, _aten.view.default, (base, list(flat.shape)), (base,), flat)
    return _permuted(memory, base, flat, tuple(map(geometry.order.index, range(len(flat.shape)))))


def _enclosing(memory: MemoryRecord, wanted: Geometry) -> Iterator[tuple[Geometry, Origin]]:
    """Yield values without gaps that contain a geometry, permuted to their order in memory."""
    for geometry, value in memory.values.items():
        if geometry.contains(wanted) and not any(geometry.lazy) and geometry.size:
            order = geometry.order
            flat = geometry.permuted(order)
            if flat.contiguous:
                yield flat, _permuted(memory, value, geometry, order)


def _permuted(
    memory: MemoryRecord, value: Origin, geometry: Geometry, order: tuple[int, ...]
) -> Origin:
    if order == tuple(range(len(order))):
        return value
    permuted = geometry.permuted(order)
    return _derived(memory, _aten.permute.default, (value, list(order)), (value,), permuted)


def _derived(
    memory: MemoryRecord,
    op: Any,
    args: tuple[Any, ...],
    inputs: tuple[Origin, ...],
    geometry: Geometry,
) -> Origin:
    metadata = (Tensor(dtype=dtype_name(geometry.dtype), shape=geometry.shape),)
    return origin_with_geometry(Call(op, args, {}, metadata, memory.device, inputs), 0, geometry)


def _size(entry: tuple[Geometry, Origin]) -> int:
    return entry[0].size


def _element_offset(outer: Geometry, geometry: Geometry) -> int:
    return (geometry.start - outer.start) // geometry.dtype.itemsize


# -- NumPy arrays on the memory of tensors ----------------------------------------------------

_LARGEST = 1 << 20
"""Largest array, in bytes, whose content is remembered."""


class NumpyExports:
    """NumPy arrays on the memory of tensors that the code under one recording received.

    Code can read an array without a Python call on it: through the buffer protocol, in a C library,
    or by assigning it into another array. So an array counts as passed on only if it comes back, as
    a tensor or as the weight of a layer. An array that does not come back was read, and its value
    becomes a guard.

    All arrays count as read once another NumPy array becomes a tensor with a content that NumPy was
    not seen to create. That content may have been copied from any of them.
    """

    def __init__(self) -> None:
        """Start without arrays."""
        self._exports: list[ArrayExport] = []
        self._created: dict[int, tuple[weakref.ref[np.ndarray], bytes]] = {}
        self._doubtful: set[int] = set()

    def add(self, memory: MemoryRecord, read: HostRead, array: np.ndarray | None = None) -> None:
        """Record that code received an array on a memory.

        Args:
            memory: Memory that the array lies on.
            read: Value of the array, as the guard to write if the array was read.
            array: The array, if untrusted code received it. None if trusted code received it.
        """
        elements = frozenset[float]() if array is None else frozenset(_fractions(array))
        export = ArrayExport(read, elements=elements)
        self._exports.append(export)
        memory.exports.append(export)

    @staticmethod
    def mark_returned(memory: MemoryRecord) -> None:
        """Record that the arrays on a memory came back."""
        for export in memory.exports:
            export.returned = True

    def mark_possibly_read(self) -> None:
        """Record a value of unknown source: it may have been read from any exported array."""
        for export in self._exports:
            export.possibly_read = True

    def host_reads(self) -> Iterator[HostRead]:
        """Return the values of all arrays that were read or may have been read."""
        return (
            export.read for export in self._exports if export.possibly_read or not export.returned
        )

    def possible_sources(self, numbers: np.ndarray | complex) -> tuple[ArrayExport, ...]:
        """Return the exported arrays that contain all fractions among some numbers.

        Args:
            numbers: Numbers that third-party code used.
        """
        if not any(export.elements for export in self._exports):
            return ()
        fractions = set(_fractions(np.asarray(numbers)))
        return tuple(
            export for export in self._exports if fractions and fractions <= export.elements
        )

    # -- arrays that NumPy owns -------------------------------------------------------------

    def remember_created(self, array: np.ndarray, *, doubtful: bool = False) -> None:
        """Remember the content of an array that NumPy created from numbers.

        Args:
            array: Array that NumPy created.
            doubtful: Whether the numbers may be values of a weight.
        """
        if array.nbytes <= _LARGEST:
            address = array.ctypes.data
            self._created[address] = weakref.ref(array), array.tobytes()
            (self._doubtful.add if doubtful else self._doubtful.discard)(address)

    def check_array(self, array: np.ndarray) -> None:
        """Mark all exports as possibly read if an array's content is not as NumPy created it.

        Args:
            array: Array of NumPy's own that becomes a tensor.
        """
        if self._exports and not self._is_as_created(_base_of(array)):
            self.mark_possibly_read()

    def is_known(self, array: np.ndarray) -> bool:
        """Return whether an array's content is as NumPy created it and holds no weight."""
        base = _base_of(array)
        return self._is_as_created(base) and base.ctypes.data not in self._doubtful

    def _is_as_created(self, base: np.ndarray) -> bool:
        reference, content = self._created.get(base.ctypes.data, (None, b""))
        return reference is not None and reference() is base and base.tobytes() == content

    def check_memory(self, address: int, content: np.ndarray) -> bool:
        """Mark all exports as possibly read if memory is not as NumPy created it.

        Args:
            address: Address that code reads and that belongs to no tensor.
            content: Bytes at this address.

        Returns:
            Whether the content is as NumPy created it and holds no weight.
        """
        known = self._created.get(address, (None, b""))[1] == content.tobytes()
        if self._exports and not known:
            self.mark_possibly_read()
        return known and address not in self._doubtful


def _base_of(array: np.ndarray) -> np.ndarray:
    """Return the array that owns the memory."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _fractions(array: np.ndarray) -> Iterator[float]:
    """Yield the finite numbers in an array that are not integers; none if the array is large.

    Integers occur in too many arrays to identify one, and so does any number in a large array.
    """
    if array.nbytes <= _LARGEST and array.dtype.kind == "f":
        wide = array.astype(np.float64).reshape(-1)
        yield from wide[np.isfinite(wide) & (wide != np.round(wide))].tolist()
