"""How the memory of an engine is known: TensorRT asks an allocator of ours for it."""

from __future__ import annotations

import contextlib
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch

from refitkit.processes import ForkedLock

if TYPE_CHECKING:
    from collections.abc import Iterator


class Pieces:
    """All memory that TensorRT has asked for on behalf of one engine, in that order."""

    def __init__(self, device: torch.device) -> None:
        """Start with none.

        Args:
            device: Device of the memory.
        """
        self._device = device
        self._by_address: dict[int, torch.Tensor] = {}

    def all(self) -> list[torch.Tensor]:
        """Return the pieces as ``uint8``: aliases, each as large as was asked for."""
        return list(self._by_address.values())

    def take(self, size: int) -> int | None:
        """Return the address of new memory; None if there is none.

        Args:
            size: In bytes.
        """
        if size <= 0:
            return None
        try:
            piece = torch.empty(size, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            return None  # TensorRT reports it
        address = piece.data_ptr()
        self._by_address[address] = piece
        _in_use.add(self)
        return address

    def give_back(self, address: int) -> bool:
        """Free memory; return whether it was taken here."""
        if self._device.type == "cuda":
            # as cudaFree does: torch may give the memory to work on another stream at once
            torch.cuda.synchronize(self._device)
        found = self._by_address.pop(address, None) is not None
        if not self._by_address:
            _in_use.discard(self)
        return found


_in_use: set[Pieces] = set()
"""An engine may outlive everything else that refers to its memory."""


def allocator(trt: Any, pieces: Pieces) -> Any:
    """Return an ``IGpuAllocator`` that takes memory from some pieces.

    Args:
        trt: The package ``tensorrt``.
        pieces: Where it is noted.
    """

    class Allocator(trt.IGpuAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IGpuAllocator.__init__(self)

        def allocate(self, size: int, _alignment: int, _flags: int) -> int | None:
            return pieces.take(size)

        def deallocate(self, address: int) -> bool:
            return pieces.give_back(address)

        def reallocate(self, _address: int, _alignment: int, _size: int) -> None:
            return None

        def allocate_async(self, size: int, _alignment: int, _flags: int, _: int) -> int | None:
            return pieces.take(size)

        def deallocate_async(self, address: int, _stream: int) -> bool:
            return pieces.give_back(address)

    return Allocator()


@contextlib.contextmanager
def allocating(trt: Any, pieces: Pieces) -> Iterator[None]:
    """Have runtimes that this thread makes meanwhile take memory from some pieces.

    Torch-TensorRT makes a ``tensorrt.Runtime`` wherever it opens an engine, and does not let one
    in from outside.

    Args:
        trt: The package ``tensorrt``.
        pieces: Where the memory is noted.
    """
    given, thread = allocator(trt, pieces), get_ident()
    with _patching.held:
        original = trt.Runtime

        def runtime(logger: Any) -> Any:
            made = original(logger)
            if get_ident() == thread:
                made.gpu_allocator = given
                _allocators.append(given)
            return made

        trt.Runtime = runtime
        try:
            yield
        finally:
            trt.Runtime = original


_patching = ForkedLock()
_allocators: list[Any] = []
"""They are tiny, and a runtime that somebody keeps may use its allocator at any time."""
