"""Bytes of a file that others may cut or overwrite while it is open.

A page of a mapped file that is no longer there ends the process with SIGBUS (``mmap(2)``), and no
check comes before each page. So nothing is mapped here: bytes are copied to memory of our own,
where a file that ends too early is an error like any other. After each read the file is asked
whether it is still what it was when it was opened: what was handed out is of one version of it.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch

from refitkit.errors import Problem, SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

_SMALL = 1 << 16  # bytes; less than that the allocator has at hand
_PIECE = 1 << 21  # bytes: not more than a cache of a core
_AT_ONCE = 1 << 30  # bytes of one call: Linux reads less than 2 GiB
_HINT = (
    "Write new weights to another file or folder, rename it when it is complete (os.replace), and "
    "refit again: who has an old file open reads that to its end."
)


class State(NamedTuple):
    """What shows that a file was written to, or is another one.

    Attributes:
        size: Bytes.
        modified: When it was last written to, in nanoseconds since 1970. Clocks of file systems
            tick every few milliseconds: of two writes within one tick nobody can tell. (Most of
            them can from Linux 6.13 on.)
        inode: Its number, and
        device: where that is counted.
    """

    size: int
    modified: int
    inode: int
    device: int

    @classmethod
    def of(cls, found: os.stat_result) -> State:
        """That of a file that was asked."""
        return cls(found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)

    def require(self, found: os.stat_result | None, name: str, description: str) -> None:
        """Check that a file is what it was.

        Args:
            found: What it is; None: it is gone.
            name: The file's.
            description: What errors call its source.

        Raises:
            SourceError: It is not.
        """
        now = None if found is None else State.of(found)
        if now == self:
            return
        shown = "it is gone" if now is None else str(now)
        if now is not None and (now.inode, now.device) != (self.inode, self.device):
            shown = f"another file: {now}"
        raise SourceError(
            f"{description} was changed since it was opened; nothing of it can be trusted.",
            problems=[Problem(name, "changed", shown, str(self))],
            hint=_HINT,
        )

    def __str__(self) -> str:
        """As problems show it."""
        return f"{self.size} bytes, written at {self.modified / 1e9:.6f}"


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
    """A file with weights, held open: renamed or removed it can still be read to its end."""

    def __init__(self, path: Path, description: str) -> None:
        """Open it.

        Args:
            path: The file.
            description: What errors call it.

        Raises:
            OSError: It cannot be opened.
        """
        self.path, self._description = path, description
        self._memory = shared_memory()
        self._held: weakref.WeakValueDictionary[tuple[int, int], Bytes] = (
            weakref.WeakValueDictionary()
        )
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self._fd).atexit = False
        self._state = State.of(os.fstat(self._fd))

    @property
    def size(self) -> int:
        """Its bytes, when it was opened."""
        return self._state.size

    @property
    def fd(self) -> int:
        """The open file, which stays open as long as this object is there."""
        return self._fd

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
            self.require_unchanged()
            return torch.frombuffer(held, dtype=torch.uint8)
        into = self._memory.take(nbytes)
        self._fill(into, start)
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
            self._fill(block[:count], at)
            yield flat[: count // dtype.itemsize]

    def _fill(self, into: Bytes, start: int) -> None:
        try:
            done = _read_into(self._fd, into, start)
        except OSError as exc:
            raise SourceError(f"{self._description} cannot be read: {exc}.") from exc
        self.require_unchanged()
        if done < into.nbytes:
            raise SourceError(f"{self._description} ends before its tensors do.", hint=_HINT)

    def require_unchanged(self) -> None:
        """Check that it was not written to since it was opened.

        Raises:
            SourceError: It was.
        """
        self._state.require(os.fstat(self._fd), self.path.name, self._description)


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
        self._states: dict[str, State] = {}

    def note(self, name: str) -> None:
        """Note what a file is now. One that is not there is not noted."""
        found = self._stat(name)
        if found is not None:
            self._states[name] = State.of(found)

    def require(self, name: str, found: os.stat_result | None) -> None:
        """Check that a file is the one that was noted.

        Raises:
            SourceError: It is not.
        """
        self._states[name].require(found, name, self._description)

    def require_unchanged(self) -> None:
        """Check that all that was noted is in its place, as it was.

        Raises:
            SourceError: Some is not; lists all of it.
        """
        changed: list[SourceError] = []
        for name in self._states:
            try:
                self.require(name, self._stat(name))
            except SourceError as exc:
                changed.append(exc)
        if changed:
            problems = [problem for one in changed for problem in one.problems]
            raise SourceError(changed[0].message, problems=problems, hint=changed[0].hint)

    def _stat(self, name: str) -> os.stat_result | None:
        try:
            return (self.path / name).stat()
        except OSError:
            return None


def _block(nbytes: int) -> Bytes:
    """Memory as torch aligns it."""
    block: Bytes = torch.empty(nbytes, dtype=torch.uint8, device="cpu").numpy()
    return block


def _read_into(fd: int, into: Bytes, start: int) -> int:
    """Fill memory from a place of a file on; returns the bytes read, fewer only at its end."""
    done, left = 0, into.data
    while done < len(left):
        count = os.preadv(fd, [left[done : done + _AT_ONCE]], start + done)
        if not count:
            break
        done += count
    return done
