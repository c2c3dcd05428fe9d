"""Replace files and folders atomically, when the new content is complete and on disk.

This module hides the order of writes, syncs and renames. New content is first written beside the
old one under a temporary name (:mod:`refitkit.files.temporary`). So a crash leaves the old content
or the new content, never a mixture. Links are followed. A new file gets the rights of the old one:
its mode, its access list, and its owner and group as far as this process may set them. It never
gets more rights.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from refitkit.errors import RefitError
from refitkit.files.temporary import part_file, part_folder, set_aside

if TYPE_CHECKING:
    from collections.abc import Iterator


_NEW_FILE_MODE = 0o666  # the umask applies
_PRIVATE_MODE = 0o600  # until the rights of the old file are copied
_MODE_BITS = stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO | stat.S_ISVTX
_ACCESS_LIST = "system.posix_acl_access"  # acl(5)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which replaces ``path`` at the end of the block.

    If the block raises, the old file is unchanged.

    Args:
        path: The file to replace, or to create. Its folder must exist.

    Raises:
        OSError: The file cannot be written. ``saying_why`` turns it into a typed error.
        RefitError: ``path`` is not a regular file, but a device, a pipe or a socket.
    """
    path = resolve_links(path)
    before = _stat_of_file(path)
    mode = _NEW_FILE_MODE if before is None else _PRIVATE_MODE
    with (
        _open_to_sync(path.parent) as folder,
        part_file(path.parent, mode) as (part, file),
    ):
        yield file
        file.flush()
        if before is not None:
            _copy_rights(file.fileno(), path, before)
        # content first, then the name: after a crash the name never stands for half a file
        os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(folder)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which replaces ``path`` and all files in it at the end of the block.

    If the file system supports it, the old and the new folder are exchanged in one step. If not,
    a crash can leave the old folder set aside. The next part file or folder that is created beside
    it moves it back.

    Args:
        path: The folder to replace, or to create. Its parent must exist.

    Raises:
        OSError: The folder cannot be written. ``saying_why`` turns it into a typed error.
    """
    path = resolve_links(path)
    with _open_to_sync(path.parent) as parent, part_folder(path.parent) as part:
        new = part / path.name
        new.mkdir()
        yield new
        with _open_to_sync(new) as folder:
            for file in new.iterdir():
                _copy_rights_and_sync(file, path / file.name)
            _sync_folder(folder)
        if path.is_dir():
            _copy_rights_and_sync(new, path)
        _move_into_place(new, path, part)
        _sync_folder(parent)


def resolve_links(path: Path) -> Path:
    """The path that a path leads to when all links are followed."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _stat_of_file(path: Path) -> os.stat_result | None:
    """The ``stat`` result of a file that will be replaced. None if there is none.

    Raises:
        IsADirectoryError: It is a folder. Without this check, the rename would raise it, after all
            content was written.
        RefitError: It is a device, a pipe or a socket.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        message = f"{str(path)!r} cannot be written: it is a device, a pipe or a socket."
        raise RefitError(message, hint="Name a file.")
    return found


def _copy_rights_and_sync(new: Path, old: Path) -> None:
    """Give a file or folder the rights of the one that it replaces, if any, and sync it."""
    handle = os.open(new, os.O_RDONLY)
    try:
        with suppress(FileNotFoundError):
            _copy_rights(handle, old, old.stat())
        os.fsync(handle)
    finally:
        os.close(handle)


def _move_into_place(new: Path, path: Path, part: Path) -> None:
    """Rename a folder over another one.

    Args:
        new: The new folder.
        path: The old folder, if there is one.
        part: The part folder, which may keep the old folder for a moment.
    """
    try:
        new.rename(path)  # works if there is none, or an empty one
    except OSError as exc:
        if exc.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
    else:
        return
    if _try_exchange(new, path):
        return
    set_aside(path, part)
    new.rename(path)


def _try_exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step. False if the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):  # before glibc 2.28
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _copy_rights(handle: int, path: Path, before: os.stat_result) -> None:
    """Give an open file or folder the rights of another one, and no more.

    Args:
        handle: Descriptor of the new file or folder.
        path: The old file or folder.
        before: The ``stat`` result of the old one.
    """
    mode = stat.S_IMODE(before.st_mode) & _MODE_BITS
    # the access list is copied last, because fchmod changes its mask (acl(5))
    with suppress(OSError):
        os.fchown(handle, before.st_uid, -1)
    try:
        if os.fstat(handle).st_gid != before.st_gid:
            os.fchown(handle, -1, before.st_gid)
        os.fchmod(handle, mode)
        _copy_access_list(path, handle)
    except OSError:
        # the file has another group now, which must not get the rights of the old group
        others = (mode & stat.S_IRWXO) << 3
        os.fchmod(handle, mode & ~stat.S_IRWXG | mode & others)


def _copy_access_list(path: Path, handle: int) -> None:
    try:
        access_list = os.getxattr(path, _ACCESS_LIST)
    except OSError:  # the file has none, or the file system supports none
        return
    os.setxattr(handle, _ACCESS_LIST, access_list)


@contextmanager
def _open_to_sync(folder: Path) -> Iterator[int | None]:
    """Descriptor of a folder, for ``_sync_folder``. None if the folder cannot be opened.

    It is opened before the work, so that a missing folder is reported before anything is written.

    Raises:
        OSError: The folder does not exist.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder that may be written to, but not listed
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)


def _sync_folder(handle: int | None) -> None:
    """Sync the names in a folder. Without a handle, sync all file systems."""
    if handle is None:
        os.sync()
        return
    try:
        os.fsync(handle)
    except OSError as exc:
        if exc.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
            raise
        os.sync()  # this file system cannot sync a single folder
