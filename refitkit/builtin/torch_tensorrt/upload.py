"""Copying a caller's tensors into room of our own, in few launches however many tensors there are.

A launch takes the CPU some microseconds, and an engine has hundreds of weights of a few bytes: of
such an engine most of a refit's time was launches.
"""

from __future__ import annotations

from collections import defaultdict

import torch

_CHUNK = 32 << 20  # bytes; PCIe is at full speed from about 8 MiB
_SMALL = 1 << 16  # bytes; values of the host up to this size are sent together
_TOGETHER = 1 << 20  # bytes of such values that are sent at once
_WAITING = 64 << 20  # bytes of values that are held until they are copied
_AS_ONE = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32}
)
"""Types that one call copies for many tensors."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their size: whatever a value is, its bits are copied."""


class Uploader:
    """Copies values to one device: on the device directly, from the host through pinned memory.

    A copy from pageable memory takes several times as long as one from pinned memory, and pinning
    the whole model would take as much memory again. So there are two pinned chunks: while the
    device reads one of them, the other is filled. Small values are laid end to end and sent as one.
    """

    def __init__(self, device: torch.device, chunk: int = _CHUNK) -> None:
        """Allocate nothing yet."""
        self._device = device
        self._size = chunk
        self._chunks: list[torch.Tensor] = []
        self._read: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._held = 0  # bytes of what is waiting
        self._packed: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._used = 0  # bytes of what is in there

    def copy(self, room: torch.Tensor, value: torch.Tensor) -> None:
        """Copy all elements in logical order, at the latest in ``finish``.

        Args:
            room: Contiguous, flat or of the value's shape, of its dtype and count, on the device.
            value: Any layout, any device, without gradients. Free only after ``finish``.
        """
        if value.is_conj() or value.is_neg():
            value = value.resolve_conj().resolve_neg()
        if value.device == room.device:
            self._later(room, value)
        elif value.is_cpu and value.nbytes <= _SMALL:
            self.copy_with_others(room, value)
        elif value.is_cpu and not value.is_pinned():
            self.copy_in_chunks(room, value)
        else:
            room.view(value.shape).copy_(value, non_blocking=True)

    def _later(self, room: torch.Tensor, value: torch.Tensor) -> None:
        """Have a value of the device copied with others."""
        if value.dtype not in _AS_ONE or not value.is_contiguous():
            room.view(value.shape).copy_(value, non_blocking=True)
            return
        alike = value.dim() == room.dim()
        self._waiting.append((room, value if alike else value.view(room.shape)))
        self._held += value.nbytes
        if self._held > _WAITING:
            self._copy_waiting()

    def _copy_waiting(self) -> None:
        rooms: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
        values: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
        for room, value in self._waiting:
            rooms[room.dtype].append(room)
            values[room.dtype].append(value)
        for dtype, some in rooms.items():
            torch._foreach_copy_(some, values[dtype], non_blocking=True)
        self._waiting, self._held = [], 0

    def copy_with_others(self, room: torch.Tensor, value: torch.Tensor) -> None:
        """Copy a small value of the host, in one piece with those that come before and after."""
        if self._used + value.nbytes > _TOGETHER:
            self._send_pack()
        self._used += value.nbytes
        self._packed.setdefault(value.dtype, []).append((room, value.reshape(-1)))

    def _send_pack(self) -> None:
        """Lay small values end to end, send them, and have them copied to where they belong."""
        packed, self._packed, self._used = self._packed, {}, 0
        for some in packed.values():
            values = [value for _, value in some]
            pack = _end_to_end(values, pinned=self._device.type == "cuda")
            there = pack.to(self._device, non_blocking=True, copy=True)
            pieces = there.split_with_sizes([value.numel() for value in values])
            for (room, _), piece in zip(some, pieces, strict=True):
                self._later(room, piece)

    def copy_in_chunks(self, room: torch.Tensor, value: torch.Tensor) -> None:
        """Copy a value of the host through the pinned chunks."""
        source = value.contiguous().reshape(-1).view(torch.uint8)
        target = room.view(-1).view(torch.uint8)
        for first in range(0, source.numel(), self._size):
            part = source[first : first + self._size]
            chunk = self._next()[: part.numel()]
            chunk.copy_(part)
            target[first : first + self._size].copy_(chunk, non_blocking=True)
            self._mark()

    def _next(self) -> torch.Tensor:
        """The chunk whose turn it is, once the device has read it."""
        if not self._chunks:
            pinned = self._device.type == "cuda"
            self._chunks = [
                torch.empty(self._size, dtype=torch.uint8, pin_memory=pinned) for _ in self._read
            ]
        read = self._read[self._turn]
        if read is not None:
            read.synchronize()
        return self._chunks[self._turn]

    def _mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's
            event.record(torch.cuda.current_stream(self._device))
            self._read[self._turn] = event
        self._turn = 1 - self._turn

    def finish(self) -> None:
        """Make and await all copies, and free the chunks: the caller's tensors are free now."""
        try:
            self._send_pack()
            self._copy_waiting()
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        finally:
            self._chunks, self._read = [], [None, None]
            self._waiting, self._held = [], 0


def _end_to_end(values: list[torch.Tensor], *, pinned: bool) -> torch.Tensor:
    """Flat values of one dtype, one after another in memory of our own."""
    kind = values[0].dtype
    whole = torch.empty(sum(v.numel() for v in values), dtype=kind, pin_memory=pinned)
    bits = _BITS.get(kind.itemsize, kind)
    torch.cat([value.view(bits) for value in values], out=whole.view(bits))
    return whole
