"""File states: detect from ``stat(2)`` that a file was written to or replaced.

This module hides which fields of ``stat`` can be trusted. Any user can set a modification time
back (``utime``, ``cp -p``, ``rsync -t``, ``tar``). No program can set the *change time* (ctime):
every write, and every change of attributes, moves it forward.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from refitkit.errors import raise_if_resource

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from pathlib import Path


Difference: TypeAlias = Literal["", "links", "another file", "size", "written", "attributes"]
"""How two states differ. See ``FileState.difference``."""

_CLOCK_REALTIME_COARSE = 5  # linux/time.h; the module time has no name for it
_TICK_LIMIT = 20_000_000  # ns; the kernel's tick is 1 to 10 ms
_POLL = 0.0005  # s


def stat_of(path: Path) -> os.stat_result | None:
    """The ``stat`` result of a path, with links followed. None if nothing is there or can be.

    Raises:
        ResourceError: The system does not let the path be read, so it may be there or not.
    """
    try:
        return path.stat()
    except (OSError, ValueError) as exc:  # ValueError: a name with a null byte
        raise_if_resource(exc, f"{str(path)!r} cannot be read")
        return None


class FileState(NamedTuple):
    """Identity of a file and of its content, as far as the file system reports it.

    Attributes:
        device: Number of the device that has the inode.
        inode: Number of the inode.
        size: Size of the file in bytes.
        modified: Time of the last write, in nanoseconds since 1970. Any user can set it.
        changed: Time of the last write or change of attributes, in nanoseconds since 1970. Only
            the kernel sets it.
        links: Number of names of the file. Removing the file, or renaming another one over it,
            takes one away and moves ``changed``.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int
    links: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileState:
        """The state in a ``stat`` result."""
        return cls(
            found.st_dev,
            found.st_ino,
            found.st_size,
            found.st_mtime_ns,
            found.st_ctime_ns,
            found.st_nlink,
        )

    @classmethod
    def settled(cls, look: Callable[[], os.stat_result]) -> FileState:
        """A state that the next write is sure to change.

        Kernels before Linux 6.13, and many file systems since, stamp files with a clock that ticks
        every 1 to 10 ms. A write in the same tick as the stamp would not change the stamp. So if
        the file was changed in the current tick, this waits for the next one.

        Args:
            look: Returns the current state: ``os.stat`` or ``os.fstat`` of the file.
        """
        # a limit, because a stamp from a remote clock may lie in the future
        limit = time.monotonic_ns() + _TICK_LIMIT
        found = cls.of(look())
        while found.changed >= _now() and time.monotonic_ns() < limit:
            time.sleep(_POLL)
            found = cls.of(look())
        return found

    def difference(self, now: FileState) -> Difference:
        """How a later state differs from this one. Empty if it is the same.

        Args:
            now: The later state.

        Returns:
            ``another file``: another file has the name. ``size``: the size changed. ``written``:
            the modification time changed. ``links``: names were added or removed. That alone moves
            the change time, so only the content shows whether the file was also written to.
            ``attributes``: only the change time moved. That happens if a writer sets the
            modification time back.
        """
        if (now.device, now.inode) != (self.device, self.inode):
            return "another file"
        if now.size != self.size:
            return "size"
        if now.modified != self.modified:
            return "written"
        if now.links != self.links:
            return "links"
        return "attributes" if now.changed != self.changed else ""

    def __str__(self) -> str:
        """Size and times, for error messages."""
        written, changed = self.modified / 1e9, self.changed / 1e9
        return f"{self.size} bytes, written at {written:.6f}, changed at {changed:.6f}"


def _now() -> int:
    """Lower bound of the stamp that a write would get now, in nanoseconds since 1970."""
    try:
        return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
    except (AttributeError, OSError):  # not on Linux
        return time.time_ns() - _TICK_LIMIT // 2
