"""Archives: the container of all files that refitkit writes, a zip file of uncompressed members.

This module hides how the container is laid out, and which errors ``zipfile`` raises. Any ``unzip``
lists and unpacks it. ``Archive`` reads one. It never unpacks a member to a path that the archive
names: readers ask for the members that they know, by name, and choose the paths. Sizes are checked
against the file's size before a member is read, and CRCs while it is read. ``write_archive`` writes
one, and ``saying_why`` turns errors of writing any file into typed ones.
"""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, Self

from refitkit.errors import RefitError, ResourceError, raise_if_resource, refused, resources
from refitkit.files.replacing import resolve_links

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from types import TracebackType


_FIXED_DATE = (1980, 1, 1, 0, 0, 0)  # so that equal content gives equal bytes
_CHUNK = 1 << 22
_CANNOT_READ = "An archive cannot be read"
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
"""Raised by ``zipfile`` for files that are not archives, and for damaged ones."""


class ArchiveError(Exception):
    """The file is not an archive of refitkit, or is damaged. Readers turn it into a typed error."""


class Archive:
    """An archive that is open for reading.

    All methods raise a ``ResourceError`` if the system does not let the file be read.
    """

    def __init__(self, file: Path | IO[bytes]) -> None:
        """Open a file and check its directory of members.

        Args:
            file: Path of the archive, or a file that is open for reading and can seek.

        Raises:
            ArchiveError: The file is not a zip file, is truncated, or repeats a member.
        """
        is_path = isinstance(file, Path)
        self._cannot_read = f"{str(file)!r} cannot be read" if is_path else _CANNOT_READ
        try:
            self._zip = zipfile.ZipFile(file)
        except _UNREADABLE as exc:
            raise_if_resource(exc, self._cannot_read)
            raise ArchiveError(f"not a readable archive: {exc}") from exc
        # of several members with one name, zipfile takes the last; other tools may take another
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
        """Names of all members, as the file spells them. Do not use them as paths."""
        return self._members.keys()

    def size(self, name: str) -> int:
        """Size of a member in bytes.

        Raises:
            ArchiveError: There is no member of this name, or it is compressed.
        """
        return self._member(name).file_size

    def read(self, name: str, limit: int) -> bytes:
        """The content of a member.

        Args:
            name: Name of the member.
            limit: Largest size in bytes.

        Raises:
            ArchiveError: There is no member of this name, or it is compressed, larger than
                ``limit``, or damaged.
        """
        info = self._member(name)
        if info.file_size > limit:
            raise ArchiveError(f"member {name!r} has {info.file_size} bytes, at most {limit} fit")
        with self._reading(name):
            return self._zip.read(info)

    def extract(self, name: str, to: Path) -> None:
        """Write a member to a file.

        Args:
            name: Name of the member.
            to: Path of the file to write.

        Raises:
            ArchiveError: There is no member of this name, or it is compressed or damaged.
            ResourceError: The file cannot be written.
        """
        with self.open(name) as member:
            try:
                with to.open("wb") as target:
                    member.copy(target)
            except OSError as exc:
                raise refused(exc, f"{str(to)!r} cannot be written") from exc

    @contextmanager
    def open(self, name: str) -> Iterator[MemberReader]:
        """A reader of a member, from its beginning to its end.

        Raises:
            ArchiveError: There is no member of this name, or it is compressed or damaged.
        """
        info = self._member(name)
        with self._reading(name):
            stream = self._zip.open(info)
        with stream:
            yield MemberReader(stream, lambda: self._reading(name))

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Turn exceptions inside into typed ones: the member is damaged, or the system refused."""
        try:
            yield
        except _UNREADABLE as exc:
            raise_if_resource(exc, self._cannot_read)
            raise ArchiveError(f"member {name!r} is damaged: {exc}") from exc

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self._members:
            raise ArchiveError(f"it has no member {name!r}")
        info = self._members[name]
        # a compressed member could expand to any size, even in a small file
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ArchiveError(f"member {name!r} is compressed")
        return info


class MemberReader:
    """Reads a member of an archive. Get it from ``Archive.open``."""

    def __init__(
        self, stream: IO[bytes], reading: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Wrap a stream. ``Archive.open`` calls this.

        Args:
            stream: Content of the member.
            reading: Returns a context manager that turns exceptions into typed ones.
        """
        self._stream, self._reading = stream, reading

    def read(self, count: int = -1) -> bytes:
        """The next bytes.

        Args:
            count: Number of bytes. -1 returns all that are left.

        Raises:
            ArchiveError: The member is damaged, or has fewer bytes.
        """
        with self._reading():
            content = self._stream.read(count)
            if len(content) < count:
                raise EOFError("it ends too early")
        return content

    def fill(self, buffer: memoryview) -> None:
        """Fill a buffer with the next bytes.

        Raises:
            ArchiveError: The member is damaged, or has fewer bytes.
        """
        while buffer:
            content = self.read(min(len(buffer), _CHUNK))
            buffer[: len(content)] = content
            buffer = buffer[len(content) :]

    def copy(self, to: IO[bytes]) -> None:
        """Write all bytes that are left to a file.

        Raises:
            ArchiveError: The member is damaged.
            OSError: The file cannot be written.
        """
        while content := self._chunk():
            to.write(content)

    def _chunk(self) -> bytes:
        with self._reading():
            return self._stream.read(_CHUNK)


class Streamed(NamedTuple):
    """The content of a member that is produced while it is written.

    Attributes:
        size: Size of all chunks together, in bytes.
        chunks: The content, in order. It is iterated once.
    """

    size: int
    chunks: Iterable[bytes | memoryview]


def write_archive(file: IO[bytes], members: Mapping[str, bytes | Path | Streamed]) -> None:
    """Write an archive.

    Args:
        file: A file that is open for writing.
        members: Content by name: bytes, the path of a file to copy, or chunks.
    """
    archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
    try:
        for name, content in members.items():
            _write_member(archive, zipfile.ZipInfo(name, _FIXED_DATE), content)
    except BaseException:
        # without a file, closing does nothing; it would write the directory of the broken archive,
        # and an error of that would hide this one
        archive.fp = None
        raise
    archive.close()


def _write_member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, content: bytes | Path | Streamed
) -> None:
    if isinstance(content, bytes):
        archive.writestr(info, content)
        return
    if isinstance(content, Streamed):
        # zipfile needs the size to decide whether the header has 64-bit fields
        info.file_size = content.size
        with archive.open(info, "w") as target:
            for chunk in content.chunks:
                target.write(chunk)
        return
    info.file_size = content.stat().st_size
    with content.open("rb") as source, archive.open(info, "w") as target:
        shutil.copyfileobj(source, target, _CHUNK)


@contextmanager
def saying_why(path: Path) -> Iterator[None]:
    """Turn errors of writing a file into typed ones that name the path that the user passed.

    Args:
        path: The file, as the user passed it.

    Raises:
        ResourceError: The system does not let the file be written. The error gives the reason and
            a hint.
        RefitError: No file can have this path.
    """
    what = f"{str(path)!r} cannot be written"
    if not path.name or "\0" in str(path):
        raise RefitError(f"{what}: it is not a file name.")
    with resources(what):
        try:
            yield
        except OSError as exc:
            raise _unwritable(path, exc, what) from exc


def _unwritable(path: Path, exc: OSError, what: str) -> RefitError:
    """The typed error for an exception of the system."""
    if isinstance(exc, IsADirectoryError):
        return RefitError(f"{what}: it is a folder.", hint="Name a file.")
    is_missing = isinstance(exc, FileNotFoundError | NotADirectoryError)
    if is_missing and not (folder := resolve_links(path).parent).is_dir():
        message = f"{what}: there is no folder {str(folder)!r}."
        return RefitError(message, hint="Make it first.")
    # other errors are about files that are read meanwhile, and their message names those
    if _concerns_target(path, exc.filename):
        hint = "Write to another folder."
        if is_missing:
            return RefitError(f"{what}: no file can be created in {str(path.parent)!r}.", hint=hint)
        if isinstance(exc, PermissionError):
            why = f"{exc.strerror}: its folder is not yours to write to"
            return ResourceError(f"{what}: {why}.", hint=hint)
    return refused(exc, what)


def _concerns_target(path: Path, name: str | None) -> bool:
    """Whether an error is about the file to write, its temporary file, or its folder.

    Args:
        path: The file to write.
        name: Path in the error, if it has one.
    """
    if name is None:
        return True
    folder, subject = Path(os.path.realpath(path)).parent, Path(os.path.realpath(name))
    # the subject may lie in a part folder, as the files of a new folder do
    in_folder = [one for one in (subject, *subject.parents) if one.parent == folder]
    is_temporary = any(one.suffix == ".part" for one in in_folder)  # see refitkit.files.temporary
    return subject in {folder, folder / path.name} or is_temporary
