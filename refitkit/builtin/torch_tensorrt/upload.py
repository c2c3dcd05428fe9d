"""Copying a caller's tensors into room of our own."""

from __future__ import annotations

import torch

_CHUNK = 32 << 20  # bytes; PCIe is at full speed from about 8 MiB


class Uploader:
    """Copies values to one device: on the device directly, from the host through pinned memory.

    A copy from pageable memory takes several times as long as one from pinned memory, and pinning
    the whole model would take as much memory again. So there are two pinned chunks: while the
    device reads one of them, the other is filled.
    """

    def __init__(self, device: torch.device, chunk: int = _CHUNK) -> None:
        """Allocate nothing yet."""
        self._device = device
        self._size = chunk
        self._chunks: list[torch.Tensor] = []
        self._read: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def copy(self, room: torch.Tensor, value: torch.Tensor) -> None:
        """Copy all elements in logical order.

        Args:
            room: Flat, of the value's dtype and count, on the device.
            value: Any layout, any device. Free only after ``finish``.
        """
        value = value.detach().resolve_conj().resolve_neg()
        if value.device.type == "cpu" and room.device.type != "cpu" and not value.is_pinned():
            self.copy_in_chunks(room, value)
        else:
            room.view(value.shape).copy_(value, non_blocking=True)

    def copy_in_chunks(self, room: torch.Tensor, value: torch.Tensor) -> None:
        """Copy a value of the host through the pinned chunks."""
        source = value.contiguous().reshape(-1).view(torch.uint8)
        target = room.view(torch.uint8)
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
        """Wait for all copies, and free the chunks: the caller's tensors are free now."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._chunks, self._read = [], [None, None]
