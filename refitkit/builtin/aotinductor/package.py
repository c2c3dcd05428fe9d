"""Read and write the file of a saved module, and read packages that torch wrote.

A file that refitkit writes is an uncompressed zip archive:

====================================  ==========================================================
``refitkit/manifest.json``            :class:`PackageManifest`
``refitkit/weights.safetensors``      present values of all slots, by slot name, contiguous
``refitkit/attachments/NAME``         data that the pipeline keeps beside them: plan and program
``aotinductor/NAME``                  files of the engine: the shared library, its kernels
====================================  ==========================================================

The shared library is code: opening the file runs it. Nothing else in the file is executed or
unpickled.
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
_MAX_TEXT = 1 << 28  # bytes of a manifest or attachment
_TORCH_CODE = "/data/aotinductor/model/"


class FileRef(Frozen):
    """One of an engine's files.

    Attributes:
        size: Size in bytes.
        sha256: SHA-256 of the content, as hexadecimal text.
    """

    size: Dim
    sha256: str


class PackageManifest(Frozen):
    """Description of a saved module.

    Attributes:
        format: Name and version of the format.
        backend: Always ``aotinductor``.
        device: Kind of device that the engine was compiled for.
        library: Name of the shared library among the engine's files.
        files: The engine's files, by name.
        weights_beside: Whether the library expects its weights from outside. If not, it holds the
            weights of its compilation, and those of the file are written over them.
        slots: All slots.
        strides: Strides of all slots in the library, by name.
        call: Description of inputs and outputs; None if it is unknown.
        versions: Versions of the software that compiled the engine, by package.
        settings: Compilation options, as text.
        attachments: Names of the attachments.
    """

    format: Literal["refitkit-aotinductor/1"] = "refitkit-aotinductor/1"
    backend: Literal["aotinductor"] = "aotinductor"
    device: str
    library: str
    files: dict[str, FileRef]
    weights_beside: bool
    slots: tuple[Slot, ...]
    strides: dict[str, tuple[Dim, ...]] = Field(default_factory=dict)
    call: CallSpec | None
    versions: dict[str, str] = Field(default_factory=dict)
    settings: dict[str, str] = Field(default_factory=dict)
    attachments: tuple[str, ...] = ()


def damaged(path: Path, reason: object) -> UnsupportedTargetError:
    """Return the error for a file that cannot be opened."""
    return UnsupportedTargetError(
        f"{str(path)!r} cannot be opened: {reason}.", hint="Save or copy the file again."
    )


# -- files that refitkit wrote ----------------------------------------------------------------


def is_saved_module(archive: Archive) -> bool:
    """Return whether refitkit wrote an archive."""
    return MANIFEST in archive.names()


def write(
    file: IO[bytes],
    manifest: PackageManifest,
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    attachments: Mapping[str, bytes],
) -> None:
    """Write a saved module.

    Args:
        file: Writable file at its beginning.
        manifest: Description of the module.
        folder: Folder with the engine's files.
        weights: Present value of each slot.
        attachments: Data to keep beside the engine, by name.
    """
    members: dict[str, bytes | Path | Streamed] = {
        MANIFEST: manifest.model_dump_json(indent=1).encode(),
        **{ATTACHMENTS + name: content for name, content in attachments.items()},
        **{CODE + name: folder / name for name in manifest.files},
        # Streamed, so that the weights are not in memory twice.
        WEIGHTS: streamed(weights),
    }
    write_archive(file, members)


def files_in(folder: Path) -> dict[str, FileRef]:
    """Return all files of a folder, as a manifest lists them."""
    return {
        file.name: FileRef(size=file.stat().st_size, sha256=_sha256(file))
        for file in sorted(folder.iterdir())
    }


def read_manifest(archive: Archive, path: Path) -> PackageManifest:
    """Return the manifest, after comparing it with the members of the archive.

    Args:
        archive: Opened file.
        path: Path of the file, for errors.

    Raises:
        UnsupportedTargetError: The file is damaged or of another version.
    """
    try:
        manifest = PackageManifest.model_validate_json(archive.read(MANIFEST, _MAX_TEXT))
        _check_members(archive, manifest)
    except ValidationError as exc:
        message = f"{str(path)!r} was saved by another version of refitkit, or is damaged."
        raise UnsupportedTargetError(message, hint=str(exc)) from exc
    except ArchiveError as exc:
        raise damaged(path, exc) from exc
    return manifest


def _check_members(archive: Archive, manifest: PackageManifest) -> None:
    # Names become paths when the files are unpacked, and sizes bound what is unpacked.
    for name, file in manifest.files.items():
        if not _is_file_name(name) or archive.size(CODE + name) != file.size:
            raise ArchiveError(f"member {name!r} is not the one in the manifest")
    if manifest.library not in manifest.files:
        raise ArchiveError("its shared library is not among its files")


def extract_code(archive: Archive, manifest: PackageManifest, folder: Path) -> None:
    """Unpack the engine's files into a folder, under the names of the manifest.

    Raises:
        ArchiveError: A file is damaged, or does not have the digest in the manifest.
    """
    for name, file in manifest.files.items():
        archive.extract(CODE + name, folder / name)
        # the unpacked copy is checked, because that is what the process loads
        if _sha256(folder / name) != file.sha256:
            raise ArchiveError(f"member {name!r} is not the one in the manifest")


def read_attachments(archive: Archive, manifest: PackageManifest) -> dict[str, bytes]:
    """Return all attachments, by name."""
    return {name: archive.read(ATTACHMENTS + name, _MAX_TEXT) for name in manifest.attachments}


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# -- packages that torch wrote ----------------------------------------------------------------


def is_torch_package(archive: Archive) -> bool:
    """Return whether torch wrote an archive, with an AOTInductor model named ``model`` in it."""
    return any(_TORCH_CODE in f"/{name}" and name.endswith(".so") for name in archive.names())


def extract_torch_package(archive: Archive, folder: Path) -> str:
    """Unpack the model named ``model`` into a folder, without its weights.

    Returns:
        Name of the member with the weights; empty if the library holds them itself.
    """
    blobs = []
    for member in archive.names():
        name = PurePosixPath(member).name
        if _TORCH_CODE not in f"/{member}" or not _is_file_name(name):
            continue
        # The blob is as large as the weights, and is copied straight to memory: ``fill_from_blob``.
        if name.endswith("_weights.blob"):
            blobs.append(member)
        else:
            archive.extract(member, folder / name)
    return min(blobs, default="")


def _is_file_name(name: str) -> bool:
    """Return whether a name is that of a file, not a path that leads out of the folder."""
    return bool(name) and name not in {".", ".."} and not set(name) & {"/", "\\", "\0", ":"}
