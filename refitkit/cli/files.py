"""Files that commands read and write, checked before anything that takes long."""

from __future__ import annotations

import logging
import os
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import click

from refitkit.errors import (
    ConfigError,
    PlanMismatchError,
    RefitError,
    ResourceError,
    SourceError,
    UnsupportedTargetError,
    raise_if_resource,
    refused,
)
from refitkit.files.file_state import stat_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch.export import ExportedProgram

    from refitkit.pipeline import Pipeline
    from refitkit.recipe import RefitPlan

    Inputs = tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]

_PROGRAM_MEMBERS = {"archive_format", "serialized_exported_program.json"}
_EXPORT_HINT = "Write it with torch.export.save(torch.export.export(model, inputs), path)."


def check_readable(name: str | Path, error: type[RefitError]) -> None:
    """Check what no plugin should have to: that what is there may be read, and has an end.

    A name of nothing that is there passes: it may be a plugin's own.

    Raises:
        RefitError: Of the type ``error``, if not.
    """
    path = Path(name)
    if stat_of(path) is None:
        return
    if not path.is_file() and not path.is_dir():
        raise error(f"{str(path)!r} is a device or a pipe, not a file.")
    if not os.access(path, os.R_OK):
        raise error(f"{str(path)!r} cannot be read: permission denied.")


def check_output(path: Path, *inputs: str | Path | None, folders: bool = False) -> None:
    """Check that a file can be written here, before the work whose result it is to hold.

    Args:
        path: What is to be written; a file of this name is replaced.
        *inputs: Files that are read, and that must not be replaced.
        folders: Whether a folder may be there; see ``check_module_folder``.

    Raises:
        RefitError: The folder is missing or cannot be written to, or the name is taken by
            something that is not a file, or protected.
        click.UsageError: It is one of the inputs.
    """
    what = f"{str(path)!r} cannot be written"
    folder = path.parent
    if path.exists() and not path.is_file() and not (folders and path.is_dir()):
        raise RefitError(f"{what}: it is a folder or a device.", hint="Name a file.")
    if not folder.is_dir():
        raise RefitError(f"{what}: there is no folder {str(folder)!r}.", hint="Make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        _try(folder, what)  # which says why not
        raise RefitError(f"{what}: its folder is not yours to write to.")
    if path.exists() and not os.access(path, os.W_OK):
        raise RefitError(f"{what}: it is write-protected.", hint="Write to another file.")
    _try(folder, what)
    for other in inputs:
        if other is not None and path.exists() and Path(other).exists() and path.samefile(other):
            raise click.UsageError(f"{str(path)!r} is read by this command: write to another file.")


def _try(folder: Path, what: str) -> None:
    """Make a file that has no name: the rights of a folder do not say all, of /proc for one."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as exc:
        raise refused(exc, f"{what}: no file can be made in {str(folder)!r}") from exc


def check_module_folder(pipeline: Pipeline, path: Path) -> None:
    """Check that a folder, if there is one, is a saved module, which may be replaced.

    Raises:
        RefitError: It holds something else.
    """
    if not path.is_dir():
        return
    try:
        pipeline.describe(path)
    except ResourceError:
        raise
    except RefitError as exc:
        message = f"{str(path)!r} cannot be written: it is a folder that holds no saved module."
        raise RefitError(message, hint="Name a file, or a folder that is not there.") from exc


def bytes_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def load_program(path: Path, *, verbose: bool = False) -> ExportedProgram:
    """A program that ``torch.export.save`` wrote. This can run code from the file.

    Args:
        path: The file.
        verbose: Whether torch may log the traceback of a failure.

    Raises:
        UnsupportedTargetError: It is missing, or holds no program that can be loaded.
    """
    check_readable(path, UnsupportedTargetError)
    if path.is_dir():
        message = f"{str(path)!r} is a folder, not the file of a program."
        raise UnsupportedTargetError(message, hint=_EXPORT_HINT)
    if not path.is_file():
        raise UnsupportedTargetError(f"There is no file {str(path)!r}.")
    if not _looks_like_program(path):
        raise UnsupportedTargetError(
            f"{str(path)!r} holds no program, or is damaged.", hint=_EXPORT_HINT
        )
    import torch

    try:
        # as a stream: the name of a path would have to end in .pt2
        with path.open("rb") as file, _muted(not verbose):
            return torch.export.load(file)
    except Exception as exc:
        raise_if_resource(exc, f"{str(path)!r} cannot be read")
        message = f"The program in {str(path)!r} cannot be loaded: {type(exc).__name__}: {exc}"
        hint = f"With -v torch's own log says more. {_EXPORT_HINT}"
        raise UnsupportedTargetError(message, hint=hint) from exc


def load_plan(pipeline: Pipeline, path: Path | None) -> RefitPlan | None:
    """The plan in a plan file or a saved module. Runs nothing.

    Raises:
        PlanMismatchError: It is missing, not a plan, or damaged.
    """
    if path is None:
        return None
    check_readable(path, PlanMismatchError)
    return pipeline.read_plan(path)


def load_inputs(pipeline: Pipeline, path: Path | None) -> Inputs | None:
    """Inputs from a file of tensors: ``0``, ``1``, ... are positional, other names keyword ones.

    Raises:
        SourceError: The file cannot be read.
        ConfigError: It is empty, positions are missing, or inputs are nested.
    """
    if path is None:
        return None
    check_readable(path, SourceError)
    source = pipeline.open_weights(path)
    if not source.names():
        raise ConfigError(f"{str(path)!r} holds no inputs.")
    positions = sorted(int(name) for name in source.names() if _is_position(name))
    if positions != list(range(len(positions))):
        raise ConfigError(f"Positional inputs are to be 0, 1, ... without gaps, not {positions}.")
    keywords = [name for name in source.names() if not _is_position(name)]
    if dotted := [name for name in keywords if "." in name]:
        raise ConfigError(f"Inputs are to be tensors, not mappings of them: {dotted}.")
    args = tuple(source.get(str(position)) for position in positions)
    return args, {name: source.get(name) for name in keywords}


def _is_position(name: str) -> bool:
    return name.isascii() and name.isdecimal() and name == str(int(name))


def _looks_like_program(path: Path) -> bool:
    """Whether it is an archive with a member that every program has, of old or new format."""
    try:
        with zipfile.ZipFile(path) as archive:
            return bool({PurePath(name).name for name in archive.namelist()} & _PROGRAM_MEMBERS)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as exc:
        raise_if_resource(exc, f"{str(path)!r} cannot be read")
        return False


@contextmanager
def _muted(mute: bool) -> Iterator[None]:  # noqa: FBT001
    """Keep torch from logging the traceback of a failure that is about to be told in words."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL if mute else before)
    try:
        yield
    finally:
        logging.disable(before)
