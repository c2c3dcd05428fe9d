"""Temporary folders and files that are removed even if their process is killed.

This module hides how refitkit decides that a temporary folder or file is stale. The process that
creates one locks it (``flock(2)``). The kernel releases the lock when the last process that has it
open ends, for any reason. So a temporary name of refitkit that is not locked is stale, and the
next process that creates one in the same folder removes it. Forks share the lock of their parent,
so that nothing is removed that they may still use.

On file systems without locks nothing counts as stale, so nothing is removed by mistake.

``TemporaryFolder`` is for scratch data. ``part_folder`` and ``part_file`` are for content that is
renamed into place (:mod:`refitkit.files.replacing`).
"""

from __future__ import annotations

import errno
import fcntl
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
_KEY_PATTERN = "[0-9a-f]{16}"
_ASIDE = ".aside"
_OPEN_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF}
"""Errors of ``flock`` on file systems without locks, or (NFS) without locks of folders."""


class TemporaryFolder:
    """A folder that only this user can read.

    It is removed at the end of a ``with`` block, or when the object is freed. A fork of the process
    can use it, too. It then exists until both processes have freed the object.

    Attributes:
        path: The folder.
    """

    def __init__(self) -> None:
        """Create an empty folder in the folder for temporary files (``TMPDIR``).

        Raises:
            ResourceError: The folder cannot be created.
        """
        try:
            parent = Path(tempfile.gettempdir())
            _remove_stale(parent, _SCRATCH)
            self.path, lock = _create_folder(parent, _SCRATCH)
            try:
                self._set_finalizer(lock)
            except BaseException:
                _remove_empty(self.path)
                os.close(lock)
                raise
        except OSError as exc:
            raise refused(exc, "No temporary folder can be created") from exc

    def _set_finalizer(self, lock: int) -> None:
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
    """A folder to fill and rename, beside the folder that it will replace.

    If it still has its temporary name at the end of the block, it is removed. A folder that was set
    aside in it is moved back first, if nothing has taken its place.

    Args:
        parent: Folder to create it in.

    Raises:
        OSError: The folder cannot be created.
    """
    _remove_stale(parent, _PART)
    path, lock = _create_folder(parent, _PART)
    owner = os.getpid()
    try:
        yield path
    finally:
        if os.getpid() == owner:  # a fork in the block also gets here, and must not remove it
            with suppress(OSError):
                _restore_set_aside(path)
                shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def set_aside(path: Path, folder: Path) -> None:
    """Move a folder into a part folder.

    When the part folder is removed, by this process or as stale, the folder is moved back if
    nothing has taken its place.

    Args:
        path: The folder to move.
        folder: A folder from ``part_folder`` in the same parent.
    """
    (folder / _ASIDE).mkdir()
    path.rename(folder / _ASIDE / path.name)


@contextmanager
def part_file(parent: Path, mode: int) -> Iterator[tuple[Path, IO[bytes]]]:
    """A file to write and rename, beside the file that it will replace.

    If it still has its temporary name at the end of the block, it is removed.

    Args:
        parent: Folder to create it in.
        mode: Mode of the file. The umask of the process applies.

    Yields:
        Path of the file, and the file, open for writing.

    Raises:
        OSError: The file cannot be created.
    """
    _remove_stale(parent, _PART)
    owner = os.getpid()
    path, file = _create_file(parent, mode)
    with file:
        try:
            yield path, file
        finally:
            if os.getpid() == owner:
                with suppress(OSError):
                    path.unlink()


# -- creating -----------------------------------------------------------------------------------


def _create_folder(parent: Path, form: str) -> tuple[Path, int]:
    """A new folder, and the descriptor that holds its lock.

    Args:
        parent: Folder to create it in.
        form: Form of its name: ``_SCRATCH`` or ``_PART``.
    """
    while True:
        path = _new_name(parent, form)
        path.mkdir(0o700)
        lock = None
        try:
            with suppress(FileNotFoundError):
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _OPEN_FLAGS)
                if _is_locked(lock, path):
                    return path, lock
        except BaseException:
            if lock is not None:
                os.close(lock)
            _remove_empty(path)
            raise
        # another process removed it as stale before it was locked: try again with another name
        if lock is not None:
            os.close(lock)
        _remove_empty(path)


def _create_file(parent: Path, mode: int) -> tuple[Path, IO[bytes]]:
    """A new file, open for writing. The open file holds its lock."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | _OPEN_FLAGS, mode)

    while True:
        path, file = _new_name(parent, _PART), None
        try:
            # The file object owns the descriptor from the start. With two owners, an interrupt
            # could make both close it, and the second close may hit a file of another thread.
            file = open(path, "xb", opener=opener)  # noqa: SIM115 - the caller closes it
            if _is_locked(file.fileno(), path):
                return path, file
        except BaseException:
            if file is not None:
                file.close()
            path.unlink(missing_ok=True)
            raise
        file.close()
        path.unlink(missing_ok=True)


def _new_name(parent: Path, form: str) -> Path:
    return parent / form.format(secrets.token_hex(8))


def _is_locked(handle: int, path: Path) -> bool:
    """Lock a folder or file that was just created.

    Returns:
        False if another process took it for stale before.

    Raises:
        OSError: It cannot be locked, although the file system has locks.
    """
    # the other process may have unlinked it, and the name may be another file's by now
    with suppress(FileNotFoundError):
        return _try_lock(handle) and os.path.samestat(os.fstat(handle), path.lstat())
    return False


def _try_lock(handle: int) -> bool:
    """Lock a descriptor without waiting. True also if the file system has no locks."""
    # waiting could take long: a fork of a process that removes stale names may hold the lock
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
    """Remove a folder that was just created. Needs no descriptor, as there may be none left."""
    with suppress(OSError):
        path.rmdir()


def _remove_own(path: Path, lock: int, state: os.stat_result, owner: int) -> None:
    """Remove a temporary folder, unless a fork or the parent of this process still uses it.

    The last of these processes removes it, or the next process that creates a temporary folder.

    Args:
        path: The folder.
        lock: Descriptor that holds its lock.
        state: The ``stat`` result of the folder when it was created.
        owner: Id of the process that created it.
    """
    with suppress(OSError):
        # a daemon closes all descriptors, so the number may stand for another file by now
        if os.path.samestat(os.fstat(lock), state):
            os.close(lock)
    try:
        _remove_if_unlocked(str(path))
    except BlockingIOError:  # another process still uses it
        return
    except OSError:  # the file system has no locks, or there are no descriptors left
        pass
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def _remove_stale(parent: Path, form: str) -> None:
    """Remove stale folders and files, as far as this process may.

    Args:
        parent: Folder that contains them.
        form: Form of their names: ``_SCRATCH`` or ``_PART``.
    """
    pattern = re.compile(re.escape(form).replace(r"\{\}", _KEY_PATTERN))
    try:
        with os.scandir(parent) as entries:
            paths = [entry.path for entry in entries if pattern.fullmatch(entry.name)]
    except OSError:  # creating the new folder or file will raise the reason
        return
    for path in paths:
        with suppress(OSError):
            _remove_if_unlocked(path)


def _remove_if_unlocked(path: str) -> None:
    """Remove a folder or file that no process has locked.

    Raises:
        BlockingIOError: A process has locked it.
        OSError: It cannot be opened or locked.
    """
    handle = _open_to_lock(path)
    try:
        state = os.fstat(handle)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISREG(state.st_mode):
            Path(path).unlink()
        elif stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid():
            _restore_set_aside(Path(path))
            shutil.rmtree(path, ignore_errors=True)
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough if a fork has it open, too
    finally:
        os.close(handle)


def _restore_set_aside(part: Path) -> None:
    """Move a folder that was set aside in a part folder back to its place.

    Raises:
        OSError: It cannot be moved. The caller must then keep the part folder.
    """
    aside = part / _ASIDE
    for old in aside.iterdir() if aside.is_dir() else ():
        if not os.path.lexists(part.parent / old.name):
            old.rename(part.parent / old.name)


def _open_to_lock(path: str) -> int:
    """Descriptor of a folder or file, for locking it."""
    flags = _OPEN_FLAGS | os.O_NONBLOCK  # does not wait if it is a pipe
    # NFS locks only files that are open for writing; folders can be opened for reading only
    with suppress(IsADirectoryError, PermissionError):
        return os.open(path, os.O_RDWR | flags)
    return os.open(path, os.O_RDONLY | flags)
