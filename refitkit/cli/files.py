"""Check and load the files that commands read and write.

The ``check_`` functions run before torch is imported and before any long work, so that a wrong path
fails at once. The ``load_`` functions turn files into programs, plans and inputs.
"""

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

# The first name is in archives of the present format of torch.export.save, the second in old ones.
_PROGRAM_MEMBERS = {"archive_format", "serialized_exported_program.json"}
_EXPORT_HINT = "Write it with torch.export.save(torch.export.export(model, inputs), path)."


def check_readable(name: str | Path, error: type[RefitError]) -> None:
    """Check that a path, if it exists, is a readable file or folder.

    A name that is not an existing path passes, because a plugin may know it.

    Raises:
        RefitError: The path is a device or a pipe, or cannot be read. The error is of type
            ``error``.
    """
    path = Path(name)
    if stat_of(path) is None:
        return
    if not path.is_file() and not path.is_dir():  # reading a pipe or /dev/zero may never end
        raise error(f"{str(path)!r} is a device or a pipe, not a file.")
    if not os.access(path, os.R_OK):
        raise error(f"{str(path)!r} cannot be read: permission denied.")


def check_output(path: Path, *inputs: str | Path | None, folders: bool = False) -> None:
    """Check that a result can be written to a path, before the work starts.

    Args:
        path: Path of the result; a file of this name is replaced.
        *inputs: Files that the command reads, and must not replace.
        folders: Whether the path may be an existing folder; see ``check_module_folder``.

    Raises:
        RefitError: The parent folder is missing or not writable, or the path exists and is not a
            writable file.
        click.UsageError: The path is one of the inputs.
    """
    what = f"{str(path)!r} cannot be written"
    folder = path.parent
    if path.exists() and not path.is_file() and not (folders and path.is_dir()):
        raise RefitError(f"{what}: it is a folder or a device.", hint="Name a file.")
    if not folder.is_dir():
        raise RefitError(f"{what}: there is no folder {str(folder)!r}.", hint="Create it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        _try_to_write(folder, what)  # the system's error gives the reason
        raise RefitError(f"{what}: its folder is not writable.")
    if path.exists() and not os.access(path, os.W_OK):
        raise RefitError(f"{what}: it is write-protected.", hint="Write to another file.")
    _try_to_write(folder, what)
    for other in inputs:
        # samefile also finds links to an input.
        if other is not None and path.exists() and Path(other).exists() and path.samefile(other):
            raise click.UsageError(f"{str(path)!r} is read by this command: write to another file.")


def _try_to_write(folder: Path, what: str) -> None:
    """Create an unnamed file, because permissions alone do not decide: /proc refuses root, too."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as exc:
        raise refused(exc, f"{what}: no file can be created in {str(folder)!r}") from exc


def check_module_folder(pipeline: Pipeline, path: Path) -> None:
    """Check that a path, if it is a folder, holds a saved module, which may be replaced.

    Raises:
        RefitError: The folder holds something else.
    """
    if not path.is_dir():
        return
    try:
        pipeline.describe(path)
    # if the system refused, nothing is known about the folder
    except ResourceError:
        raise
    except RefitError as exc:
        message = f"{str(path)!r} cannot be written: it is a folder that holds no saved module."
        raise RefitError(message, hint="Name a file, or a folder that does not exist.") from exc


def bytes_of(path: Path) -> int:
    """Size of a file in bytes, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def load_program(path: Path, *, verbose: bool = False) -> ExportedProgram:
    """Load a program that ``torch.export.save`` wrote. This can run code from the file.

    Args:
        path: The file.
        verbose: Whether torch may log the traceback of a failure.

    Raises:
        UnsupportedTargetError: The file is missing, or holds no program that can be loaded.
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
        # torch.export.load accepts a path only if it ends in .pt2, but any stream
        with path.open("rb") as file, _muted(not verbose):
            return torch.export.load(file)
    except Exception as exc:
        raise_if_resource(exc, f"{str(path)!r} cannot be read")
        message = f"The program in {str(path)!r} cannot be loaded: {type(exc).__name__}: {exc}"
        hint = f"With -v torch's log shows details. {_EXPORT_HINT}"
        raise UnsupportedTargetError(message, hint=hint) from exc


def _looks_like_program(path: Path) -> bool:
    """Whether a file is an archive with a member that programs of the old or new format have.

    torch.export.load may unpickle parts of another archive, which could run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return bool({PurePath(name).name for name in archive.namelist()} & _PROGRAM_MEMBERS)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as exc:
        raise_if_resource(exc, f"{str(path)!r} cannot be read")
        return False


@contextmanager
def _muted(mute: bool) -> Iterator[None]:  # noqa: FBT001
    """Stop torch from logging a traceback, because the raised error reports the failure."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL if mute else before)
    try:
        yield
    finally:
        logging.disable(before)


def load_plan(pipeline: Pipeline, path: Path | None) -> RefitPlan | None:
    """Load the plan in a plan file or a saved module, without running any of its code.

    Returns:
        The plan; None for no path.

    Raises:
        PlanMismatchError: The file is missing, damaged, or holds no plan.
    """
    if path is None:
        return None
    check_readable(path, PlanMismatchError)
    return pipeline.read_plan(path)


def load_inputs(pipeline: Pipeline, path: Path | None) -> Inputs | None:
    """Load inputs from a file of tensors: ``0``, ``1``, ... are positional, other names keywords.

    Returns:
        Positional inputs and keyword inputs; None for no path.

    Raises:
        SourceError: The file cannot be read.
        ConfigError: The file is empty, positions are missing, or inputs are nested.
    """
    if path is None:
        return None
    check_readable(path, SourceError)
    source = pipeline.open_weights(path)
    if not source.names():
        raise ConfigError(f"{str(path)!r} holds no inputs.")
    positions = sorted(int(name) for name in source.names() if _is_position(name))
    if positions != list(range(len(positions))):
        raise ConfigError(f"Positional inputs must be 0, 1, ... without gaps, not {positions}.")
    keywords = [name for name in source.names() if not _is_position(name)]
    # A source joins the keys of nested mappings with dots.
    if dotted := [name for name in keywords if "." in name]:
        raise ConfigError(f"Inputs must be tensors, not mappings of tensors: {dotted}.")
    args = tuple(source.get(str(position)) for position in positions)
    return args, {name: source.get(name) for name in keywords}


def _is_position(name: str) -> bool:
    # ``isdecimal`` also accepts digits of other scripts; 01 is no position
    return name.isascii() and name.isdecimal() and name == str(int(name))
