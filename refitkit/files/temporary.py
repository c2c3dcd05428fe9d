"""Folders and files for a while, which are removed even if their process was killed.

Each is locked (``flock(2)``) by the process that made it. The kernel takes the lock back when the
last process that has it open is gone, whatever ended it. So a name of ours that nobody locks is
litter, and whoever makes something in the same folder next removes it. Forks share the lock of
their parent: what they may still use stays.

Where a file system has no such locks nothing is found, and nothing is removed by mistake.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import secrets
import shutil
import stat
import tempfile
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from refitkit.errors import refused

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType


_SCRATCH = "refitkit-{}.tmp"
_PART = ".refitkit-{}.part"
_KEY = "[0-9a-f]{16}"
_ASIDE = ".aside"
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF}
"""``flock`` on file systems that have no locks, or (NFS) none on folders."""


class TemporaryFolder:
    """A folder that this user alone can read, removed with the object, or by ``with``.

    A fork of the process can use it. It is there until neither has the object any more.

    Attributes:
        path: The folder.
    """

    def __init__(self) -> None:
        """Make it, empty, in the folder for temporary files (``TMPDIR``).

        Raises:
            ResourceError: It cannot be made.
        """
        try:
            parent = Path(tempfile.gettempdir())
            _sweep(parent, _SCRATCH)
            self.path, lock = _made_folder(parent, _SCRATCH)
            try:
                self._remove_with(lock)
            except BaseException:
                _remove_empty(self.path)
                os.close(lock)
                raise
        except OSError as exc:
            raise refused(exc, "No temporary folder can be made") from exc

    def _remove_with(self, lock: int) -> None:
        state = os.fstat(lock)
        self._finalizer = weakref.finalize(self, _remove_own, self.path, lock, state, os.getpid())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._finalizer()


@contextmanager
def part_folder(parent: Path) -> Iterator[Path]:
    """A folder to fill and rename, beside the one whose place it takes.

    It is removed at the end if it is still there under its name. A folder that was set aside in it
    goes back first if nothing has taken its place.

    Raises:
        OSError: It cannot be made.
    """
    _sweep(parent, _PART)
    path, lock = _made_folder(parent, _PART)
    owner = os.getpid()
    try:
        yield path
    finally:
        if os.getpid() == owner:  # not a fork, from whoever is called meanwhile
            with suppress(OSError):
                _put_back(path)
                shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def set_aside(path: Path, folder: Path) -> None:
    """Move a folder into one of ``part_folder``.

    It is put back when that one is removed, by this process or as litter, if nothing has taken its
    place.
    """
    (folder / _ASIDE).mkdir()
    path.rename(folder / _ASIDE / path.name)


@contextmanager
def part_file(parent: Path, mode: int) -> Iterator[tuple[Path, IO[bytes]]]:
    """A file to write and rename, beside the one whose place it takes.

    It is removed at the end if it is still there under its name.

    Args:
        parent: Where it is made.
        mode: Its rights; the umask of the process applies.

    Raises:
        OSError: It cannot be made.
    """
    _sweep(parent, _PART)
    owner = os.getpid()
    path, file = _made_file(parent, mode)
    with file:
        try:
            yield path, file
        finally:
            if os.getpid() == owner:
                with suppress(OSError):
                    path.unlink()


# -- making -------------------------------------------------------------------------------------


def _made_folder(parent: Path, form: str) -> tuple[Path, int]:
    """A new folder, and the descriptor that holds its lock."""
    while True:
        path = _new_name(parent, form)
        path.mkdir(0o700)
        try:
            with suppress(FileNotFoundError):
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _OPEN)
                if _is_locked(lock, path):
                    return path, lock
        except BaseException:
            _remove_empty(path)
            raise
        _remove_empty(path)


def _made_file(parent: Path, mode: int) -> tuple[Path, IO[bytes]]:
    """A new file, open for writing; it holds its lock."""
    while True:
        path = _new_name(parent, _PART)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, mode)
        try:
            if _is_locked(handle, path):
                return path, _file_on(handle)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        path.unlink(missing_ok=True)


def _file_on(handle: int) -> IO[bytes]:
    """A file on an open descriptor, which is closed with it, or if it cannot be made."""
    try:
        raw = io.FileIO(handle, "wb")
    except BaseException:
        os.close(handle)
        raise
    return io.BufferedWriter(raw)


def _new_name(parent: Path, form: str) -> Path:
    return parent / form.format(secrets.token_hex(8))


def _is_locked(handle: int, path: Path) -> bool:
    """Lock what was just made; False if somebody took it for litter before, and it is closed.

    Raises:
        OSError: It cannot be locked although its file system has locks; it is closed.
    """
    try:
        if _lock(handle) and os.path.samestat(os.fstat(handle), path.lstat()):
            return True
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return False


def _lock(handle: int) -> bool:
    """Lock it without waiting: a fork of the process that sweeps may hold it for long."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno not in _NO_LOCKS:
            raise
    return True


# -- removing -----------------------------------------------------------------------------------


def _remove_empty(path: Path) -> None:
    """Remove a folder that was just made, without a descriptor: there may be none left."""
    with suppress(OSError):
        path.rmdir()


def _remove_own(path: Path, lock: int, state: os.stat_result, owner: int) -> None:
    """Remove a folder, unless a fork of the process uses it, or the process that this is one of.

    Whoever of them lets go of it last removes it, or the next process that makes a folder.
    """
    with suppress(OSError):
        if os.path.samestat(os.fstat(lock), state):  # a daemon may have closed all that was open
            os.close(lock)
    try:
        _remove_litter(str(path))
    except BlockingIOError:
        return
    except OSError:  # there are no locks here, or no descriptors left
        pass
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def _sweep(parent: Path, form: str) -> None:
    """Remove what nobody holds any more, as far as this process may."""
    pattern = re.compile(re.escape(form).replace(r"\{\}", _KEY))
    try:
        with os.scandir(parent) as entries:
            found = [entry.path for entry in entries if pattern.fullmatch(entry.name)]
    except OSError:  # whoever makes something there is told why it cannot be
        return
    for path in found:
        with suppress(OSError):
            _remove_litter(path)


def _remove_litter(path: str) -> None:
    handle = _opened(path)
    try:
        state = os.fstat(handle)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISREG(state.st_mode):
            Path(path).unlink()
        elif stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid():
            _put_back(Path(path))
            shutil.rmtree(path, ignore_errors=True)
        fcntl.flock(handle, fcntl.LOCK_UN)  # a fork may have this open, too
    finally:
        os.close(handle)


def _put_back(litter: Path) -> None:
    """Move a folder that was set aside back to its place.

    Raises:
        OSError: It cannot be moved, so it has to stay where it is.
    """
    aside = litter / _ASIDE
    for old in aside.iterdir() if aside.is_dir() else ():
        if not os.path.lexists(litter.parent / old.name):
            old.rename(litter.parent / old.name)


def _opened(path: str) -> int:
    """Open for writing, as NFS wants for locks; else, as folders are, for reading."""
    kind = _OPEN | os.O_NONBLOCK  # a pipe of this name is not waited for
    with suppress(IsADirectoryError, PermissionError):
        return os.open(path, os.O_RDWR | kind)
    return os.open(path, os.O_RDONLY | kind)
