"""The container of all files that refitkit writes: a zip archive of uncompressed members.

Plain ``unzip`` shows what is inside. Members are never unpacked to a place that the archive names:
a reader asks for the members that it knows, by name, and says where they go. Sizes are checked
against the file's before anything is read, and CRCs while it is read.
"""

from __future__ import annotations

import shutil
import struct
import zipfile
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, NamedTuple, Self

from refitkit.errors import RefitError
from refitkit.replacing import followed

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

    @contextmanager
    def open(self, name: str) -> Iterator[MemberReader]:
        """A member, to be read from its beginning to its end.

        Raises:
            ArchiveError: There is none of this name, it is compressed, or damaged.
        """
        info = self._member(name)
        try:
            stream = self._zip.open(info)
        except _UNREADABLE as exc:
            raise ArchiveError(f"member {name!r} is damaged: {exc}") from exc
        with stream:
            yield MemberReader(name, stream)

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self._members:
            raise ArchiveError(f"it has no member {name!r}")
        info = self._members[name]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ArchiveError(f"member {name!r} is compressed")
        return info


class MemberReader:
    """A member of an archive, open for reading; see ``Archive.open``."""

    def __init__(self, name: str, stream: IO[bytes]) -> None:
        """Made by ``Archive.open``."""
        self._name, self._stream = name, stream

    def read(self, count: int = -1) -> bytes:
        """The next bytes; all that are left without a count.

        Raises:
            ArchiveError: The member is damaged, or has fewer bytes.
        """
        try:
            content = self._stream.read(count)
        except _UNREADABLE as exc:
            raise ArchiveError(f"member {self._name!r} is damaged: {exc}") from exc
        if len(content) < count:
            raise ArchiveError(f"member {self._name!r} is damaged: it ends too early")
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
        try:
            return self._stream.read(_CHUNK)
        except _UNREADABLE as exc:
            raise ArchiveError(f"member {self._name!r} is damaged: {exc}") from exc


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
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name, _FIXED_DATE)
            if isinstance(content, bytes):
                archive.writestr(info, content)
                continue
            if isinstance(content, Streamed):
                info.file_size = content.size
                with archive.open(info, "w") as target:
                    for chunk in content.chunks:
                        target.write(chunk)
                continue
            info.file_size = content.stat().st_size
            with content.open("rb") as source, archive.open(info, "w") as target:
                shutil.copyfileobj(source, target, _CHUNK)


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
        folder = followed(path).parent
        if not folder.is_dir():
            return f"there is no folder {str(folder)!r}", "Make it first."
        return f"no file can be made in {str(path.parent)!r}", "Write to another folder."
    if isinstance(exc, PermissionError):
        return "its folder is not yours to write to", "Write to another folder."
    return exc.strerror or str(exc) or type(exc).__name__, ""
