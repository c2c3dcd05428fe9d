"""Network modules as files.

``save`` to a path that ends in ``.engine`` writes one engine, in TensorRT's own format. ``save`` to
any other path writes a folder with these files:

* ``PART.engine`` for each engine;
* ``PART.safetensors`` for each part that torch runs;
* ``refitkit.network``: an archive with everything that is needed to open the module again.

Opening a folder is not meant to run code from it. refitkit checks the names in the program before
torch reads it (``refitkit.program.keep``), and never imports a module that a file names. But the
libraries that read the files were not written for hostile files.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import ValidationError
from safetensors import SafetensorError

from refitkit.builtin.torch_tensorrt.network.planning import CONSTANTS, FACTS, GRAPH, Template
from refitkit.builtin.torch_tensorrt.parts import Structure
from refitkit.errors import Problem, RefitError, UnsupportedTargetError, raise_if_resource
from refitkit.files.archive import write_archive
from refitkit.files.replacing import replacing, replacing_folder
from refitkit.files.safetensors_format import ArchivedTensors, streamed
from refitkit.model import Slot
from refitkit.model.base import Frozen
from refitkit.recipe import Archive, ArchiveError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch.export import ExportedProgram

    from refitkit.builtin.torch_tensorrt.network.engine import NetworkEngine
    from refitkit.builtin.torch_tensorrt.network.planning import PlannedProgram
    from refitkit.files.archive import Streamed

SUFFIX = ".engine"
INDEX = "refitkit.network"
_MANIFEST, _ATTACHMENTS = "manifest.json", "attachments/"
_MAX_MEMBER_SIZE = 1 << 31
_MALFORMED = (
    ArchiveError,
    SafetensorError,
    AttributeError,
    KeyError,
    MemoryError,
    OSError,
    RuntimeError,  # includes RecursionError, and torch's error for a tensor that is too large
    TypeError,
    ValueError,
)
"""Errors of readers for a malformed member."""

_PART_NAME = re.compile(r"[A-Za-z0-9_]{1,200}")


class Savable(Protocol):
    """A module that ``save`` can write; see ``NetworkModule``."""

    @property
    def engines(self) -> Mapping[str, NetworkEngine]:
        """Parts by name."""

    @property
    def planned(self) -> PlannedProgram:
        """The session with the networks."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Options that the module was compiled with, as JSON data."""

    @property
    def template(self) -> Template:
        """The program without its weights."""


class PartEntry(Frozen):
    """One part in a manifest.

    Attributes:
        structure: The part's structure.
        slots: The part's slots.
        sha256: Digest of the engine file; empty for a part that torch runs.
    """

    structure: Structure
    slots: tuple[Slot, ...]
    sha256: str = ""


class NetworkManifest(Frozen):
    """``manifest.json`` in ``refitkit.network``.

    Attributes:
        format: Name and version of the format.
        parts: All parts.
        options: Options that the module was compiled with, as JSON data.
        settings: Settings that parts and slots depend on, as text.
        versions: Versions of the packages that engines depend on.
        attachments: Names of the attachments.
    """

    format: Literal["refitkit-network/1"] = "refitkit-network/1"
    parts: tuple[PartEntry, ...]
    options: dict[str, Any]
    settings: dict[str, str]
    versions: dict[str, str]
    attachments: tuple[str, ...] = ()


# -- writing ------------------------------------------------------------------------------------


def save(module: Savable, path: Path, attachments: Mapping[str, bytes]) -> None:
    """Write a module to a folder, or its only engine to an ``.engine`` file.

    Args:
        module: The module.
        path: Folder or ``.engine`` file. An older module in the folder is replaced.
        attachments: Data to save with a folder, by name.

    Raises:
        UnsupportedTargetError: The path is used by something else, or the module does not have
            exactly one engine.
    """
    if path.suffix == SUFFIX:
        _save_engine(module, path)
        return
    if path.exists() and not (path / INDEX).is_file() and (path.is_file() or any(path.iterdir())):
        raise UnsupportedTargetError(
            f"{str(path)!r} exists and is not a module of this backend, so it is not replaced.",
            hint="Choose a new folder, or for a single engine a path that ends in '.engine'.",
        )
    path = path.resolve()  # replaces the target of a symbolic link, not the link
    with replacing_folder(path) as folder:
        _write(module, folder, attachments)


def _save_engine(module: Savable, path: Path) -> None:
    # an engine file has no place for the values of parts that torch runs
    files = [engine.live.engine for engine in module.engines.values()]
    if len(files) != 1 or files[0] is None:
        raise UnsupportedTargetError(
            f"The program has {len(files)} parts, but an engine file contains exactly one engine.",
            problems=[Problem(name, "part") for name in module.engines],
            hint="Save to a path without '.engine' to get a folder with a file for each part.",
        )
    with replacing(path) as file:
        file.write(files[0].read_bytes())


def _write(module: Savable, folder: Path, attachments: Mapping[str, bytes]) -> None:
    entries = []
    members: dict[str, bytes | Path | Streamed] = dict(module.template.members())
    for name, engine in module.engines.items():
        built = engine.live
        digest = ""
        if built.engine is not None:
            content = built.engine.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            (folder / f"{name}{SUFFIX}").write_bytes(content)
        slots = tuple(engine.slots.values())
        values = {slot.name: engine.read(slot.name) for slot in slots}
        if built.engine is None:  # for users who run this part with torch
            with (folder / f"{name}.safetensors").open("xb") as file:
                file.writelines(streamed(values).chunks)
        # reading takes the values of all parts from the archive
        members[f"{name}.safetensors"] = streamed(values)
        entries.append(PartEntry(structure=engine.structure, slots=slots, sha256=digest))
    manifest = NetworkManifest(
        parts=tuple(entries),
        options=dict(module.options),
        settings=dict(module.planned.settings),
        versions=dict(module.planned.versions),
        attachments=tuple(attachments),
    )
    members[_MANIFEST] = manifest.model_dump_json().encode()
    members.update({f"{_ATTACHMENTS}{name}": content for name, content in attachments.items()})
    with (folder / INDEX).open("xb") as file:
        write_archive(file, members)


# -- reading ------------------------------------------------------------------------------------


def is_network_folder(path: Path) -> bool:
    """Whether a path is a folder that ``save`` wrote, or the archive in the folder."""
    return (path / INDEX).is_file() or (path.name == INDEX and path.is_file())


def read_manifest(path: Path) -> NetworkManifest:
    """The manifest of a saved module.

    Raises:
        UnsupportedTargetError: The module is damaged, or of another version.
    """
    try:
        with Archive(_index(path)) as archive:
            return _manifest(archive, path)
    except ArchiveError as exc:
        raise _damaged(path, exc) from exc


def describe(path: Path) -> dict[str, Any]:
    """A description of a saved module, as plain data.

    Raises:
        UnsupportedTargetError: The module is damaged, or of another version.
    """
    manifest = read_manifest(path)
    slots = [slot for part in manifest.parts for slot in part.slots]
    return {
        "format": manifest.format,
        "parts": {
            part.structure.name: f"{'an engine' if part.structure.accelerated else 'torch'} of "
            f"{len(part.structure.ops)} ops, {len(part.slots)} slots"
            for part in manifest.parts
        },
        "options": manifest.options,
        "versions": manifest.versions,
        "settings": manifest.settings,
        "attachments": list(manifest.attachments),
        "bytes": sum(slot.nbytes for slot in slots),
        "slots": [slot.model_dump(mode="json") for slot in slots],
    }


def read_attachments(path: Path) -> dict[str, bytes]:
    """The attachments of a saved module, by name.

    Raises:
        UnsupportedTargetError: The module is damaged, or of another version.
    """
    try:
        with Archive(_index(path)) as archive:
            names = _manifest(archive, path).attachments
            return {name: archive.read(f"{_ATTACHMENTS}{name}", _MAX_MEMBER_SIZE) for name in names}
    except ArchiveError as exc:
        raise _damaged(path, exc) from exc


def read_template(path: Path) -> Template:
    """The program of a saved module, without its weights.

    Raises:
        UnsupportedTargetError: The module is damaged.
    """
    try:
        with Archive(_index(path)) as archive:
            members = {
                name: archive.read(name, _MAX_MEMBER_SIZE) for name in (GRAPH, FACTS, CONSTANTS)
            }
        return Template.from_members(members)
    except _MALFORMED as exc:
        raise_if_resource(exc, f"{str(path)!r} cannot be read")
        raise _damaged(path, exc) from exc


def program_of(template: Template, path: Path) -> ExportedProgram:
    """The program of a template.

    Args:
        template: The template.
        path: Path of the saved module, for error messages.

    Raises:
        UnsupportedTargetError: The template is damaged, or another version of torch wrote it.
    """
    try:
        return template.program()
    except (RefitError, *_MALFORMED) as exc:
        raise_if_resource(exc, f"{str(path)!r} cannot be read")
        raise _damaged(path, exc) from exc


def read_values(path: Path, part: PartEntry) -> dict[str, torch.Tensor]:
    """Values of all slots of one part, by slot name.

    Raises:
        UnsupportedTargetError: The values are damaged, or belong to another model.
    """
    name = f"{part.structure.name}.safetensors"
    try:
        with Archive(_index(path)) as archive:
            values = dict(ArchivedTensors(archive, name))
    except _MALFORMED as exc:
        raise_if_resource(exc, f"{str(path)!r} cannot be read")
        raise _damaged(path, exc) from exc
    wanted = {slot.name: (slot.dtype, slot.count) for slot in part.slots}
    found = {n: (str(v.dtype).removeprefix("torch."), v.numel()) for n, v in values.items()}
    if wanted != found:
        problems = [
            Problem(name, "value", str(found.get(name, "")), str(wanted.get(name, "")))
            for name in sorted(wanted.keys() | found.keys())
            if wanted.get(name) != found.get(name)
        ]
        message = f"{str(path)!r} contains weights of another model."
        raise UnsupportedTargetError(message, problems=problems)
    return values


def engine_bytes(path: Path, part: PartEntry) -> bytes:
    """The engine bytes of one part; empty if torch runs the part.

    Raises:
        UnsupportedTargetError: The engine file is missing, or differs from the saved one.
    """
    if not part.structure.accelerated:
        return b""
    file = _index(path).parent / f"{part.structure.name}{SUFFIX}"
    if not file.is_file():
        raise UnsupportedTargetError(f"The engine {file.name!r} of {str(path)!r} is missing.")
    content = file.read_bytes()
    # this finds damaged and swapped files; a forger could change the digest, too
    if hashlib.sha256(content).hexdigest() != part.sha256:
        raise UnsupportedTargetError(
            f"The engine {file.name!r} of {str(path)!r} differs from the saved one.",
            problems=[Problem(file.name, "sha256")],
        )
    return content


def _index(path: Path) -> Path:
    return path / INDEX if path.is_dir() else path


def _manifest(archive: Archive, path: Path) -> NetworkManifest:
    try:
        manifest = NetworkManifest.model_validate_json(archive.read(_MANIFEST, _MAX_MEMBER_SIZE))
    except ValidationError as exc:
        raise _damaged(path, exc) from exc
    # names become file names, so a manifest must not point outside the folder
    names = [part.structure.name for part in manifest.parts]
    invalid = [name for name in names if not _PART_NAME.fullmatch(name)]
    if invalid or len(set(names)) != len(names):
        raise _damaged(path, ValueError(f"names of parts are invalid or not unique: {names}"))
    return manifest


def _damaged(path: Path, exc: Exception) -> UnsupportedTargetError:
    return UnsupportedTargetError(f"{str(path)!r} is damaged or of another version: {exc}.")
