"""The weight buffers of one TensorRT engine: staging, snapshot, layout and upload.

TensorRT cannot return the weights that an engine holds, so this module keeps a copy of them:

- The *staging* arena holds the values that the next refit reads. After a refit it holds the live
  values.
- The *snapshot* arena is the rollback copy. Before the next refit overwrites staging, the live
  values are copied to it. Or the two arenas change their roles, if no refitter knows the addresses.

Reading order: ``WeightBuffers`` decides which arena holds the live values. ``Layout`` and ``Arena``
place all weights of an engine in one allocation; ``direct.arena`` has the other kind, in which
weights lie as in the engine. ``Uploader`` copies values into it with few kernel launches; what it
copies is decided in ``filling``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from refitkit.program.bits import INTEGERS, all_finite, finite, same_memory
from refitkit.program.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from refitkit.builtin.torch_tensorrt.refitter import WeightSpec


class ValueArena(Protocol):
    """Memory for one value of each weight.

    Attributes:
        constants: Constant that a weight was last copied from, by name of the weight.
        nbytes: Size in bytes.
    """

    constants: dict[str, Constant]
    nbytes: int

    def value(self, name: str) -> torch.Tensor:
        """Return a weight in its shape if that is known, else flat: an alias if it can be one."""

    def begin(self, uploader: Uploader) -> None:
        """Drop copies that an interrupt has left pending."""

    def copy(self, name: str, value: torch.Tensor, uploader: Uploader) -> None:
        """Copy a value that fits, now or in ``finish``."""

    def copy_alike(
        self,
        names: tuple[str, ...],
        values: Sequence[torch.Tensor],
        uploader: Uploader,
        live: ValueArena | None,
    ) -> None:
        """Copy values that fit, after all others.

        Args:
            names: Names of the weights. The same object again: headers of values are as before.
            values: Their values.
            uploader: Makes the copies.
            live: Arena that holds the live values, if one does: ``same`` will be asked of it.
        """

    def finish(self, uploader: Uploader) -> None:
        """Make all pending copies, and wait for them; see ``Uploader.finish``."""

    def copy_from(self, other: Any) -> None:
        """Copy all values of another arena of the same kind, without synchronizing."""

    def same(self, other: Any) -> bool:
        """Return whether another arena of the same kind holds the same bits."""

    def is_finite(self) -> bool:
        """Return whether all values are surely finite. False: some may not be."""


class WeightBuffers:
    """The staging arena, the snapshot arena, and a record of which one holds the live values.

    Attributes:
        staging: Arena that the next refit reads.
    """

    def __init__(self, new: Callable[[], ValueArena], *, swaps: bool = False) -> None:
        """Allocate the staging arena. The snapshot is allocated on first use.

        Args:
            new: Allocates an arena.
            swaps: Whether the arenas may change their roles: no refitter knows their addresses.
        """
        self._new, self._swaps = new, swaps
        self.staging = new()
        self._live: Literal["staging", "snapshot"] | None = None
        self._snapshot: ValueArena | None = None
        self._has_previous = False  # the snapshot holds the values from before the last commit

    @classmethod
    def moved(
        cls,
        old: WeightBuffers,
        new: Callable[[], ValueArena],
        names: Collection[str],
    ) -> WeightBuffers:
        """Return buffers whose arenas change their roles, and that hold what some buffers hold.

        Args:
            old: The buffers.
            new: Allocates an arena of the other kind.
            names: Names of all weights.
        """
        found = cls(new, swaps=True)
        copy_values(old.staging, found.staging, names)
        if old._snapshot is not None:
            copy_values(old._snapshot, found._allocated_snapshot(), names)
        found._live, found._has_previous = old._live, old._has_previous
        return found

    # -- which arena is live ----------------------------------------------------------------

    @property
    def live(self) -> Literal["staging", "snapshot"] | None:
        """Which arena holds the live values; None if the live values are unknown."""
        return self._live

    @live.setter
    def live(self, which: Literal["staging", "snapshot"] | None) -> None:
        # only `mark_committed` knows that the snapshot holds previous values
        self._live, self._has_previous = which, False

    @property
    def known(self) -> bool:
        """Whether the live values are known."""
        return self.live is not None

    def begin_staging(self, *, partial: bool) -> None:
        """Leave the live values in the snapshot, so that the staging arena may be overwritten.

        Args:
            partial: Whether the staging arena must also hold the live values: a partial refit
                overwrites only some of them.
        """
        self._has_previous = False
        if self.live == "staging":
            snapshot = self._allocated_snapshot()
            if self._swaps:
                # plain attributes, so that no interrupt can come in between
                self.staging, self._snapshot, self._live = snapshot, self.staging, "snapshot"
            else:
                snapshot.copy_from(self.staging)
                self.live = "snapshot"
                return
        if self.live == "snapshot" and partial:
            # staging holds values of before, or those of a refit that was never committed
            self.restore()

    def mark_committed(self) -> None:
        """Record that the staged values are live and the snapshot holds the previous ones."""
        previous = self._live == "snapshot"  # read first: setting `live` resets the flag
        self.live, self._has_previous = "staging", previous

    def restore(self) -> None:
        """Copy the snapshot back into the staging arena. The caller updates ``live``."""
        self.staging.copy_from(self._allocated_snapshot())

    # -- reading ----------------------------------------------------------------------------

    def live_value(self, name: str) -> torch.Tensor | None:
        """The live value of a weight, as ``ValueArena.value``; None if it is unknown."""
        if self._live is None:
            return None
        arena = self.staging if self._live == "staging" else self._allocated_snapshot()
        return arena.value(name)

    @property
    def before(self) -> ValueArena | None:
        """The arena with the live values while others are staged; None if they are unknown."""
        return self._snapshot if self._live == "snapshot" else None

    @property
    def has_previous(self) -> bool:
        """Whether the values from before the last commit are there."""
        return self._has_previous

    def previous(self, name: str) -> torch.Tensor:
        """A weight from before the last commit, as ``ValueArena.value``."""
        return self._allocated_snapshot().value(name)

    def changed(self) -> bool | None:
        """Whether any staged bit differs from the live ones; None unless the snapshot has those."""
        if self.live != "snapshot":
            return None
        return not self.staging.same(self._allocated_snapshot())

    def newly_non_finite(self, names: Iterable[str]) -> Iterator[tuple[str, int]]:
        """Find staged weights with non-finite elements at positions where the live ones are finite.

        Args:
            names: Names of all weights.

        Yields:
            Name of the weight and number of these elements. Nothing if the live values are unknown.
        """
        # one kernel clears all weights of a dtype
        if self.live != "snapshot" or self.staging.is_finite():
            return
        snapshot = self._allocated_snapshot()
        for name in names:
            new = self.staging.value(name)
            if not all_finite(new):
                count = int((~finite(new) & finite(snapshot.value(name))).sum())
                if count:
                    yield name, count

    # -- memory -----------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Size of one arena in bytes."""
        return self.staging.nbytes

    @property
    def snapshot_nbytes(self) -> int:
        """Size of the snapshot in bytes; 0 while it is not allocated."""
        return self.nbytes if self._snapshot is not None else 0

    def free_snapshot(self) -> int:
        """Free the snapshot and return its size in bytes. Live values move back to staging."""
        if self.live == "snapshot":
            # a refit was staged and not committed: the live values replace its values
            self.restore()
            self.live = "staging"
        freed, self._snapshot, self._has_previous = self.snapshot_nbytes, None, False
        return freed

    @property
    def arenas(self) -> list[ValueArena]:
        """All arenas that are allocated."""
        return [one for one in (self.staging, self._snapshot) if one is not None]

    def _allocated_snapshot(self) -> ValueArena:
        if self._snapshot is None:
            self._snapshot = self._new()
        return self._snapshot


def copy_values(source: ValueArena, target: ValueArena, names: Iterable[str]) -> None:
    """Copy values of weights from one arena to another, of any kind, and wait for that."""
    found = [(name, source.value(name)) for name in names]
    uploader = Uploader(found[0][1].device)
    target.begin(uploader)
    try:
        for name, value in found:
            target.copy(name, value, uploader)
    finally:
        target.finish(uploader)


class LazyCopies(Mapping[str, torch.Tensor]):
    """A mapping that copies a tensor each time the tensor is looked up."""

    def __init__(self, names: Iterable[str], copy: Callable[[str], torch.Tensor]) -> None:
        """Copy nothing yet.

        Args:
            names: Keys of the mapping.
            copy: Returns a copy of the tensor of a name.
        """
        self._names, self._copy = dict.fromkeys(names), copy

    def __getitem__(self, name: str) -> torch.Tensor:
        self._names[name]
        return self._copy(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping.__contains__ would copy the tensor


# -- layout of an arena -------------------------------------------------------------------------

_ALIGNMENT = 256  # bytes; what CUDA's own allocator gives


@dataclass(frozen=True)
class Layout:
    """Where each weight lies in an arena.

    Weights of one dtype are adjacent, so that one kernel can read all of them.

    Attributes:
        specs: All weights by name, in the order in which they lie.
        offsets: First byte of each weight, by name.
        nbytes: Size of the arena in bytes.
        runs: First byte and end of all weights of a dtype, by name of the dtype.
    """

    specs: Mapping[str, WeightSpec]
    offsets: Mapping[str, int]
    nbytes: int
    runs: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, specs: Iterable[WeightSpec]) -> Layout:
        """Lay out weights by dtype and name, each at a multiple of 256 bytes."""
        ordered = sorted(specs, key=lambda spec: (spec.dtype, spec.name))
        offsets: dict[str, int] = {}
        runs: dict[str, tuple[int, int]] = {}
        end = 0
        for spec in ordered:
            offsets[spec.name] = end
            size = spec.count * dtype_of(spec.dtype).itemsize
            first, _ = runs.get(spec.dtype, (end, end))
            end += -(-size // _ALIGNMENT) * _ALIGNMENT  # rounded up
            runs[spec.dtype] = (first, end)
        return cls({spec.name: spec for spec in ordered}, offsets, end, runs)


class Arena:
    """All weights of an engine in one allocation, each contiguous; see ``ValueArena``.

    Attributes:
        memory: The whole arena as ``uint8``. Gaps between weights are zero and stay zero, so that
            two arenas can be compared as a whole.
        views: Each weight, flat, by name.
        tensors: Each weight by name, in its shape if the shape is known, flat otherwise.
        runs: All weights of a dtype with the gaps between them, flat, by name of the dtype.
        constants: See ``ValueArena``.
        nbytes: See ``ValueArena``.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        """Allocate an arena of zeros.

        Args:
            layout: Where each weight lies.
            device: Device of the memory.
        """
        self.nbytes = layout.nbytes
        self.memory = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
        self.views = {
            name: self._view(layout.offsets[name], spec.count, spec.dtype)
            for name, spec in layout.specs.items()
        }
        self.tensors = {
            name: view if (shape := layout.specs[name].shape) is None else view.view(shape)
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

    def value(self, name: str) -> torch.Tensor:
        """Return a weight: an alias; see ``ValueArena``."""
        return self.tensors[name]

    def begin(self, uploader: Uploader) -> None:
        """Drop pending copies; see ``ValueArena``."""
        uploader.forget()

    def copy(self, name: str, value: torch.Tensor, uploader: Uploader) -> None:
        """Copy a value; see ``ValueArena``."""
        uploader.copy(self.tensors[name], value)

    def copy_alike(
        self,
        names: tuple[str, ...],
        values: Sequence[torch.Tensor],
        uploader: Uploader,
        live: ValueArena | None,  # noqa: ARG002 - compared later
    ) -> None:
        """Copy values; see ``ValueArena``."""
        for name, value in zip(names, values, strict=True):
            uploader.copy(self.tensors[name], value)

    def finish(self, uploader: Uploader) -> None:
        """Make all pending copies; see ``ValueArena``."""
        uploader.finish()

    def copy_from(self, other: Arena) -> None:
        """Copy all values of another arena with the same layout, without synchronizing."""
        self.constants.clear()
        self.memory.copy_(other.memory, non_blocking=True)

    def same(self, other: Arena) -> bool:
        """Return whether an arena with the same layout holds the same bits."""
        return same_memory(self.memory, other.memory)

    def is_finite(self) -> bool:
        """Return whether all values are finite."""
        return all(map(all_finite, self.runs.values()))


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that a plan keeps, and its version when it was copied.

    Attributes:
        tensor: The tensor or a view of it. The reference keeps its memory allocated, so that no
            other tensor can get its address.
        version: torch's count of in-place changes of the memory.
    """

    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Constant | None:
        """Record a tensor; None if torch does not count its changes or has an operation pending.

        torch counts no changes of inference tensors, and negates and conjugates lazily.
        """
        uncertain = tensor.is_inference() or tensor.is_neg() or tensor.is_conj()
        return None if uncertain else cls(tensor, tensor._version)  # noqa: SLF001

    def still_is(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is this constant, unchanged."""
        if self.tensor is tensor:  # the usual case
            return self.version == tensor._version  # noqa: SLF001
        return self.is_same_as(Constant.of(tensor))

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


def stored(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose stored bits are its value: torch negates and conjugates lazily."""
    lazy = value.is_conj() or value.is_neg()
    return value.resolve_conj().resolve_neg() if lazy else value


# -- upload -------------------------------------------------------------------------------------

_CHUNK_BYTES = 32 << 20  # PCIe is at full speed from about 8 MiB
_SMALL_BYTES = 1 << 16  # values of the host up to this size are packed
_PACK_BYTES = 1 << 20  # largest pack of small values
_QUEUE_BYTES = 64 << 20  # values that are queued before they are copied
_FOREACH_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32}
)
"""Dtypes for which ``torch._foreach_copy_`` copies many tensors in one launch."""


class Uploader:
    """Copies values to one device in few kernel launches.

    A launch costs the CPU some microseconds, and an engine can have hundreds of weights of a few
    bytes. For these engines, launches took most of the time of a refit.

    - Values on the device are queued and copied by one ``torch._foreach_copy_`` per dtype.
    - Small values on the host are concatenated, sent as one pack, and then queued.
    - Large values on the host go through two pinned chunks: the CPU fills one while the device
      reads the other. A copy from pageable memory takes several times as long, and pinning the
      whole model would double its memory.
    """

    def __init__(self, device: torch.device, chunk: int = _CHUNK_BYTES) -> None:
        """Allocate nothing yet.

        Args:
            device: Device of all targets.
            chunk: Size of each of the two pinned chunks in bytes.
        """
        self._device = device
        self._chunk_bytes = chunk
        self._chunks: list[torch.Tensor] = []
        self._chunk_read: list[torch.cuda.Event | None] = [None, None]
        self._next_chunk = 0
        self._queue: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._queue_bytes = 0
        self._pack: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._pack_bytes = 0

    def copy(self, target: torch.Tensor, value: torch.Tensor) -> None:
        """Copy all elements in logical order, now or in ``finish``.

        Args:
            target: Contiguous tensor on the device, with the dtype and the number of elements of
                ``value``. Its shape is flat or that of ``value``.
            value: Tensor of any layout on any device, without gradients. The caller must not change
                it before ``finish``.
        """
        value = stored(value)
        if value.device == target.device:
            self._enqueue(target, value)
        elif value.is_cpu and value.nbytes <= _SMALL_BYTES:
            self.copy_packed(target, value)
        elif value.is_cpu and not value.is_pinned():
            self.copy_in_chunks(target, value)
        else:
            target.view(value.shape).copy_(value, non_blocking=True)

    def _enqueue(self, target: torch.Tensor, value: torch.Tensor) -> None:
        """Queue a value that is on the device."""
        if value.dtype not in _FOREACH_DTYPES or not value.is_contiguous():
            target.view(value.shape).copy_(value, non_blocking=True)
            return
        alike = value.dim() == target.dim()  # _foreach_copy_ needs equal shapes
        self._queue.append((target, value if alike else value.view(target.shape)))
        self._queue_bytes += value.nbytes
        if self._queue_bytes > _QUEUE_BYTES:
            self._copy_queue()

    def _copy_queue(self) -> None:
        targets: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
        values: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
        for target, value in self._queue:
            targets[target.dtype].append(target)
            values[target.dtype].append(value)
        for dtype, some in targets.items():
            torch._foreach_copy_(some, values[dtype], non_blocking=True)
        self._queue, self._queue_bytes = [], 0

    def copy_packed(self, target: torch.Tensor, value: torch.Tensor) -> None:
        """Add a small value on the host to the pack."""
        if self._pack_bytes + value.nbytes > _PACK_BYTES:
            self._send_pack()
        self._pack_bytes += value.nbytes
        self._pack.setdefault(value.dtype, []).append((target, value.reshape(-1)))

    def _send_pack(self) -> None:
        """Send the pack to the device, one tensor per dtype, and queue its values there."""
        pack, self._pack, self._pack_bytes = self._pack, {}, 0
        for some in pack.values():
            values = [value for _, value in some]
            packed = _concatenated(values, pinned=self._device.type == "cuda")
            on_device = packed.to(self._device, non_blocking=True, copy=True)
            pieces = on_device.split_with_sizes([value.numel() for value in values])
            for (target, _), piece in zip(some, pieces, strict=True):
                self._enqueue(target, piece)

    def copy_in_chunks(self, target: torch.Tensor, value: torch.Tensor) -> None:
        """Copy a value on the host through the pinned chunks."""
        source = value.contiguous().reshape(-1).view(torch.uint8)
        destination = target.view(-1).view(torch.uint8)
        size = self._chunk_bytes
        for first in range(0, source.numel(), size):
            part = source[first : first + size]
            chunk = self._free_chunk()[: part.numel()]
            chunk.copy_(part)
            destination[first : first + size].copy_(chunk, non_blocking=True)
            self._record_read()

    def _free_chunk(self) -> torch.Tensor:
        """The next chunk, once the device has read its last content."""
        if not self._chunks:
            pinned = self._device.type == "cuda"
            self._chunks = [
                torch.empty(self._chunk_bytes, dtype=torch.uint8, pin_memory=pinned)
                for _ in self._chunk_read
            ]
        read = self._chunk_read[self._next_chunk]
        if read is not None:
            read.synchronize()
        return self._chunks[self._next_chunk]

    def _record_read(self) -> None:
        """Record when the device will have read the present chunk, and go to the other chunk."""
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's
            event.record(torch.cuda.current_stream(self._device))
            self._chunk_read[self._next_chunk] = event
        self._next_chunk = 1 - self._next_chunk

    def flush(self) -> None:
        """Launch all pending copies on the current stream."""
        self._send_pack()
        self._copy_queue()

    def finish(self) -> None:
        """Make all pending copies, wait for them, and free the chunks.

        The caller may change its tensors afterwards. If a copy fails, the queue is emptied: the
        next refit must not write values of this one.
        """
        try:
            self.flush()
            self.wait()
        finally:
            self.forget()

    def wait(self) -> None:
        """Wait for all copies that were launched."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def forget(self) -> None:
        """Drop all pending copies, and free the chunks."""
        self._chunks, self._chunk_read = [], [None, None]
        self._queue, self._queue_bytes = [], 0
        self._pack, self._pack_bytes = {}, 0


def _concatenated(values: list[torch.Tensor], *, pinned: bool) -> torch.Tensor:
    """Flat values of one dtype, one after another in new memory of the host."""
    kind = values[0].dtype
    whole = torch.empty(sum(v.numel() for v in values), dtype=kind, pin_memory=pinned)
    bits = INTEGERS.get(kind.itemsize, kind)
    torch.cat([value.view(bits) for value in values], out=whole.view(bits))
    return whole
