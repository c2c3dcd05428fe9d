"""The origin of the present value of every tensor in a recording.

A tape reports what ops return and write (:mod:`refitkit.recipe.tape`). The patches of
:mod:`refitkit.recipe.host_reads` report what happens to NumPy arrays and storages. Tensors are
identified by their memory (:mod:`refitkit.recipe.memories`).

Read :class:`Provenance` first. :class:`RecordingScope` says when a recording is active.
:class:`ExposedMemory` remembers weights that code received in a form that no recording can track.
"""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import torch

from refitkit.program.bits import same_bits
from refitkit.recipe.memories import (
    Geometry,
    MemoryIndex,
    MemoryRecord,
    address_of,
    derive_value,
    drop_values,
    geometry_of,
    is_tracked,
    origin_with_geometry,
    storage_address,
    store_value,
)
from refitkit.recipe.origins import Call, LeafOrigin, Literal, Origin, Unknown, leaves_below

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from types import FrameType

    import numpy as np

    from refitkit.recipe.memories import NumpyExports
    from refitkit.recipe.origins import HostRead


Location: TypeAlias = tuple[MemoryRecord, Geometry]
"""The memory of a tensor and the tensor's geometry in it."""


class Provenance:
    """The origins of all tensors of one recording.

    Attributes:
        exposed: Weights that code received in a form that cannot be tracked.
        leaf_names: FQNs of all leaves.
        trusts_numbers: Whether numbers that appear now are no values of a weight.
    """

    def __init__(
        self, leaves: Mapping[str, torch.Tensor], scope: RecordingScope, exports: NumpyExports
    ) -> None:
        """Register the leaves.

        Args:
            leaves: All tensors that the program reads, by FQN.
            scope: Scope of the recording. It is paused while values are copied and compared.
            exports: NumPy arrays that the recorded code received.
        """
        self._memories = MemoryIndex()
        self._scope = scope
        self._exports = exports
        self._address_reads: dict[int, Origin] = {}
        self._declared: list[torch.Tensor] = []  # kept alive: their memory is their identity
        self.trusts_numbers = False
        self.leaf_names = frozenset(leaves)
        self.exposed = ExposedMemory()
        for fqn, tensor in leaves.items():
            if is_tracked(tensor):
                memory, geometry = self.location(tensor)
                memory.leaves.append(fqn)
                # Tied leaves have one geometry; the first name becomes the origin.
                memory.values.setdefault(
                    geometry, origin_with_geometry(LeafOrigin(fqn), 0, geometry)
                )

    # -- queries ----------------------------------------------------------------------------

    def origin_of(self, tensor: torch.Tensor) -> Origin:
        """Return the origin of the present value of a tensor."""
        memory, geometry = self.location(tensor)
        if memory.numpy_writable and self._changed_by_numpy(memory, tensor):
            # The new values may have been copied from any exported array.
            memory.values.clear()
            self._exports.mark_possibly_read()
            self.record_literal(tensor)
        origin: Origin | None = memory.values.get(geometry)
        if origin is None:
            origin = derive_value(memory, geometry)
            memory.values[geometry] = origin
        return origin

    def origin_at(self, flat: torch.Tensor) -> Origin:
        """Return the origin of the values in memory that code found by its address.

        Args:
            flat: Tensor on that memory, one-dimensional and contiguous.
        """
        address = address_of(flat)
        memory = self._memories.at(address, flat.nbytes)
        # A layer that reads a known memory was given a tensor or an exported array as its weight.
        if memory is not None:
            self._exports.mark_returned(memory)
            return self.origin_of(flat)
        if address in self._address_reads:
            reason = "its memory was freed before refitkit read it"
            return Origin(Unknown(reason), 0, contiguous=True)
        literal = self.snapshot(flat)
        with self._scope.pause():
            known = self._exports.check_memory(address, literal.view(torch.uint8).numpy())
        return Origin(self._node_of_numbers(literal, known=known), 0, contiguous=True)

    def location(self, tensor: torch.Tensor) -> Location:
        """Return the memory of a tensor and its geometry; register the memory if it is new."""
        memory = self._memories.find(tensor) or self._memories.add(tensor)
        return memory, geometry_of(tensor, memory)

    def offset(self, tensor: torch.Tensor) -> int:
        """Return the offset of a tensor in its leaf, or else in its memory, in bytes."""
        memory, geometry = self.location(tensor)
        starts = (
            at.start
            for at, value in memory.values.items()
            if isinstance(value.node, LeafOrigin) and at.start <= geometry.start
        )
        return geometry.start - max(starts, default=0)

    def knows_memory(self, tensor: torch.Tensor) -> bool:
        """Return whether the recording has seen the memory of a tensor."""
        return self._memories.find(tensor) is not None

    def knows(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor was seen in its geometry since the last write to its memory."""
        memory = self._memories.find(tensor)
        return memory is not None and geometry_of(tensor, memory) in memory.values

    def leaves_in(self, tensor: torch.Tensor) -> list[str]:
        """Return the FQNs of the leaves in the memory of a tensor."""
        memory = self._memories.find(tensor)
        return [] if memory is None else memory.leaves

    def snapshot(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of the present value of a tensor, without recording the copy."""
        with self._scope.pause():
            return tensor.detach().clone()

    # -- results of ops ---------------------------------------------------------------------

    def record_result(
        self, tensor: torch.Tensor, node: Call | Literal | Unknown, output: int
    ) -> None:
        """Record that a tensor is a result of a node.

        Args:
            tensor: Result.
            node: Node that produced it.
            output: Index of the tensor among the node's results.
        """
        memory, geometry = self.location(tensor)
        memory.values[geometry] = origin_with_geometry(node, output, geometry)

    def record_write(
        self, location: Location, node: LeafOrigin | Literal | Unknown | Call, output: int
    ) -> None:
        """Record that a node wrote to a location, which also changes the values around it."""
        memory, geometry = location
        store_value(memory, geometry, origin_with_geometry(node, output, geometry))

    def record_unknown_write(self, location: Location) -> None:
        """Record that an unknown value was written to a location."""
        drop_values(*location)

    # -- values from outside torch's ops ----------------------------------------------------

    def record_literal(
        self, tensor: torch.Tensor, *, numpy_writable: bool = False, known: bool = False
    ) -> None:
        """Record that a tensor was created from Python or NumPy numbers.

        Args:
            tensor: Tensor that was created.
            numpy_writable: Whether an array owns the memory, so that NumPy can write to it.
            known: Whether the recording saw which numbers the tensor was created from.
        """
        memory, geometry = self.location(tensor)
        node = self._node_of_numbers(self.snapshot(tensor), known=known)
        memory.values.setdefault(geometry, origin_with_geometry(node, 0, geometry))
        memory.numpy_writable |= numpy_writable

    def _node_of_numbers(self, value: torch.Tensor, *, known: bool) -> Literal | Unknown:
        """Return a node for a tensor of numbers; unknown if they may be values of a weight."""
        if known or self.trusts_numbers or not value.numel():
            return Literal(value, seen=self.trusts_numbers)
        if self.exposed.doubt:
            return Unknown(self.exposed.doubt)
        with self._scope.pause():
            # A one-byte float has so few values that a match with an array means nothing.
            floats = value.is_floating_point() and value.dtype.itemsize > 1
            numbers = value.double().cpu().numpy() if floats else None
        return Literal(value, () if numbers is None else self._exports.possible_sources(numbers))

    def declare(
        self, tensor: torch.Tensor, node: LeafOrigin | Literal | Unknown | Call, output: int
    ) -> None:
        """Record a declared origin of a tensor's value. The recording keeps the tensor.

        Args:
            tensor: Constant of a converter.
            node: Node that gives its value.
            output: Index of the value among the node's results.
        """
        self._declared.append(tensor)
        self.record_write(self.location(tensor), node, output)

    @contextmanager
    def trusting_numbers(self) -> Iterator[None]:
        """Treat numbers as literals until the end of the block: a declared formula has them."""
        before, self.trusts_numbers = self.trusts_numbers, True
        try:
            yield
        finally:
            self.trusts_numbers = before

    def _changed_by_numpy(self, memory: MemoryRecord, tensor: torch.Tensor) -> bool:
        """Return whether NumPy wrote to an array after a tensor was created from it."""
        storage = tensor.untyped_storage()
        shift = storage_address(storage) - memory.address
        with self._scope.pause():
            for geometry, origin in memory.values.items():
                first, rest = divmod(geometry.start - shift, geometry.dtype.itemsize)
                inside = first >= 0 and not rest and geometry.end - shift <= storage.nbytes()
                if isinstance(origin.node, Literal) and inside:
                    now = torch.empty(0, dtype=geometry.dtype)
                    now.set_(storage, first, geometry.shape, geometry.stride)
                    if not same_bits(now, origin.node.value):
                        return True
        return False

    # -- memory that the recorded code received ---------------------------------------------

    def expose_memory(self, tensor: torch.Tensor, form: str) -> None:
        """Record that untracked code may read a tensor.

        Args:
            tensor: Tensor whose memory was given away.
            form: What the code received, such as ``the address``.
        """
        if tensor.numel():
            self.exposed.add([self.origin_of(tensor)], form)

    def expose_storage(self, storage: torch.UntypedStorage, form: str) -> None:
        """Record that untracked code may read all known values in a storage.

        Args:
            storage: Storage that was given away.
            form: What the code received, such as ``the storage``.
        """
        with self._scope.pause():
            memory = self._memories.find(_bytes_of(storage)) if storage.nbytes() else None
        if memory is not None:
            self.exposed.add(memory.values.values(), form)

    def record_export(
        self, tensor: torch.Tensor, read: HostRead, array: np.ndarray | None = None
    ) -> None:
        """Record that code received a NumPy array on the memory of a tensor.

        Args:
            tensor: Tensor that the array lies on.
            read: Value of the array, as the guard to write if the array was read.
            array: The array, if untrusted code received it. None if trusted code received it.
        """
        self._exports.add(self.location(tensor)[0], read, array)

    def record_return(self, tensor: torch.Tensor) -> None:
        """Record that an exported array, or a view of one, became a tensor again."""
        self._exports.mark_returned(self.location(tensor)[0])

    def record_storage_copy(self, old: torch.UntypedStorage, new: torch.UntypedStorage) -> None:
        """Record that a storage was copied as a whole: the copy holds the same values."""
        with self._scope.pause():
            before, after = _bytes_of(old), _bytes_of(new)
        memory = self._memories.find(before)
        if memory is not None and self._memories.find(after) is None:
            shift = storage_address(old) - memory.address if old.nbytes() else 0
            self._memories.add(after).values = {
                geometry._replace(start=geometry.start - shift): value
                for geometry, value in memory.values.items()
                if geometry.start >= shift
            }

    def record_address(self, tensor: torch.Tensor, address: int) -> None:
        """Record that code read the address of a tensor."""
        if is_tracked(tensor) and tensor.numel():
            self._address_reads[address] = self.origin_of(tensor)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class RecordingScope:
    """When a recording is active: in its own thread, while it is not paused.

    Torch's dispatch modes belong to one thread, but the patches of
    :mod:`refitkit.recipe.host_reads` are seen by all threads of the process.

    Attributes:
        paused: Whether the recording ignores everything, in all threads.
    """

    def __init__(self) -> None:
        """Record in the current thread."""
        self.paused = False
        self._thread = threading.get_ident()

    def bind_to_thread(self) -> None:
        """Record in the current thread from now on."""
        self._thread = threading.get_ident()

    @property
    def is_active(self) -> bool:
        """Whether the recording records the current thread now."""
        return threading.get_ident() == self._thread and not self.paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Pause the recording until the end of the block."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


# -- memory that no recording can track -------------------------------------------------------

_TRUSTED = frozenset({"refitkit", "torch_tensorrt"})
"""Packages that read addresses and arrays only to pass them to TensorRT or to compare them."""
_COPY_MODULE = "copy"
"""Module that copies a tensor into another one, which the recording identifies by its memory."""
_TRANSPARENT = frozenset({"torch", *sys.stdlib_module_names})
"""Packages that act on behalf of their caller."""
_SHOWN = 3
"""Largest number of weights that a message names."""


def is_trusted_caller() -> bool:
    """Return whether torch, Torch-TensorRT or refitkit called the patched function.

    Looks at the first caller that is neither torch nor the standard library. Only a patch itself
    may call this function, because it starts at the caller of its caller.
    """
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 - inspect.stack reads source files
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        # `copy` also belongs to the standard library, so it is checked first.
        if package == _COPY_MODULE:
            return True
        if package not in _TRANSPARENT:
            return package in _TRUSTED
        frame = frame.f_back
    return True


class ExposedMemory:
    """Weights that third-party code received as an address, a storage, a pickle or a handle.

    A C library can read such memory without an op, and its numbers come back as literals of a
    converter. So a number that appears after the first exposure may be a value of a weight. The
    recording gives it an unknown origin instead of treating it as a literal of the graph.

    Attributes:
        doubt: Why a number that appears now may be a value of a weight. Empty if it cannot be one.
    """

    def __init__(self) -> None:
        """Start without exposed memory."""
        self.doubt = ""

    def add(self, origins: Iterable[Origin], form: str) -> None:
        """Record that code can read values without the recording noticing.

        Args:
            origins: Origins of the values.
            form: What the code received, such as ``the address`` or ``a pickle``.
        """
        # The first exposure is enough to distrust all later numbers.
        self.doubt = self.doubt or _doubt(origins, form)


def _doubt(origins: Iterable[Origin], form: str) -> str:
    """Return the reason for doubt; empty if no value depends on a leaf, as a refit changes none."""
    names = sorted({name for origin in origins for name in leaves_below(origin) if name})
    if not names:
        return ""
    shown = ", ".join(map(repr, names[:_SHOWN]))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"it contains numbers that appeared after {form} of {shown}{more} was given to code that "
        "refitkit cannot track, so they may be values of those weights"
    )
