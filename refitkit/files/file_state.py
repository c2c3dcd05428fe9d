"""What shows that a file was written to, or is another one: ``stat(2)``, read with care.

Anybody can set a modification time back (``utime``, ``cp -p``, ``rsync -t``, ``tar``). Nobody can
set the *change time* (ctime): every write, and every change of the attributes, moves it forward.
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
"""How two states differ; see ``FileState.difference``."""

_CLOCK_REALTIME_COARSE = 5  # linux/time.h; the module ``time`` has no name for it
_TICK_LIMIT = 20_000_000  # ns; the kernel's tick is 1 to 10 ms
_POLL = 0.0005  # s


def stat_of(path: Path) -> os.stat_result | None:
    """What lies at a path, with links followed; None where nothing does, or nothing can.

    Raises:
        ResourceError: The system does not let it be looked at, so nobody knows.
    """
    try:
        return path.stat()
    except (OSError, ValueError) as exc:  # too long a name, or one that no file can have
        raise_if_resource(exc, f"{str(path)!r} cannot be read")
        return None


class FileState(NamedTuple):
    """Identity of a file and of its content, as far as the file system reports it.

    Attributes:
        device: Where the inode is counted.
        inode: Its number.
        size: Bytes.
        modified: Time of the last write, in nanoseconds since 1970. Anybody can set it.
        changed: Time of the last write or change of attributes, likewise. Only the kernel sets it.
        links: Names that the file has. A file that is removed, or that another one is renamed
            over, has one less, and that moves ``changed``, too.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int
    links: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileState:
        """The state that ``stat`` reports."""
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
        """A state that the next write is sure to move.

        Kernels before Linux 6.13, and many file systems since, stamp files with a clock that ticks
        every 1 to 10 ms. A write within the tick of the stamp would leave the stamp as it is. So
        this waits for the next tick where the file was changed in the present one.

        Args:
            look: Asks for the state: ``os.stat`` or ``os.fstat`` of the file.
        """
        limit = time.monotonic_ns() + _TICK_LIMIT
        found = cls.of(look())
        while found.changed >= _now() and time.monotonic_ns() < limit:
            time.sleep(_POLL)
            found = cls.of(look())
        return found

    def difference(self, now: FileState) -> Difference:
        """How a later state differs; empty where it is the same.

        Returns:
            ``another file``: of this name. ``size``. ``written``: the modification time moved.
            ``links``: names were added or removed, which alone may have moved the change time; only
            the bytes say whether it was written to as well. ``attributes``: the change time moved
            without any of these, as a write does whose modification time was set back.
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
        """As problems show it."""
        written, changed = self.modified / 1e9, self.changed / 1e9
        return f"{self.size} bytes, written at {written:.6f}, changed at {changed:.6f}"


def _now() -> int:
    """The time that a write would be stamped with now, at the least, in nanoseconds since 1970."""
    try:
        return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
    except (AttributeError, OSError):  # not on Linux
        return time.time_ns() - _TICK_LIMIT // 2
