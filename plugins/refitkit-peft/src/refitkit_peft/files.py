"""Whether files are still those that were opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from refitkit.errors import Problem, SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

Identity: TypeAlias = tuple[int, int, int, int]
"""Device, inode, bytes, and time of the last change in nanoseconds."""

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".metadata", ".json")


def path_of(thing: object) -> Path | None:
    """The path of something that is there; None for all else, names that no file can have too."""
    if not isinstance(thing, str | Path):
        return None
    path = Path(thing)
    try:
        return path if path.exists() else None
    except (OSError, ValueError):
        return None


def files_of(path: Path) -> list[Path]:
    """The files that weights come from: one, or all that lie beside an index or in a folder."""
    folder = path if path.is_dir() else path.parent if path.name.endswith(".index.json") else None
    if folder is None:
        return [path]
    return sorted(one for one in folder.iterdir() if one.name.endswith(_SUFFIXES))


@dataclass(frozen=True)
class Files:
    """Files as they were.

    Attributes:
        identities: By path.
    """

    identities: dict[Path, Identity]

    @classmethod
    def at(cls, path: Path) -> Files:
        """Those that weights at a path come from, as they are now.

        Raises:
            SourceError: One cannot be looked at.
        """
        found = {}
        for file in files_of(path):
            identity = _identity(file)
            if identity is None:
                raise SourceError(f"{str(file)!r} cannot be looked at.")
            found[file] = identity
        return cls(found)

    def changed(self) -> Iterator[Problem]:
        """Files that are other ones now."""
        for file, before in self.identities.items():
            now = _identity(file)
            if now != before:
                what = "gone" if now is None else _difference(before, now)
                yield Problem(str(file), "changed since it was opened", what)


def _identity(path: Path) -> Identity | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _difference(before: Identity, now: Identity) -> str:
    if before[:2] != now[:2]:
        return "another file of this name"
    return "another size" if before[2] != now[2] else "written to"
