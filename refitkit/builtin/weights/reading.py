"""Bytes of a file that others may cut, overwrite or replace while it is open.

A page of a mapped file that is no longer there ends the process with SIGBUS (``mmap(2)``), and no
check comes before each page. So nothing is mapped here: bytes are copied to memory of our own,
where a file that ends too early is an error like any other.

All bytes of a file that a refit reads are of one version of it:

- After each read the file's state is compared with that at opening: size, modification time,
  change time, inode. ``cp -p`` and ``rsync -t`` set the modification time back, but nobody can set
  the change time.
- A digest of each range is kept. Who reads a range again, for another check or for the engine, gets
  the same bytes or an error.
- Where the state cannot tell (somebody has the file open for writing, or names of it were added or
  removed), all ranges are read once more before the commit: ``reread``.
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

_SMALL = 1 << 16  # bytes; less than that the allocator has at hand
_PIECE = 1 << 21  # bytes: not more than a cache of a core
_HINT = (
    "Write new weights to another file or folder, rename it when it is complete (os.replace), and "
    "refit again: who has an old file open reads that to its end."
)
_ATTRIBUTES = "it was written to and its time set back, or its rights or owner changed"


def require_same(
    before: FileState, now: FileState | None, name: str, description: str
) -> FileState:
    """Check that a file is what it was, but for the names that it has.

    Args:
        before: Its state then.
        now: Its state; None: it is gone.
        name: The file's.
        description: What errors call its source.

    Returns:
        The present state.

    Raises:
        SourceError: It was written to, or is another file.
    """
    if now is None:
        raise _changed(name, description, "it is gone", str(before))
    match before.difference(now):
        case "" | "links":
            return now
        case "another file":
            raise _changed(name, description, f"another file: {now}", str(before))
        case "attributes":
            raise _changed(name, description, str(now), str(before), _ATTRIBUTES)
        case _:
            raise _changed(name, description, str(now), str(before))


def _changed(name: str, description: str, found: str, wanted: str, why: str = "") -> SourceError:
    return SourceError(
        f"{description} was changed since it was opened; nothing of it can be trusted.",
        problems=[Problem(name, "changed", found, wanted, why)],
        hint=_HINT,
    )


def open_for_writing(fd: int) -> bool:
    """Whether somebody has a file open for writing, or mapped so, at this moment.

    Linux grants a read lease only on a file that nobody can write to (``fcntl(2)``, "Leases"), so
    one is taken and given back at once. Whoever opens the file for writing in these microseconds
    waits for the latter, and this process gets a signal that is ignored unless somebody handles it.

    Args:
        fd: The file, open for reading only.

    Returns:
        False also where nobody can tell: not on Linux, a file of another user (without
        ``CAP_LEASE``), most network file systems.
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


class Memory:
    """Blocks of memory, used again when nobody holds what was read into them any more.

    To allocate large blocks anew takes longer than to read them. One is kept at most, the largest.
    """

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._spare: deque[Bytes] = deque()  # its operations are atomic: no lock

    def take(self, nbytes: int) -> Bytes:
        """Memory of so many bytes, with anything in it, which comes back on its own."""
        if nbytes <= _SMALL:
            return _block(nbytes)
        block = self._taken()
        if block.nbytes < nbytes:
            block = _block(0)  # so that there are not two
            block = _block(nbytes)
        view = block[:nbytes]
        weakref.finalize(view, self._give_back, block).atexit = False
        return view

    def _give_back(self, block: Bytes) -> None:
        other = self._taken()
        self._spare.append(max(block, other, key=lambda one: one.nbytes))

    def _taken(self) -> Bytes:
        try:
            return self._spare.pop()
        except IndexError:
            return _block(0)


_LIVING: weakref.WeakValueDictionary[str, Memory] = weakref.WeakValueDictionary()
"""The memory that all open files share, as long as one of them is there."""


def shared_memory() -> Memory:
    """The memory that all open files of the process share: one spare block, not one for each."""
    return _LIVING.setdefault("files", Memory())


class OpenFile:
    """A file with weights, held open: renamed or removed it can still be read to its end.

    Whatever range of it is read, and however often, all of it is of one version.
    """

    def __init__(self, path: Path, description: str, *, hold: bool = True) -> None:
        """Open it.

        Args:
            path: The file.
            description: What errors call it.
            hold: Whether it is held open. Otherwise each read opens it, where it has to be in its
                place: for checkpoints of more files than a process may have open.

        Raises:
            OSError: It cannot be opened.
        """
        self.path, self._description = path, description
        self._memory = shared_memory()
        self._held: weakref.WeakValueDictionary[tuple[int, int], Bytes] = (
            weakref.WeakValueDictionary()
        )
        self._digests: dict[tuple[int, int], bytes] = {}
        fd = _open(path)
        self._fd = fd if hold else None
        closing = weakref.finalize(self, os.close, fd)
        closing.atexit = False
        self._state = FileState.settled(lambda: os.fstat(fd))
        self._doubtful = open_for_writing(fd)
        if not hold:
            closing()

    @property
    def size(self) -> int:
        """Its bytes, when it was opened."""
        return self._state.size

    def read(self, start: int, nbytes: int) -> torch.Tensor:
        """Some of its bytes, which are what they were when it was opened.

        Returns:
            A tensor of uint8, not to be written to; the same memory for the same bytes, as long as
            somebody holds it.

        Raises:
            SourceError: It was written to since, or cannot be read.
        """
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        held = self._held.get((start, nbytes))
        if held is not None:  # two names of one tensor
            self._require_state()
            return torch.frombuffer(held, dtype=torch.uint8)
        into = self._memory.take(nbytes)
        self.fill(into.data, start)
        self._held[start, nbytes] = into
        return torch.frombuffer(into, dtype=torch.uint8)

    def pieces(self, start: int, nbytes: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Some of its bytes, as ``read`` gives them, piece by piece in the same memory.

        Args:
            start: Where they begin.
            nbytes: How many there are.
            dtype: Of which they are elements.

        Raises:
            SourceError: See ``read``.
        """
        block = self._memory.take(min(_PIECE, nbytes))
        flat = torch.frombuffer(block, dtype=dtype)
        for at in range(start, start + nbytes, _PIECE):
            count = min(_PIECE, start + nbytes - at)
            self.fill(block.data[:count], at)
            yield flat[: count // dtype.itemsize]

    def read_bytes(self, start: int, nbytes: int) -> bytes:
        """Some of its bytes, as ``read`` gives them, in an object of Python's.

        Raises:
            SourceError: See ``read``.
        """
        into = bytearray(nbytes)
        self.fill(memoryview(into), start)
        return bytes(into)

    def fill(self, into: memoryview, start: int) -> None:
        """Read some of its bytes to memory; see ``read``."""
        pieces = [into[at : at + _PIECE] for at in range(0, len(into), _PIECE)]
        done, digests = 0, list[bytes]()
        try:
            with self._opened() as fd:
                for piece in pieces:
                    done += _read_into(fd, piece, start + done)
                    digests.append(xxhash.xxh3_128_digest(piece))  # while it is in the cache
                self._require_state(FileState.of(os.fstat(fd)))
        except OSError as exc:
            if isinstance(exc, FileNotFoundError):
                self._require_state()
            raise_if_resource(exc, f"{self._description} cannot be read")
            raise SourceError(f"{self._description} cannot be read: {exc}.") from exc
        if done < len(into):
            raise SourceError(f"{self._description} ends before its tensors do.", hint=_HINT)
        for piece, digest in zip(pieces, digests, strict=True):
            self._require_digest(start, len(piece), digest)
            start += len(piece)

    def require_unchanged(self) -> None:
        """Check that it was not written to since it was opened.

        Where its state cannot tell, everything that was read is read again.

        Raises:
            SourceError: It was.
        """
        self._require_state()
        if self._doubtful:
            self.reread()

    def reread(self) -> None:
        """Read again all that was read, and compare digests.

        Raises:
            SourceError: Some bytes are others, or it cannot be read.
        """
        block = self._memory.take(_PIECE)
        for start, nbytes in sorted(self._digests):
            self.fill(block.data[:nbytes], start)

    def _require_digest(self, start: int, nbytes: int, digest: bytes) -> None:
        """Note a digest of a range, or compare it with the one that was noted.

        XXH3 is no cryptographic hash: a writer that makes collisions has no need to.
        """
        noted = self._digests.setdefault((start, nbytes), digest)
        if noted != digest:
            where = f"bytes {start} to {start + nbytes}"
            found = f"{where} are others than when they were first read"
            raise _changed(self.path.name, self._description, found, f"{self._state}")

    def _require_state(self, now: FileState | None = None) -> None:
        """Check that it is what it was; see ``require_same``."""
        if now is None:
            now = self._present_state()
        now = require_same(self._state, now, self.path.name, self._description)
        self._doubtful |= now.links != self._state.links
        self._state = now

    def _present_state(self) -> FileState | None:
        try:
            with self._opened() as fd:
                return FileState.of(os.fstat(fd))
        except OSError as exc:
            if isinstance(exc, FileNotFoundError):
                return None
            raise_if_resource(exc, f"{self._description} cannot be read")
            raise SourceError(f"{self._description} cannot be read: {exc}.") from exc

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The file, which is in its place where it is not held open."""
        if self._fd is not None:
            yield self._fd
            return
        fd = _open(self.path)
        try:
            yield fd
        finally:
            os.close(fd)


class FileStream(io.RawIOBase):
    """An open file as a stream, for readers of formats: see ``OpenFile.read``."""

    def __init__(self, file: OpenFile) -> None:
        """Begin at its beginning."""
        super().__init__()
        self._file, self._at = file, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set where the next read begins.

        Raises:
            ValueError: Before the file's beginning.
        """
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        if begin + offset < 0:
            raise ValueError(f"no place in a file: {begin + offset}")
        self._at = begin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read to memory, as much as there is."""
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self._file.size - self._at)]
        self._file.fill(view, self._at)
        self._at += len(view)
        return len(view)


class Folder:
    """Several files of one folder that are one checkpoint, as they were when it was opened.

    A file that another one was renamed over can be read on by who has it open. But who replaces
    files one after another may have begun before all were opened, and those are of two checkpoints.
    """

    def __init__(self, path: Path, description: str) -> None:
        """Know none yet.

        Args:
            path: The folder.
            description: What errors call the checkpoint.
        """
        self.path, self._description = path, description
        self._states: dict[str, FileState] = {}

    def note(self, name: str) -> None:
        """Note what a file is now. One that is not there is not noted."""
        with suppress(OSError), resources(f"{str(self.path / name)!r} cannot be read"):
            self._states[name] = FileState.settled((self.path / name).stat)

    def require_unchanged(self) -> None:
        """Check that all that was noted is in its place, as it was.

        Raises:
            SourceError: Some is not; lists all of it.
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


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))


def _block(nbytes: int) -> Bytes:
    """Memory as torch aligns it."""
    block: Bytes = torch.empty(nbytes, dtype=torch.uint8, device="cpu").numpy()
    return block


def _read_into(fd: int, into: memoryview, start: int) -> int:
    """Fill memory from a place of a file on; returns the bytes read, fewer only at its end."""
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done:]], start + done)
        if not count:
            break
        done += count
    return done
