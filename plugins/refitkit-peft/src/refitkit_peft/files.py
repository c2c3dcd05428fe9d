"""Whether files are still those that were opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from refitkit.errors import Problem, SourceError, raise_if_resource
from refitkit.files.file_state import FileState, stat_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from refitkit.files.file_state import Difference

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".metadata", ".json")


def path_of(thing: object) -> Path | None:
    """The path of something that is there; None for all else, names that no file can have too."""
    if not isinstance(thing, str | Path):
        return None
    path = Path(thing)
    return None if stat_of(path) is None else path


def files_of(path: Path) -> list[Path]:
    """The files that weights come from: one, or all that lie beside an index or in a folder."""
    folder = path if path.is_dir() else path.parent if path.name.endswith(".index.json") else None
    if folder is None:
        return [path]
    return sorted(one for one in folder.iterdir() if one.name.endswith(_SUFFIXES))


_SHOWN: dict[Difference, str] = {
    "links": "names of it were added or removed",
    "another file": "another file of this name",
    "size": "another size",
    "written": "written to",
    "attributes": "written to and its time set back, or its rights or owner changed",
}


@dataclass(frozen=True)
class Files:
    """Files as they were.

    Attributes:
        states: By path.
    """

    states: dict[Path, FileState]

    @classmethod
    def at(cls, path: Path) -> Files:
        """Those that weights at a path come from, as they are now; see ``of``."""
        return cls.of(files_of(path))

    @classmethod
    def of(cls, files: Iterable[Path]) -> Files:
        """Files as they are now: a later write is sure to be seen.

        Raises:
            SourceError: One cannot be looked at.
        """
        found = {}
        for file in files:
            try:
                found[file] = FileState.settled(file.stat)
            except OSError as exc:
                raise_if_resource(exc, f"{str(file)!r} cannot be looked at")
                raise SourceError(f"{str(file)!r} cannot be looked at: {exc}.") from exc
        return cls(found)

    def require_unchanged(self, what: str) -> None:
        """Check that all files are what they were.

        Args:
            what: What was read from them, for the message.

        Raises:
            SourceError: They are not; lists all of them.
        """
        problems = list(self.changed())
        if problems:
            raise SourceError(
                f"{what} was changed while it was read.",
                problems=problems,
                hint="Write new files beside it and rename them when they are complete "
                "(os.replace), then refit again.",
            )

    def changed(self, *, links: bool = True) -> Iterator[Problem]:
        """Files that are other ones now.

        Args:
            links: Whether a file that has more or fewer names than before is one of them.
        """
        for file, before in self.states.items():
            try:
                how = before.difference(FileState.of(file.stat()))
            except OSError as exc:
                raise_if_resource(exc, f"{str(file)!r} cannot be looked at")
                yield Problem(str(file), "changed since it was opened", "gone")
                continue
            if how and (links or how != "links"):
                yield Problem(str(file), "changed since it was opened", _SHOWN[how])
