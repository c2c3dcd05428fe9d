"""The file of a saved module, and the files of torch's own packages.

A file that refitkit writes is an uncompressed zip archive:

====================================  ==========================================================
``refitkit/manifest.json``            :class:`Manifest`
``refitkit/weights.safetensors``      present values of all slots, by slot name, packed
``refitkit/attachments/NAME``         what the pipeline keeps beside them: plan and program
``aotinductor/NAME``                  files of the engine: the shared library, its kernels
====================================  ==========================================================

The shared library is code: opening the file runs it. Nothing else in it is executed or unpickled.
"""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Literal

from pydantic import Field, ValidationError

from refitkit.builtin.aotinductor.inputs import CallSpec
from refitkit.errors import UnsupportedTargetError
from refitkit.files.safetensors_format import streamed
from refitkit.model import Slot
from refitkit.model.base import Frozen
from refitkit.model.slot import Dim
from refitkit.recipe import Archive, ArchiveError, write_archive

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from refitkit.files.archive import Streamed

MANIFEST = "refitkit/manifest.json"
WEIGHTS = "refitkit/weights.safetensors"
ATTACHMENTS = "refitkit/attachments/"
CODE = "aotinductor/"
_TEXT_LIMIT = 1 << 28
_TORCH_CODE = "/data/aotinductor/model/"


class FileRef(Frozen):
    """One of an engine's files.

    Attributes:
        size: In bytes.
        sha256: Of its content.
    """

    size: Dim
    sha256: str


class Manifest(Frozen):
    """What a saved module is.

    Attributes:
        format: Name and version of the format.
        backend: Always ``aotinductor``.
        device: Kind of device that it was compiled for.
        library: Name of the shared library among the engine's files.
        files: The engine's files by name.
        weights_beside: Whether the library expects its weights from outside. A library that holds
            the weights of its compilation gets those of the file written over them.
        slots: All slots.
        call: What inputs it takes and outputs it gives; None where nobody knows.
        versions: Versions of what made it.
        settings: Compilation options, as text.
        attachments: Names of what is kept beside the engine.
    """

    format: Literal["refitkit-aotinductor/1"] = "refitkit-aotinductor/1"
    backend: Literal["aotinductor"] = "aotinductor"
    device: str
    library: str
    files: dict[str, FileRef]
    weights_beside: bool
    slots: tuple[Slot, ...]
    call: CallSpec | None
    versions: dict[str, str] = Field(default_factory=dict)
    settings: dict[str, str] = Field(default_factory=dict)
    attachments: tuple[str, ...] = ()


def is_ours(archive: Archive) -> bool:
    """Whether refitkit wrote this archive."""
    return MANIFEST in archive.names()


def is_torchs(archive: Archive) -> bool:
    """Whether torch wrote it, with an AOTInductor model named ``model`` in it."""
    return any(_TORCH_CODE in f"/{name}" and name.endswith(".so") for name in archive.names())


def read_manifest(archive: Archive, path: Path) -> Manifest:
    """The manifest, checked against the archive's members.

    Raises:
        UnsupportedTargetError: It is damaged or of another version.
    """
    try:
        manifest = Manifest.model_validate_json(archive.read(MANIFEST, _TEXT_LIMIT))
        _check_members(archive, manifest)
    except ValidationError as exc:
        message = f"{str(path)!r} was saved by another version of refitkit, or is damaged."
        raise UnsupportedTargetError(message, hint=str(exc)) from exc
    except ArchiveError as exc:
        raise broken(path, exc) from exc
    return manifest


def _check_members(archive: Archive, manifest: Manifest) -> None:
    for name, file in manifest.files.items():
        if not _is_plain(name) or archive.size(CODE + name) != file.size:
            raise ArchiveError(f"member {name!r} is not the one in the manifest")
    if manifest.library not in manifest.files:
        raise ArchiveError("its shared library is not among its files")


def broken(path: Path, why: object) -> UnsupportedTargetError:
    """The error for a file that cannot be used."""
    return UnsupportedTargetError(
        f"{str(path)!r} cannot be opened: {why}.", hint="Save or copy the file again."
    )


def extract_code(archive: Archive, manifest: Manifest, folder: Path) -> None:
    """Unpack the engine's files into a folder, under the names of the manifest.

    Raises:
        ArchiveError: A file is damaged, or not the one that was saved.
    """
    for name, file in manifest.files.items():
        archive.extract(CODE + name, folder / name)
        if digest_of(folder / name) != file.sha256:
            raise ArchiveError(f"member {name!r} is not the one in the manifest")


def files_in(folder: Path) -> dict[str, FileRef]:
    """All files of a folder, as a manifest lists them."""
    return {
        file.name: FileRef(size=file.stat().st_size, sha256=digest_of(file))
        for file in sorted(folder.iterdir())
    }


def digest_of(file: Path) -> str:
    """sha256 of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def extract_torchs(archive: Archive, folder: Path) -> str:
    """Unpack the model ``model`` of one of torch's packages into a folder, without its weights.

    Returns:
        The member that holds its weights; empty where the library holds them itself.
    """
    blobs = []
    for member in archive.names():
        name = PurePosixPath(member).name
        if _TORCH_CODE not in f"/{member}" or not _is_plain(name):
            continue
        if name.endswith("_weights.blob"):
            blobs.append(member)
        else:
            archive.extract(member, folder / name)
    return min(blobs, default="")


def read_attachments(archive: Archive, manifest: Manifest) -> dict[str, bytes]:
    """Everything that is kept beside the engine, by name."""
    return {name: archive.read(ATTACHMENTS + name, _TEXT_LIMIT) for name in manifest.attachments}


def write(
    file: IO[bytes],
    manifest: Manifest,
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    attachments: Mapping[str, bytes],
) -> None:
    """Write a whole file."""
    members: dict[str, bytes | Path | Streamed] = {
        MANIFEST: manifest.model_dump_json(indent=1).encode(),
        **{ATTACHMENTS + name: content for name, content in attachments.items()},
        **{CODE + name: folder / name for name in manifest.files},
        WEIGHTS: streamed(weights),
    }
    write_archive(file, members)


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file, not a path, so that it stays in our folder."""
    return bool(name) and name not in {".", ".."} and not set(name) & {"/", "\\", "\0", ":"}
