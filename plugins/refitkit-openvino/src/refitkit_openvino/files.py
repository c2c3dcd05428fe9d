"""The file of a saved module.

It is an uncompressed zip archive:

===========================  ==========================================
``openvino/manifest.json``   :class:`~refitkit_openvino.graph.Manifest`
``openvino/model.xml``       the model in OpenVINO's IR format
``openvino/model.bin``       its constants, without weights
``weights.safetensors``      the weights by FQN
``attachments/NAME``         data of refitkit, such as the plan
===========================  ==========================================

Nothing in it is executed or unpickled.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import safetensors.torch
from refitkit import ConfigError, Problem, UnsupportedTargetError
from refitkit.files.replacing import replacing
from refitkit.recipe import Archive, ArchiveError, write_archive

from refitkit_openvino.graph import Graph, Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch
    from refitkit.protocols import Tools

    from refitkit_openvino.module import OpenVINOModule

_MANIFEST, _XML, _CONSTANTS = "openvino/manifest.json", "openvino/model.xml", "openvino/model.bin"
_WEIGHTS, _ATTACHMENTS = "weights.safetensors", "attachments/"


def write(
    path: Path,
    graph: Graph,
    weights: Mapping[str, torch.Tensor],
    attachments: Mapping[str, bytes],
) -> None:
    """Write a module to a file, which replaces an older one when it is complete."""
    manifest = graph.manifest.model_copy(update={"attachments": tuple(attachments)})
    members = {
        _MANIFEST: manifest.model_dump_json(indent=1).encode(),
        _XML: graph.xml,
        _CONSTANTS: graph.constants,
        _WEIGHTS: safetensors.torch.save(dict(weights)),
        **{_ATTACHMENTS + name: content for name, content in attachments.items()},
    }
    with replacing(path) as file:
        write_archive(file, members)


@contextmanager
def _reading(path: Path) -> Iterator[Archive | None]:
    """A file of this backend, or None if it is another one.

    Raises:
        UnsupportedTargetError: The body found it damaged.
    """
    try:
        archive = Archive(path) if path.is_file() else None
    except ArchiveError:
        archive = None  # another backend wrote it, or it is no module
    if archive is None:
        yield None
        return
    with archive:
        try:
            yield archive if _MANIFEST in archive.names() else None
        except (ArchiveError, ValueError, safetensors.SafetensorError) as exc:
            raise UnsupportedTargetError(
                f"{str(path)!r} cannot be opened: {exc}.", hint="Save or copy the file again."
            ) from exc


def _member(archive: Archive, name: str) -> bytes:
    return archive.read(name, archive.size(name))


def _manifest(archive: Archive) -> Manifest:
    return Manifest.model_validate_json(_member(archive, _MANIFEST))


def describe(path: Path) -> Mapping[str, Any] | None:
    """Return the description of a saved module; None if this backend did not write the file."""
    with _reading(path) as archive:
        return _manifest(archive).model_dump(mode="json") if archive else None


def attachments_of(path: Path) -> Mapping[str, bytes]:
    """Return the attachments of a saved module; none if this backend did not write the file."""
    with _reading(path) as archive:
        return _attachments(archive, _manifest(archive)) if archive else {}


def _attachments(archive: Archive, manifest: Manifest) -> dict[str, bytes]:
    return {name: _member(archive, _ATTACHMENTS + name) for name in manifest.attachments}


def open_module(path: Path, tools: Tools) -> OpenVINOModule | None:
    """Open a saved module; return None if this backend did not write the file.

    Raises:
        UnsupportedTargetError: The file is damaged, or of another version.
        ConfigError: The caller wants it to serve from shared memory.
    """
    from refitkit_openvino.module import OpenVINOModule  # noqa: PLC0415 - it imports this module

    with _reading(path) as archive:
        if archive is None:
            return None
        if tools.shared is not None:
            message = "The backend 'openvino' cannot serve from shared weights."
            raise ConfigError(message, hint="Load the module without shared=.")
        manifest = _manifest(archive)
        weights = safetensors.torch.load(_member(archive, _WEIGHTS))
        problems = list(_misfits(manifest, weights))
        if problems:
            message = f"{str(path)!r} has weights of another model."
            raise UnsupportedTargetError(message, problems=problems)
        graph = Graph(manifest, _member(archive, _XML), _member(archive, _CONSTANTS))
        return OpenVINOModule.compiled(graph, weights, _attachments(archive, manifest))


def _misfits(manifest: Manifest, weights: Mapping[str, torch.Tensor]) -> Iterator[Problem]:
    slots = {slot.name: f"{slot.dtype} {slot.shape}" for slot in manifest.slots}
    found = {
        name: f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        for name, value in weights.items()
    }
    for name in sorted(slots.keys() | found.keys()):
        if slots.get(name) != found.get(name):
            yield Problem(name, "weight", found.get(name, "none"), slots.get(name, "no such slot"))
