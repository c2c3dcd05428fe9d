"""Which value a stretch of memory holds: what lets a recording know tensors again.

Tensors are known by their memory, not as Python objects: parameters are wrapped anew, views are
made, arrays of NumPy are turned into tensors and back. A memory is a storage, or several that have
bytes in common. It holds the values that were seen in it since they were last written to, by the
geometry in which they were seen.
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
from refitkit.recipe.origins import Call, Origin, Unknown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from refitkit.recipe.origins import Escape, LeafOrigin, Literal


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


# MERGED aliases: What a place in a memory holds, from what was seen in other places of it.
#
# Values are seen as tensors of many shapes that have bytes in common: views, parts, wholes. When
# one is written to, the whole around it is another value from then on; when one is read that was
# never seen as such, it is a part of a whole that was.

_SEPARATE = "it was made where no op is seen"
_aten = torch.ops.aten


def lying(node: LeafOrigin | Literal | Unknown | Call, output: int, geometry: Geometry) -> Origin:
    """Where a tensor comes from that lies in memory like this."""
    return Origin(node, output, geometry.contiguous, geometry.turned)


def write(memory: Memory, geometry: Geometry, value: Origin) -> None:
    """Note that a place was written to."""
    whole = None if any(geometry.lazy) else max(_around(memory, geometry), default=None, key=_size)
    forget(memory, geometry)
    if whole is not None and whole[0].size > geometry.size:
        outer, base = whole
        offset = _offset(outer, geometry)
        arguments = (base, value, list(geometry.shape), list(geometry.stride), offset)
        op = _aten.as_strided_scatter.default
        memory.values[outer] = _made(memory, op, arguments, (base, value), outer)
    memory.values[geometry] = value


def forget(memory: Memory, geometry: Geometry) -> None:
    """Note that a place holds another value, which nobody knows."""
    memory.values = {at: value for at, value in memory.values.items() if not at.meets(geometry)}


def seen_otherwise(memory: Memory, geometry: Geometry) -> Origin:
    """A value that was not seen in this geometry: a part of one that was, or unknown."""
    found = None if any(geometry.lazy) else min(_around(memory, geometry), default=None, key=_size)
    if found is None:
        return lying(Unknown(_SEPARATE), 0, geometry)
    outer, base = found
    flat = geometry.permuted(geometry.order)
    if (outer.start, outer.size) != (geometry.start, geometry.size) or not flat.contiguous:
        place = list(geometry.shape), list(geometry.stride), _offset(outer, geometry)
        return _made(memory, _aten.as_strided.default, (base, *place), (base,), geometry)
    if outer.shape != flat.shape:
        base = _made(memory, _aten.view.default, (base, list(flat.shape)), (base,), flat)
    return _permuted(memory, base, flat, tuple(map(geometry.order.index, range(len(flat.shape)))))


def _around(memory: Memory, wanted: Geometry) -> Iterator[tuple[Geometry, Origin]]:
    """Values without gaps that contain a place, in the order of memory."""
    for geometry, value in memory.values.items():
        if geometry.contains(wanted) and not any(geometry.lazy) and geometry.size:
            order = geometry.order
            flat = geometry.permuted(order)
            if flat.contiguous:
                yield flat, _permuted(memory, value, geometry, order)


def _permuted(memory: Memory, value: Origin, geometry: Geometry, order: tuple[int, ...]) -> Origin:
    if order == tuple(range(len(order))):
        return value
    found = geometry.permuted(order)
    return _made(memory, _aten.permute.default, (value, list(order)), (value,), found)


def _made(
    memory: Memory, op: Any, args: tuple[Any, ...], inputs: tuple[Origin, ...], found: Geometry
) -> Origin:
    facts = (Tensor(dtype=dtype_name(found.dtype), shape=found.shape),)
    return lying(Call(op, args, {}, facts, memory.device, inputs), 0, found)


def _size(found: tuple[Geometry, Origin]) -> int:
    return found[0].size


def _offset(outer: Geometry, geometry: Geometry) -> int:
    return (geometry.start - outer.start) // geometry.dtype.itemsize


# MERGED loans: Arrays of NumPy on the memory of tensors: whether all that became of them is
# known.
#
# Such an array can be read in ways that nobody sees: through the buffer protocol, by a library in
# C, by an assignment into an array of NumPy's own. So it was only passed on if it came back, as a
# tensor or as the weight of a layer. One that did not was read, and its value becomes a guard.
# The same is true of all of them once an array of NumPy's own becomes a tensor that does not hold
# what NumPy had made it of: it may hold their values.

_LARGEST = 1 << 20
"""Most bytes of an array of numbers that are remembered."""


@dataclass
class Loan:
    """An array on a tensor's memory that was given out.

    Attributes:
        escape: What it held, and where that came from.
        back: Whether it came back.
        read: Whether it may have been read before that.
        elements: The fractions in it, where somebody got it who may do more than pass it on.
    """

    escape: Escape
    back: bool = False
    read: bool = False
    elements: frozenset[float] = frozenset()

    @property
    def only_passed_on(self) -> bool:
        """Whether it counts as passed on and not as read: no guard is made of it."""
        return self.back and not self.read


class Loans:
    """All of one recording."""

    def __init__(self) -> None:
        """Start with none."""
        self._all: list[Loan] = []
        self._made: dict[int, tuple[weakref.ref[np.ndarray], bytes]] = {}
        self._doubtful: set[int] = set()

    def lend(self, memory: Memory, escape: Escape, array: np.ndarray | None = None) -> None:
        """Note that an array on a memory was given out.

        Args:
            memory: The memory.
            escape: What it holds.
            array: It, where somebody got it who may do more than pass it on.
        """
        elements = frozenset[float]() if array is None else frozenset(_fractions(array))
        loan = Loan(escape, elements=elements)
        self._all.append(loan)
        memory.loans.append(loan)

    @staticmethod
    def back(memory: Memory) -> None:
        """Note that arrays on a memory came back."""
        for loan in memory.loans:
            loan.back = True

    def escapes(self) -> Iterator[Escape]:
        """Values that were read, as far as anybody knows."""
        return (loan.escape for loan in self._all if loan.read or not loan.back)

    # -- arrays of NumPy's own --------------------------------------------------------------

    def made(self, array: np.ndarray, *, doubtful: bool = False) -> None:
        """Note that NumPy made an array of numbers.

        Args:
            array: It.
            doubtful: Whether those numbers may hold a weight.
        """
        if array.nbytes <= _LARGEST:
            address = array.ctypes.data
            self._made[address] = weakref.ref(array), array.tobytes()
            (self._doubtful.add if doubtful else self._doubtful.discard)(address)

    def own(self, array: np.ndarray) -> None:
        """Note that an array of NumPy's own becomes a tensor: it may hold what was lent."""
        if self._all and not self._is_as_made(_root(array)):
            self.found()

    def knows(self, array: np.ndarray) -> bool:
        """Whether an array holds what NumPy was seen to make it of, and nobody doubts that."""
        root = _root(array)
        return self._is_as_made(root) and root.ctypes.data not in self._doubtful

    def _is_as_made(self, root: np.ndarray) -> bool:
        reference, held = self._made.get(root.ctypes.data, (None, b""))
        return reference is not None and reference() is root and root.tobytes() == held

    def at(self, address: int, held: np.ndarray) -> bool:
        """Note that somebody reads memory that is no tensor's: it may hold what was lent.

        Args:
            address: Where it is.
            held: What it holds.

        Returns:
            Whether that is what NumPy was seen to make there, and nobody doubts that.
        """
        known = self._made.get(address, (None, b""))[1] == held.tobytes()
        if self._all and not known:
            self.found()
        return known and address not in self._doubtful

    def found(self) -> None:
        """Note that a value turned up of which nobody knows who wrote it."""
        for loan in self._all:
            loan.read = True

    def among(self, numbers: np.ndarray | complex) -> tuple[Loan, ...]:
        """The arrays that numbers may have been read from: all of their fractions are in one."""
        if not any(loan.elements for loan in self._all):
            return ()
        found = set(_fractions(np.asarray(numbers)))
        return tuple(loan for loan in self._all if found and found <= loan.elements)


def _root(array: np.ndarray) -> np.ndarray:
    """The array that has the memory."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _fractions(array: np.ndarray) -> Iterator[float]:
    """The numbers in an array that are not whole: others are in too many arrays to tell anything.

    Nothing of an array that is large: it has every number.
    """
    if array.nbytes <= _LARGEST and array.dtype.kind == "f":
        wide = array.astype(np.float64).reshape(-1)
        yield from wide[np.isfinite(wide) & (wide != np.round(wide))].tolist()
