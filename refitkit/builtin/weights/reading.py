"""Read files that another process may truncate, overwrite or replace meanwhile.

The module hides how a reader makes sure that all bytes are of one version of a file.

Nothing is mapped. If a page of a mapped file has been truncated, access to it ends the process with
SIGBUS (``mmap(2)``), and no check can come before each access. So bytes are copied to memory of
this process. A file that ends too early then raises an error like any other.

All bytes of a file that a refit reads are of one version, because:

- After each read, the state of the file is compared with that at opening: size, modification time,
  change time, inode. ``cp -p`` and ``rsync -t`` set the modification time back, but no program
  can set the change time.
- A digest of each range is kept. A second read of a range, for another check or for the engine,
  returns the same bytes or raises.
- The state does not show a write through a descriptor or mapping that was open before. It is
  ambiguous if hard links to the file were added or removed. In both cases all ranges are read once
  more before the commit: ``reread``.

Read ``OpenFile`` first. ``Folder`` compares the files of one checkpoint, ``FileStream`` adapts an
``OpenFile`` to readers of formats, and ``FileBuffer`` reuses memory.
"""

from __future__ import annotations

import io
import os
import signal
import weakref
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from refitkit.errors import Problem, SourceError, raise_if_resource, resources
from refitkit.files.file_state import FileState

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

_SMALL = 1 << 16  # bytes; the allocator has smaller blocks at hand
_PIECE = 1 << 21  # bytes: fits into the cache of a core
_HINT = (
    "Write new weights to another file or folder, rename it when it is complete (os.replace), and "
    "refit again: a process that has the old file open can read it to its end."
)
_ATTRIBUTES_HINT = "it was written to and its time set back, or its rights or owner changed"


class OpenFile:
    """An open file of weights. All bytes read from it are of one version of the file.

    A file that is renamed or removed after opening can still be read to its end.

    Attributes:
        path: Path of the file.
    """

    def __init__(self, path: Path, description: str, *, keep_open: bool = True) -> None:
        """Open a file.

        Args:
            path: Path of the file.
            description: Label of the checkpoint for error messages.
            keep_open: Whether to keep the descriptor. If False, each read opens the file, which
                must still be at its path. That serves checkpoints of more files than a process may
                have open.

        Raises:
            OSError: The file cannot be opened.
        """
        self.path, self._description = path, description
        self._buffer = shared_buffer()
        self._blocks: weakref.WeakValueDictionary[tuple[int, int], Bytes] = (
            weakref.WeakValueDictionary()
        )
        self._digests: dict[tuple[int, int], bytes] = {}
        fd = _open(path)
        self._fd = fd if keep_open else None
        closing = weakref.finalize(self, os.close, fd)
        closing.atexit = False
        self._state = FileState.settled(lambda: os.fstat(fd))
        self._must_reread = open_for_writing(fd)
        if not keep_open:
            closing()

    @property
    def size(self) -> int:
        """Size in bytes when the file was opened."""
        return self._state.size

    def read(self, start: int, nbytes: int) -> torch.Tensor:
        """Return a range of bytes as they were when the file was opened.

        Returns:
            A uint8 tensor of shape ``(nbytes,)`` on the CPU. Do not write to it: reads of the same
            range share memory as long as one of the results is alive.

        Raises:
            SourceError: The file was changed since it was opened, or cannot be read.
            ResourceError: The system refused.
        """
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        block = self._blocks.get((start, nbytes))
        if block is not None:  # two names of one tensor
            self._require_state()
            return torch.frombuffer(block, dtype=torch.uint8)
        into = self._buffer.take(nbytes)
        self.fill(into.data, start)
        self._blocks[start, nbytes] = into
        return torch.frombuffer(into, dtype=torch.uint8)

    def pieces(
        self, start: int, nbytes: int, dtype: torch.dtype, into: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """Yield a range of bytes piece by piece.

        Args:
            start: Offset of the range.
            nbytes: Size of the range.
            dtype: Dtype of its elements.
            into: Contiguous tensor on the CPU to read into. If it is None, or has another dtype or
                size, all pieces use the same memory.

        Yields:
            Tensors of that dtype with one dimension, each valid until the next one is requested.

        Raises:
            SourceError: See ``read``.
        """
        reads_there = into is not None and into.dtype == dtype and into.nbytes == nbytes
        if into is not None and reads_there:
            flat = into.detach().view(-1)
            memory = flat.view(torch.uint8).numpy().data
        else:
            block = self._buffer.take(min(_PIECE, nbytes))
            flat, memory = torch.frombuffer(block, dtype=dtype), block.data
        with self._reading() as fd:
            for offset in range(0, nbytes, _PIECE):
                count, place = min(_PIECE, nbytes - offset), offset if reads_there else 0
                self._fill(fd, memory[place : place + count], start + offset)
                yield flat[place // dtype.itemsize : (place + count) // dtype.itemsize]

    def has_bits(self, start: int, tensor: torch.Tensor) -> bool | None:
        """Return whether a tensor has the bits of a range of the file when it was read.

        Args:
            start: Offset of the range.
            tensor: A contiguous tensor on the CPU.

        Returns:
            None if that range was not read.
        """
        memory = tensor.detach().view(-1).view(torch.uint8).numpy().data
        for offset in range(0, len(memory), _PIECE):
            piece = memory[offset : offset + _PIECE]
            recorded = self._digests.get((start + offset, len(piece)))
            if recorded is None:
                return None
            if recorded != xxhash.xxh3_128_digest(piece):
                return False
        return True

    def read_bytes(self, start: int, nbytes: int) -> bytes:
        """Return a range of bytes as a ``bytes`` object.

        Raises:
            SourceError: See ``read``.
        """
        into = bytearray(nbytes)
        self.fill(memoryview(into), start)
        return bytes(into)

    def fill(self, into: memoryview, start: int) -> None:
        """Read bytes into memory, from an offset on.

        Raises:
            SourceError: See ``read``.
        """
        with self._reading() as fd:
            self._fill(fd, into, start)

    def _fill(self, fd: int, into: memoryview, start: int) -> None:
        done, digests = 0, list[tuple[tuple[int, int], bytes]]()
        for offset in range(0, len(into), _PIECE):
            piece = into[offset : offset + _PIECE]
            done += _read_into(fd, piece, start + offset)
            # Hashed now, while the piece is in the cache.
            digests.append(((start + offset, len(piece)), xxhash.xxh3_128_digest(piece)))
        self._require_state(FileState.of(os.fstat(fd)))
        if done < len(into):
            raise SourceError(f"{self._description} ends before its tensors do.", hint=_HINT)
        for place, digest in digests:
            # XXH3 is not cryptographic. It need not be: a process that can write to the file can
            # write any weights, so it needs no collision.
            if self._digests.setdefault(place, digest) != digest:
                raise self._changed(*place)

    def require_unchanged(self) -> None:
        """Check that the file was not written to since it was opened.

        If its state cannot show that, all ranges are read again.

        Raises:
            SourceError: The file was changed, or cannot be read.
        """
        self._require_state()
        if self._must_reread:
            self.reread()

    def reread(self) -> None:
        """Read again all ranges that were read, and compare digests.

        Raises:
            SourceError: Some bytes have changed, or the file cannot be read.
        """
        block = self._buffer.take(_PIECE)
        for start, nbytes in sorted(self._digests):
            self.fill(block.data[:nbytes], start)

    def _changed(self, start: int, nbytes: int) -> SourceError:
        """Return the error of a range whose bytes are not those that were read before."""
        found = f"bytes {start} to {start + nbytes} have changed since they were first read"
        return _changed(self.path.name, self._description, found, f"{self._state}")

    def _require_state(self, now: FileState | None = None) -> None:
        """Check that the state has not changed; see ``require_same``."""
        if now is None:
            now = self._present_state()
        if now == self._state:
            return
        now = require_same(self._state, now, self.path.name, self._description)
        # A new or removed link moves the change time, as a write with a reset modification time
        # does. Only the bytes show which of the two happened.
        self._must_reread |= now.links != self._state.links
        self._state = now

    def _present_state(self) -> FileState | None:
        """Return the state of the file; None if it no longer exists."""
        try:
            with self._descriptor() as fd:
                return FileState.of(os.fstat(fd))
        except OSError as exc:
            if isinstance(exc, FileNotFoundError):
                return None
            raise self._unreadable(exc) from exc

    @contextmanager
    def _reading(self) -> Iterator[int]:
        """Yield a descriptor, and report errors of the system.

        Raises:
            SourceError: See ``read``.
        """
        try:
            with self._descriptor() as fd:
                yield fd
        except OSError as exc:
            # A file that was replaced by nothing is reported as changed.
            if isinstance(exc, FileNotFoundError):
                self._require_state()
            raise self._unreadable(exc) from exc

    def _unreadable(self, exc: OSError) -> SourceError:
        raise_if_resource(exc, f"{self._description} cannot be read")
        return SourceError(f"{self._description} cannot be read: {exc}.")

    @contextmanager
    def _descriptor(self) -> Iterator[int]:
        """Yield a descriptor: the open one, or a new one that is closed afterwards."""
        if self._fd is not None:
            yield self._fd
            return
        fd = _open(self.path)
        try:
            yield fd
        finally:
            os.close(fd)


class FileStream(io.RawIOBase):
    """An open file as a binary stream, for readers of formats."""

    def __init__(self, file: OpenFile) -> None:
        """Create a stream at the beginning of a file."""
        super().__init__()
        self._file, self._position = file, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the offset at which the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the offset at which the next read begins.

        Raises:
            ValueError: The offset is negative.
        """
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative offset in a file: {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read into memory, up to the end of the file; return the number of bytes.

        Raises:
            SourceError: See ``OpenFile.read``.
        """
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self._file.size - self._position)]
        self._file.fill(view, self._position)
        self._position += len(view)
        return len(view)


class Folder:
    """States of several files that are one checkpoint.

    A process that has a file open can read it after another one was renamed over it. But a writer
    that replaces files one by one may have begun before all of them were opened. Then they are of
    two checkpoints, although each of them is unchanged. So paths are compared, too.

    Attributes:
        path: Path of the folder.
    """

    def __init__(self, path: Path, description: str) -> None:
        """Create an object without files.

        Args:
            path: Path of the folder.
            description: Label of the checkpoint for error messages.
        """
        self.path, self._description = path, description
        self._states: dict[str, FileState] = {}

    def record(self, name: str) -> None:
        """Record the state of a file. A file that does not exist is not recorded.

        Raises:
            ResourceError: The system refused to report the state.
        """
        with suppress(OSError), resources(f"{str(self.path / name)!r} cannot be read"):
            self._states[name] = FileState.settled((self.path / name).stat)

    def require_unchanged(self) -> None:
        """Check that all recorded files are at their paths, unchanged.

        Raises:
            SourceError: Files are missing or changed. The error lists all of them.
        """
        changed: list[SourceError] = []
        for name, before in self._states.items():
            try:
                require_same(before, self._state(name), name, self._description)
            except SourceError as exc:
                changed.append(exc)
        if changed:
            problems = [problem for one in changed for problem in one.problems]
            raise SourceError(changed[0].message, problems=problems, hint=changed[0].hint)

    def _state(self, name: str) -> FileState | None:
        try:
            return FileState.of((self.path / name).stat())
        except OSError as exc:
            raise_if_resource(exc, f"{str(self.path / name)!r} cannot be read")
            return None


# -- comparing states -------------------------------------------------------------------------


def require_same(
    before: FileState, now: FileState | None, name: str, description: str
) -> FileState:
    """Check that a file has not changed, except for the number of its hard links.

    Args:
        before: Earlier state.
        now: Present state; None if the file no longer exists.
        name: Name of the file for the error.
        description: Label of the checkpoint for the error.

    Returns:
        The present state.

    Raises:
        SourceError: The file was written to, replaced or removed.
    """
    if now is None:
        raise _changed(name, description, "the file no longer exists", str(before))
    match before.difference(now):
        case "" | "links":
            return now
        case "another file":
            raise _changed(name, description, f"another file: {now}", str(before))
        case "attributes":
            raise _changed(name, description, str(now), str(before), _ATTRIBUTES_HINT)
        case _:
            raise _changed(name, description, str(now), str(before))


def _changed(name: str, description: str, found: str, wanted: str, why: str = "") -> SourceError:
    return SourceError(
        f"{description} was changed since it was opened, so none of its weights are used.",
        problems=[Problem(name, "changed", found, wanted, why)],
        hint=_HINT,
    )


def open_for_writing(fd: int) -> bool:
    """Return whether a process has a file open for writing, or mapped for writing.

    Linux grants a read lease only on a file that no process has open for writing (``fcntl(2)``,
    "Leases"). So this takes a lease and gives it back at once. A process that opens the file for
    writing in these microseconds waits until then, and this process gets a signal, which is ignored
    by default.

    Args:
        fd: Descriptor of the file, open for reading only.

    Returns:
        False also if the system cannot say: not on Linux, for a file of another user (without
        ``CAP_LEASE``), and on most network file systems.
    """
    if fcntl is None or not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # the default, SIGIO, ends a process
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


# -- memory -----------------------------------------------------------------------------------


class FileBuffer:
    """Memory for file data. A block is reused when nothing refers to its data any more.

    Allocating a large block takes longer than reading into one, because the kernel clears new
    pages. One spare block is kept: the largest.
    """

    def __init__(self) -> None:
        """Create a buffer without a spare block."""
        self._spare: deque[Bytes] = deque()  # its operations are atomic, so no lock is needed

    def take(self, nbytes: int) -> Bytes:
        """Return uninitialized memory; it returns to this buffer when it is garbage-collected."""
        if nbytes <= _SMALL:
            return _new_block(nbytes)
        block = self._pop()
        if block.nbytes < nbytes:
            block = _new_block(0)  # frees the old block before the new one is allocated
            block = _new_block(nbytes)
        view = block[:nbytes]
        weakref.finalize(view, self._put_back, block).atexit = False
        return view

    def _put_back(self, block: Bytes) -> None:
        other = self._pop()
        self._spare.append(max(block, other, key=lambda one: one.nbytes))

    def _pop(self) -> Bytes:
        """Return the spare block, or an empty one."""
        try:
            return self._spare.pop()
        except IndexError:
            return _new_block(0)


_SHARED: weakref.WeakValueDictionary[str, FileBuffer] = weakref.WeakValueDictionary()
"""The buffer of all open files. It is freed with the last of them."""


def shared_buffer() -> FileBuffer:
    """Return the buffer that all open files of the process share, so that one spare is kept."""
    return _SHARED.setdefault("files", FileBuffer())


def _new_block(nbytes: int) -> Bytes:
    # numpy's own allocations are aligned to 16 bytes, torch's to 64.
    block: Bytes = torch.empty(nbytes, dtype=torch.uint8, device="cpu").numpy()
    return block


# -- system calls -----------------------------------------------------------------------------


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))


def _read_into(fd: int, into: memoryview, start: int) -> int:
    """Fill memory from an offset on; return the number of bytes, fewer only at the file's end."""
    done = 0
    while done < len(into):
        # preadv needs no seek, so threads can share the descriptor.
        count = os.preadv(fd, [into[done:]], start + done)
        if not count:
            break
        done += count
    return done
