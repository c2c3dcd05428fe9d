"""The files of weights and adapters, and whether they changed since they were opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from refitkit.errors import Problem, SourceError, raise_if_resource
from refitkit.files.file_state import FileState, stat_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from refitkit.files.file_state import Difference

# Other files in the folder, such as logs, may change during a refit.
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".metadata", ".json")


def path_of(thing: object) -> Path | None:
    """The path of an existing file or folder; None for anything else, also for invalid names."""
    if not isinstance(thing, str | Path):
        return None
    path = Path(thing)
    return None if stat_of(path) is None else path


def files_of(path: Path) -> list[Path]:
    """The files of weights: one file, or all weight files in a folder or beside an index."""
    folder = path if path.is_dir() else path.parent if path.name.endswith(".index.json") else None
    if folder is None:
        return [path]
    return sorted(one for one in folder.iterdir() if one.name.endswith(_SUFFIXES))


_DIFFERENCES: dict[Difference, str] = {
    "links": "hard links were added or removed",
    "another file": "replaced by another file",
    "size": "changed in size",
    "written": "written to",
    "attributes": "written to and its time set back, or its permissions or owner changed",
}


@dataclass(frozen=True)
class FileSnapshot:
    """The state of some files at one time.

    Attributes:
        states: State of each file by path.
    """

    states: dict[Path, FileState]

    @classmethod
    def at(cls, path: Path) -> FileSnapshot:
        """The current state of all files of the weights at a path; see ``of``."""
        return cls.of(files_of(path))

    @classmethod
    def of(cls, files: Iterable[Path]) -> FileSnapshot:
        """The current state of files; any later write changes it.

        Raises:
            SourceError: The state of a file cannot be read.
        """
        found = {}
        for file in files:
            # FileState.settled waits until a later write would get another time stamp.
            try:
                found[file] = FileState.settled(file.stat)
            except OSError as exc:
                raise_if_resource(exc, f"The state of {str(file)!r} cannot be read")
                raise SourceError(f"The state of {str(file)!r} cannot be read: {exc}.") from exc
        return cls(found)

    def require_unchanged(self, what: str) -> None:
        """Check that no file changed since the snapshot.

        Args:
            what: Description of the weights, for the message.

        Raises:
            SourceError: Some files changed; lists all of them.
        """
        problems = list(self.changed())
        if problems:
            raise SourceError(
                f"{what} was changed while it was read.",
                problems=problems,
                hint="Write new files under other names, rename them when they are complete "
                "(os.replace), and refit again.",
            )

    def changed(self, *, links: bool = True) -> Iterator[Problem]:
        """A problem for each file that changed since the snapshot.

        Args:
            links: Whether a change of the number of hard links counts.
        """
        for file, before in self.states.items():
            try:
                how = before.difference(FileState.of(file.stat()))
            except OSError as exc:
                raise_if_resource(exc, f"The state of {str(file)!r} cannot be read")
                yield Problem(str(file), "changed since it was opened", "deleted")
                continue
            if how and (links or how != "links"):
                yield Problem(str(file), "changed since it was opened", _DIFFERENCES[how])
