"""The container of all files that refitkit writes: a zip archive of uncompressed members.

Plain ``unzip`` shows what is inside. Members are never unpacked to a place that the archive names:
a reader asks for the members that it knows, by name, and says where they go. Sizes are checked
against the file's before anything is read, and CRCs while it is read.
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
from refitkit.files.replacing import followed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from types import TracebackType


_FIXED_DATE = (1980, 1, 1, 0, 0, 0)  # the same content gives the same bytes
_CHUNK = 1 << 22
_WHAT = "An archive cannot be read"
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
            ResourceError: The system does not let it be read; so do all methods.
        """
        self._what = f"{str(file)!r} cannot be read" if isinstance(file, Path) else _WHAT
        try:
            self._zip = zipfile.ZipFile(file)
        except _UNREADABLE as exc:
            raise_if_resource(exc, self._what)
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
        with self._reading(name):
            return self._zip.read(info)

    def extract(self, name: str, to: Path) -> None:
        """Write a member to a file that the caller names.

        Raises:
            ArchiveError: As ``read``.
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
        """A member, to be read from its beginning to its end.

        Raises:
            ArchiveError: There is none of this name, it is compressed, or damaged.
        """
        info = self._member(name)
        with self._reading(name):
            stream = self._zip.open(info)
        with stream:
            yield MemberReader(stream, lambda: self._reading(name))

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Say of exceptions inside that a member is damaged, or that the system refused."""
        try:
            yield
        except _UNREADABLE as exc:
            raise_if_resource(exc, self._what)
            raise ArchiveError(f"member {name!r} is damaged: {exc}") from exc

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self._members:
            raise ArchiveError(f"it has no member {name!r}")
        info = self._members[name]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ArchiveError(f"member {name!r} is compressed")
        return info


class MemberReader:
    """A member of an archive, open for reading; see ``Archive.open``."""

    def __init__(
        self, stream: IO[bytes], reading: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Made by ``Archive.open``."""
        self._stream, self._reading = stream, reading

    def read(self, count: int = -1) -> bytes:
        """The next bytes; all that are left without a count.

        Raises:
            ArchiveError: The member is damaged, or has fewer bytes.
        """
        with self._reading():
            content = self._stream.read(count)
            if len(content) < count:
                raise EOFError("it ends too early")
        return content

    def fill(self, buffer: memoryview) -> None:
        """Write the next bytes into a buffer, as many as it holds.

        Raises:
            ArchiveError: The member is damaged, or has fewer bytes.
        """
        while buffer:
            content = self.read(min(len(buffer), _CHUNK))
            buffer[: len(content)] = content
            buffer = buffer[len(content) :]

    def copy(self, to: IO[bytes]) -> None:
        """Write all that is left to a file.

        Raises:
            ArchiveError: The member is damaged.
            OSError: The file cannot be written.
        """
        while content := self._some():
            to.write(content)

    def _some(self) -> bytes:
        with self._reading():
            return self._stream.read(_CHUNK)


class Streamed(NamedTuple):
    """The content of a member that is made while it is written.

    Attributes:
        size: Bytes of all chunks together.
        chunks: The content, in order. It can be taken once.
    """

    size: int
    chunks: Iterable[bytes | memoryview]


def write_archive(file: IO[bytes], members: Mapping[str, bytes | Path | Streamed]) -> None:
    """Write an archive: members as bytes, as files to copy in, or made on the way."""
    archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
    try:
        for name, content in members.items():
            _write_member(archive, zipfile.ZipInfo(name, _FIXED_DATE), content)
    except BaseException:
        archive.fp = None  # else it is completed when it is closed; what fails then would hide this
        raise
    archive.close()


def _write_member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, content: bytes | Path | Streamed
) -> None:
    if isinstance(content, bytes):
        archive.writestr(info, content)
        return
    if isinstance(content, Streamed):
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
    """Turn the errors of writing a file into a typed one about the path that the user gave.

    Raises:
        ResourceError: The system does not let it be written; says why, and what to do.
        RefitError: There can be no file of this name.
    """
    what = f"{str(path)!r} cannot be written"
    if not path.name or "\0" in str(path):
        raise RefitError(f"{what}: it is no name of a file.")
    with resources(what):
        try:
            yield
        except OSError as exc:
            raise _unwritable(path, exc, what) from exc


def _is_beside(path: Path, name: str | None) -> bool:
    """Whether an error is of writing a file, and not of reading what goes into it."""
    if name is None:
        return True
    folder, about = Path(os.path.realpath(path)).parent, Path(os.path.realpath(name))
    parts = [one for one in (about, *about.parents) if one.parent == folder]
    return about in {folder, folder / path.name} or any(one.suffix == ".part" for one in parts)


def _unwritable(path: Path, exc: OSError, what: str) -> RefitError:
    """The error for an exception of the system; names what it is about."""
    if isinstance(exc, IsADirectoryError):
        return RefitError(f"{what}: it is a folder.", hint="Name a file.")
    is_missing = isinstance(exc, FileNotFoundError | NotADirectoryError)
    if is_missing and not (folder := followed(path).parent).is_dir():
        message = f"{what}: there is no folder {str(folder)!r}."
        return RefitError(message, hint="Make it first.")
    if _is_beside(path, exc.filename):
        hint = "Write to another folder."
        if is_missing:
            return RefitError(f"{what}: no file can be made in {str(path.parent)!r}.", hint=hint)
        if isinstance(exc, PermissionError):
            why = f"{exc.strerror}: its folder is not yours to write to"
            return ResourceError(f"{what}: {why}.", hint=hint)
    return refused(exc, what)
