"""The file or folder that a module was loaded from: its first weights, for as long as it is there.

A second module is opened from it when they are wanted, so that nothing has to be kept in memory.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from refitkit.errors import NotRefittableError, Problem, raise_if_resource, resources
from refitkit.files.file_state import FileState

Mark: TypeAlias = tuple[str, FileState]
"""Name below the path, and what the file was."""


@dataclass(frozen=True)
class LoadOrigin:
    """A path, and what lay there when the module was loaded.

    Attributes:
        path: It.
        marks: Of the file, or of all files in the folder.
    """

    path: Path
    marks: tuple[Mark, ...]

    @classmethod
    def of(cls, target: object) -> LoadOrigin | None:
        """Note what lies at a path; None where a target is none."""
        if not isinstance(target, str | Path):
            return None
        try:
            path = Path(target).absolute()
            return cls(path, _marks(path)) if path.exists() else None
        except (OSError, ValueError) as exc:  # a name of a plugin's own, which no file can have
            raise_if_resource(exc, f"{str(target)!r} cannot be read")
            return None

    def is_unchanged(self) -> bool:
        """Whether what lies there is what lay there."""
        try:
            return _marks(self.path) == self.marks
        except OSError:
            return False

    def require_unchanged(self) -> None:
        """Check that what lies there is what lay there.

        Raises:
            NotRefittableError: It is not; names the path.
            ResourceError: The system does not let it be looked at.
        """
        with suppress(OSError), resources(f"{str(self.path)!r} cannot be read"):
            _marks(self.path)
        if not self.is_unchanged():
            raise NotRefittableError(
                "The weights that the module was loaded with are not held any more.",
                problems=[Problem(str(self.path), "changed since the module was loaded")],
                hint="compiled.base names weights that restore() reads instead.",
            )


def _marks(path: Path) -> tuple[Mark, ...]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return tuple(_mark(path, file) for file in files if file.is_file())


def _mark(path: Path, file: Path) -> Mark:
    return str(file.relative_to(path)), FileState.settled(file.stat)
