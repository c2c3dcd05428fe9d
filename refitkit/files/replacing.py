"""Files and folders that take the place of others once they are whole and on disk.

Until then they lie beside the others under another name (``temporary``), so a crash leaves the old
one or the new one, never a mixture. Links are followed. What replaces another has the rights of it:
its owner and group as far as this process may set them, its mode and access list, and never more.
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


_NEW, _PRIVATE = 0o666, 0o600  # rights of a new file, less the umask; of one until it is whole
_ALL = stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO | stat.S_ISVTX
_ACCESS = "system.posix_acl_access"  # acl(5)
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: linux/fcntl.h, linux/fs.h


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that replaces ``path``.

    Raises:
        OSError: It cannot be written; ``saying_why`` makes a typed error of it.
        RefitError: There is something that is no file, such as a device.
    """
    path = followed(path)
    before = _state_of(path)
    with (
        _opened_to_sync(path.parent) as folder,
        part_file(path.parent, _NEW if before is None else _PRIVATE) as (beside, file),
    ):
        yield file
        file.flush()
        if before is not None:
            _keep_rights(file.fileno(), path, before)
        os.fsync(file.fileno())
        beside.replace(path)
        _sync_folder(folder)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that replaces ``path`` with all that is in it.

    Two folders are exchanged in one step where the file system can do that. Elsewhere a crash can
    come after the old one was set aside; it is put back when something is next made beside it.

    Raises:
        OSError: It cannot be written; ``saying_why`` makes a typed error of it.
    """
    path = followed(path)
    with _opened_to_sync(path.parent) as above, part_folder(path.parent) as aside:
        new = aside / path.name
        new.mkdir()
        yield new
        with _opened_to_sync(new) as inside:
            for file in new.iterdir():
                _settle(file, path / file.name)
            _sync_folder(inside)
        if path.is_dir():
            _settle(new, path)
        _put(new, path, aside)
        _sync_folder(above)


def _settle(new: Path, old: Path) -> None:
    """Give something the rights of what it replaces, if there is any, and have it on disk."""
    handle = os.open(new, os.O_RDONLY)
    try:
        with suppress(FileNotFoundError):
            _keep_rights(handle, old, old.stat())
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(new: Path, path: Path, aside: Path) -> None:
    try:
        new.rename(path)  # over an empty folder, too
    except OSError as exc:
        if exc.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
    else:
        return
    if _are_exchanged(new, path):
        return
    set_aside(path, aside)
    new.rename(path)


def _are_exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where that cannot be done."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):  # glibc 2.28
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(libc.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0)


def followed(path: Path) -> Path:
    """Where a path leads when all links are followed."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _state_of(path: Path) -> os.stat_result | None:
    """The state of a file that is to be replaced, if there is one."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):  # raised before the work, and not when it is done
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        message = f"{str(path)!r} cannot be written: it is a device, a pipe or a socket."
        raise RefitError(message, hint="Name a file.")
    return found


def _keep_rights(handle: int, path: Path, before: os.stat_result) -> None:
    """Give an open file, or folder, the rights that another one has, and no more.

    Args:
        handle: The new one.
        path: The old one.
        before: The state of the old one.
    """
    mode = stat.S_IMODE(before.st_mode) & _ALL
    with suppress(OSError):
        os.fchown(handle, before.st_uid, -1)
    try:
        if os.fstat(handle).st_gid != before.st_gid:
            os.fchown(handle, -1, before.st_gid)
        os.fchmod(handle, mode)
        _copy_access_list(path, handle)
    except OSError:  # then the bits of the group would be those of others than before
        others = (mode & stat.S_IRWXO) << 3
        os.fchmod(handle, mode & ~stat.S_IRWXG | mode & others)


def _copy_access_list(path: Path, handle: int) -> None:
    try:
        found = os.getxattr(path, _ACCESS)
    except OSError:  # there is none, or the file system knows none
        return
    os.setxattr(handle, _ACCESS, found)


@contextmanager
def _opened_to_sync(folder: Path) -> Iterator[int | None]:
    """A folder, open for ``_sync_folder``: whether it can be is known before anything is written.

    Raises:
        OSError: There is no such folder.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # files can be made in it, and their names cannot be listed
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)


def _sync_folder(handle: int | None) -> None:
    """Have the names in a folder on disk; without a handle, all that was written anywhere."""
    if handle is None:
        os.sync()
        return
    try:
        os.fsync(handle)
    except OSError as exc:
        if exc.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
            raise
        os.sync()  # a file system that cannot sync a folder alone
