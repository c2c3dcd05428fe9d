"""Calls of the operating system that fail, at a place that is chosen beforehand.

A run without a fault counts the calls; then each of them can fail in turn. Calls count that Python
code of this thread makes through ``os``, ``open`` and ``mmap``. Files that ``open`` gives read and
write through Python, too, so that their calls count.
"""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import mmap
import os
import resource
import sys
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)
_LOOK = (errno.EIO, errno.EACCES)
CODES = {
    "open": (*_PLACE, errno.EMFILE, errno.ENFILE),
    "memfd_create": (errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    "scandir": (*_LOOK, errno.EMFILE, errno.ENFILE),
    "listdir": (*_LOOK, errno.EMFILE, errno.ENFILE),
    "read": (errno.EIO,),
    "pread": (errno.EIO,),
    "preadv": (errno.EIO,),
    "write": (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG),
    "pwrite": (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG),
    "fsync": (errno.ENOSPC, errno.EDQUOT, errno.EIO),
    "close": (errno.ENOSPC, errno.EDQUOT, errno.EIO),
    "truncate": (errno.ENOSPC, errno.EIO, errno.EFBIG),
    "ftruncate": (errno.ENOSPC, errno.EIO, errno.EFBIG),
    "posix_fallocate": (errno.ENOSPC, errno.EIO, errno.EFBIG),
    "rename": _PLACE,
    "replace": _PLACE,
    "mkdir": _PLACE,
    "unlink": (errno.EIO, errno.EACCES, errno.EROFS),
    "rmdir": (errno.EIO, errno.EACCES, errno.EROFS),
    "stat": _LOOK,
    "lstat": _LOOK,
    "fstat": (errno.EIO,),
    "fchmod": (errno.EIO, errno.EPERM),
    "mmap": (errno.ENOMEM, errno.EMFILE),
}
"""Calls, and the errors that they fail with."""

_OF_MOVING = {
    *("_remove_stale", "_remove_if_unlocked", "_remove_own"),
    *("_restore_set_aside", "rmtree", "part_file"),
}
"""Functions that remove what lies around; whoever comes next does it if they fail."""


_FILE_SIZE = resource.RLIMIT_FSIZE
_ASIDE: list[bool] = []


class Faults:
    """Counts calls, and lets one of them fail.

    Attributes:
        at: Number of the call to fail; None: none.
        code: The error.
        lasting: Whether all later calls fail, too, for which the error is known.
        calls: Names of the calls that were made, as in ``CODES``.
        where: The frames at the call that failed, innermost first.
        removing: Whether that call was there to remove something, or later ones fail, too.
    """

    def __init__(self, at: int | None = None, code: int = 0, *, lasting: bool = False) -> None:
        self.at, self.code, self.lasting = at, code, lasting
        self.calls: list[str] = []
        self.where, self.removing = "", False
        self._thread = threading.get_ident()
        self._patches: list[Any] = []

    def __enter__(self) -> Self:
        for name in CODES:
            if name == "read":
                continue  # of descriptors, which torch's compiler and subprocesses use
            owner = mmap if name == "mmap" else os
            self._patch(owner, name, self._failing(name, getattr(owner, name)))
        opener = self._opening()
        self._patch(io, "open", opener)
        self._patch(builtins, "open", opener)
        return self

    def __exit__(self, *_: object) -> None:
        while self._patches:
            self._patches.pop().stop()

    def _patch(self, owner: Any, name: str, function: Any) -> None:
        patch = mock.patch.object(owner, name, function)
        patch.start()
        self._patches.append(patch)

    @staticmethod
    @contextmanager
    def without() -> Iterator[None]:
        """Calls inside do not count: those of the test."""
        _ASIDE.append(True)
        try:
            yield
        finally:
            _ASIDE.pop()

    def check(self, name: str, path: object = None) -> None:
        """Count a call, and raise if it is to fail."""
        if not self._patches or _ASIDE or threading.get_ident() != self._thread:
            return
        number = len(self.calls)
        self.calls.append(name)
        late = self.lasting and self.at is not None and number > self.at
        late = late and self.code in CODES[name] and name != "fstat"  # its state is in memory
        if number != self.at and not late:
            return
        if number == self.at:
            self.where, removing = self._stack(name)
            self.removing = removing or self.lasting
        given = (path,) if isinstance(path, str | os.PathLike) else ()
        raise OSError(self.code, os.strerror(self.code), *map(os.fspath, given))

    def _failing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **kwargs: Any) -> Any:
            if name == "close":  # it is closed all the same, as on Linux
                function(*args, **kwargs)
                self.check(name)
                return None
            self.check(name, args[0] if args else None)
            return function(*args, **kwargs)

        return failing

    def _opening(self) -> Callable[..., Any]:
        plain, raw = io.open, partial(_Counted, self.check)

        def opener(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            if not self._patches or threading.get_ident() != self._thread:
                return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)
            if not isinstance(file, int) and opener is None:  # else whoever opens it counts
                self.check("open", file)
            made = _buffered(raw(file, mode, closefd, opener), mode, buffering)
            if "b" in mode:
                return made
            return io.TextIOWrapper(made, encoding, errors, newline)

        return opener

    def _stack(self, name: str) -> tuple[str, bool]:
        frame: Any = sys._getframe(2)
        places, removing = [name], name in {"unlink", "rmdir"}
        while frame is not None:
            code = frame.f_code
            if code.co_filename != __file__:
                file = code.co_filename.rpartition("/")[2]
                places.append(f"{file}:{frame.f_lineno} {code.co_name}")
            removing |= code.co_name in _OF_MOVING
            frame = frame.f_back
        return " < ".join(places[:14]), removing


class _Counted(io.FileIO):
    """A file whose calls count."""

    def __init__(
        self,
        check: Callable[..., None],
        file: Any,
        mode: str,
        closefd: bool,
        opener: Any,
    ) -> None:
        self._check = check
        super().__init__(file, mode.replace("t", "").replace("b", ""), closefd, opener)

    def readinto(self, buffer: Any) -> Any:
        self._check("read", self.name)
        return super().readinto(buffer)

    def read(self, size: int = -1) -> Any:
        self._check("read", self.name)
        return super().read(size)

    def readall(self) -> Any:
        self._check("read", self.name)
        return super().readall()

    def write(self, data: Any) -> Any:
        self._check("write")
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        self._check("truncate")
        return super().truncate(size)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._check("close")


def _buffered(raw: _Counted, mode: str, buffering: int) -> Any:
    if buffering == 0:
        return raw
    kind: Any = io.BufferedRandom if "+" in mode else io.BufferedWriter
    if mode.strip("tb") == "r":
        kind = io.BufferedReader
    return kind(raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE)


class Limit:
    """A limit of the process that is low for a while: calls of libraries fail, too.

    Attributes:
        at: How much is left.
        reason: What the system says where it is passed.
    """

    def __init__(self, kind: Literal["descriptors", "bytes"], at: int) -> None:
        """Change nothing yet.

        Args:
            kind: Descriptors that can be opened, or bytes that a file can have.
            at: How many.
        """
        self._kind, self.at, self.where = kind, at, kind
        self.reason = os.strerror(errno.EMFILE if kind == "descriptors" else errno.EFBIG)

    def __enter__(self) -> Self:
        self._which = resource.RLIMIT_NOFILE if self._kind == "descriptors" else _FILE_SIZE
        self._before = resource.getrlimit(self._which)
        soft = self.at
        if self._kind == "descriptors":  # the limit is one of their numbers
            known = {int(name) for name in os.listdir("/proc/self/fd")}  # noqa: PTH208
            free = (number for number in itertools.count() if number not in known)
            soft = next(itertools.islice(free, self.at, None))
        resource.setrlimit(self._which, (soft, self._before[1]))
        return self

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(self._which, self._before)
