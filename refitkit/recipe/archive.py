"""The container of all files that refitkit writes: a zip archive of uncompressed members.

Plain ``unzip`` shows what is inside. Members are never unpacked to a place that the archive names:
a reader asks for the members that it knows, by name, and says where they go. Sizes are checked
against the file's before anything is read, and CRCs while it is read.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import struct
import zipfile
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Self

from refitkit.errors import RefitError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

_FIXED_DATE = (1980, 1, 1, 0, 0, 0)  # the same content gives the same bytes
_CHUNK = 1 << 22
_UNREADABLE = (
    OSError,
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    ValueError,
    OverflowError,
    struct.error,
)
"""What ``zipfile`` raises for files that are no archives, or damaged ones."""


class ArchiveError(Exception):
    """The file is not an archive of ours, or is broken. Readers turn it into a typed error."""


class Archive:
    """An archive open for reading."""

    def __init__(self, file: Path | IO[bytes]) -> None:
        """Open and check the directory of members.

        Raises:
            ArchiveError: Not a zip archive, truncated, or with compressed or repeated members.
        """
        try:
            self._zip = zipfile.ZipFile(file)
        except _UNREADABLE as exc:
            raise ArchiveError(f"not a readable archive: {exc}") from exc
        self._members = {info.filename: info for info in self._zip.infolist()}
        if len(self._members) != len(self._zip.infolist()):
            self._zip.close()
            raise ArchiveError("two members have the same name")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._zip.close()

    def names(self) -> Iterable[str]:
        """Names of all members, as the file has them: do not use them as paths."""
        return self._members.keys()

    def size(self, name: str) -> int:
        """Bytes of a member.

        Raises:
            ArchiveError: There is none of this name, or it is compressed.
        """
        return self._member(name).file_size

    def read(self, name: str, limit: int) -> bytes:
        """A whole member.

        Raises:
            ArchiveError: There is none, it is compressed, larger than ``limit``, or damaged.
        """
        info = self._member(name)
        if info.file_size > limit:
            raise ArchiveError(f"member {name!r} has {info.file_size} bytes, at most {limit} fit")
        try:
            return self._zip.read(info)
        except _UNREADABLE as exc:
            raise ArchiveError(f"member {name!r} is damaged: {exc}") from exc

    def extract(self, name: str, to: Path) -> None:
        """Write a member to a file that the caller names.

        Raises:
            ArchiveError: As ``read``.
        """
        info = self._member(name)
        try:
            with self._zip.open(info) as source, to.open("wb") as target:
                shutil.copyfileobj(source, target, _CHUNK)
        except _UNREADABLE as exc:
            raise ArchiveError(f"member {name!r} is damaged: {exc}") from exc

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self._members:
            raise ArchiveError(f"it has no member {name!r}")
        info = self._members[name]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ArchiveError(f"member {name!r} is compressed")
        return info


def write_archive(file: IO[bytes], members: Mapping[str, bytes | Path]) -> None:
    """Write an archive: members as bytes, or as files to copy in."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name, _FIXED_DATE)
            if isinstance(content, bytes):
                archive.writestr(info, content)
                continue
            info.file_size = content.stat().st_size
            with content.open("rb") as source, archive.open(info, "w") as target:
                shutil.copyfileobj(source, target, _CHUNK)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that replaces ``path`` once it is whole and on disk.

    It lies beside ``path`` under another name until then, so a crash leaves the old file or the
    new one, never a mixture.

    Raises:
        OSError: It cannot be written; ``saying_why`` makes a typed error of it.
    """
    if path.is_dir():  # told before the work, and not when it is done
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def saying_why(path: Path) -> Iterator[None]:
    """Turn the errors of writing a file into a typed one about the path that the user gave.

    Raises:
        RefitError: It cannot be written; says why, and what to do.
    """
    if not path.name or "\0" in str(path):
        raise RefitError(f"{str(path)!r} cannot be written: it is no name of a file.")
    try:
        yield
    except OSError as exc:
        why, hint = _why(path, exc)
        raise RefitError(f"{str(path)!r} cannot be written: {why}.", hint=hint) from exc


def _why(path: Path, exc: OSError) -> tuple[str, str]:
    """What keeps a file from being written, and what to do."""
    if isinstance(exc, IsADirectoryError):
        return "it is a folder", "Name a file."
    if isinstance(exc, FileNotFoundError | NotADirectoryError):
        if not path.parent.is_dir():
            return f"there is no folder {str(path.parent)!r}", "Make it first."
        return f"no file can be made in {str(path.parent)!r}", "Write to another folder."
    if isinstance(exc, PermissionError):
        return "its folder is not yours to write to", "Write to another folder."
    return exc.strerror or str(exc) or type(exc).__name__, ""


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
