"""Open files: modules that refitkit saved, and packages that torch wrote.

This loads shared libraries, and so runs code of their authors. ``describe_file`` and
``attachments_of`` do not.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.aotinductor import container, native, package
from refitkit.builtin.aotinductor.engine import AOTInductorEngine, SwappingEngine
from refitkit.builtin.aotinductor.module import AOTInductorModule, EngineFiles
from refitkit.builtin.aotinductor.publishing import PublishingEngine
from refitkit.builtin.aotinductor.shared import serving_from
from refitkit.errors import NotRefittableError, Problem, UnsupportedTargetError
from refitkit.files.safetensors_format import ArchivedTensors
from refitkit.files.temporary import TemporaryFolder
from refitkit.program.dtypes import dtype_of
from refitkit.recipe import Archive, ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from refitkit.model import Slot, TensorInfo


_ZIP_MAGIC = b"PK"
_MOST = 1 << 28  # bytes of a library without weights, or of a description


def open_file(path: Path, shared: object = None) -> AOTInductorModule | None:
    """Open a saved module; return None if neither refitkit nor AOTInductor wrote the file.

    This loads a shared library from the file, and so runs code of its author.

    Args:
        path: The file.
        shared: Weights to serve from instead of those of a saved module; see ``serving_from``.

    Raises:
        ConfigError: The module cannot serve from shared weights.
        WeightMismatchError: The shared weights belong to another module.
        UnsupportedTargetError: The file is damaged, of another version, or for a device that this
            machine lacks.
        NotRefittableError: The engine cannot be refitted.
    """
    if not _is_zip(path):
        return None
    try:
        with Archive(path) as archive:
            if package.is_saved_module(archive):
                return _open_saved_module(archive, path, shared)
            if package.is_torch_package(archive):
                return _open_torch_package(archive, path)
    except ArchiveError as exc:
        raise package.damaged(path, exc) from exc
    return None


def describe_file(path: Path) -> Mapping[str, Any] | None:
    """Return the manifest of a file as plain data, without running code of the file.

    Returns:
        None if neither refitkit nor AOTInductor wrote the file.

    Raises:
        UnsupportedTargetError: The file is damaged or of another version.
    """
    if not _is_zip(path):
        return None
    try:
        with Archive(path) as archive:
            if package.is_saved_module(archive):
                manifest = package.read_manifest(archive, path)
                described = manifest.model_dump(mode="json")
                del described["strides"]  # long, and of interest to the engine alone
                described["bytes"] = sum(slot.nbytes for slot in manifest.slots)
                why = _binding_of(archive, manifest)
                described["calls"] = f"binding: {why}" if why else "c-interface"
                return described
            if package.is_torch_package(archive):
                members = {name: archive.size(name) for name in archive.names()}
                return {"format": "torch AOTInductor package", "members": members}
    except ArchiveError as exc:
        raise package.damaged(path, exc) from exc
    return None


def _binding_of(archive: Archive, manifest: package.PackageManifest) -> str:
    """Return why a saved library will need torch's binding, without loading it; else nothing."""
    if manifest.call is None:
        return UNKNOWN_INPUTS
    library = package.CODE + manifest.library
    described = f"{library.removesuffix('.so')}.json"
    if described in archive.names() and native.has_proxy_nodes(archive.read(described, _MOST)):
        return native.PROXY
    lacking = native.lacking_in(archive.read(library, _MOST)) if manifest.weights_beside else ""
    return f"it was compiled by a version of torch without {lacking}" if lacking else ""


def attachments_of(path: Path) -> Mapping[str, bytes]:
    """Return the attachments of a saved module, without running code of the file.

    Raises:
        UnsupportedTargetError: The file is damaged or of another version.
    """
    if not _is_zip(path):
        return {}
    try:
        with Archive(path) as archive:
            if not package.is_saved_module(archive):
                return {}
            return package.read_attachments(archive, package.read_manifest(archive, path))
    except ArchiveError as exc:
        raise package.damaged(path, exc) from exc


def _is_zip(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(2) == _ZIP_MAGIC


def _open_saved_module(archive: Archive, path: Path, shared: object) -> AOTInductorModule:
    manifest = package.read_manifest(archive, path)
    # lives as long as the module, because ``save`` packs its files again
    folder = TemporaryFolder()
    package.extract_code(archive, manifest, folder.path)
    weights = ArchivedTensors(archive, package.WEIGHTS)
    attachments = package.read_attachments(archive, manifest)
    # Without a call, this is a package of torch that was saved without ever being planned.
    known = manifest.call is not None
    mutable = frozenset(slot.name for slot in manifest.slots if slot.mutable) if known else None
    engine = _engine_of(folder.path / manifest.library, manifest, mutable)
    _check_slots(engine, manifest, path)
    if shared is None:
        _write_weights(engine, weights, path)
    else:
        engine = serving_from(engine, shared)
    files = EngineFiles(
        folder=folder,
        library=manifest.library,
        device=manifest.device,
        weights_beside=manifest.weights_beside,
        call=manifest.call,
        mutable=mutable,
        versions=manifest.versions,
        settings=manifest.settings,
    )
    return AOTInductorModule(files, engine, attachments)


UNKNOWN_INPUTS = "its inputs are not known: refitkit.plan(program, target=...) describes them"


def _engine_of(
    library: Path, manifest: package.PackageManifest, mutable: frozenset[str] | None
) -> AOTInductorEngine:
    """Return the engine of a saved library, with memory for its weights."""
    found = UNKNOWN_INPUTS if mutable is None else native.opened(library, manifest.device)
    # a library of another model goes the other way, where its slots are compared one by one
    if isinstance(found, native.Library) and _has_slots(found, manifest):
        tensors = {
            slot.name: torch.empty_strided(
                slot.shape or (),
                manifest.strides[slot.name],
                dtype=dtype_of(slot.dtype),
                device=slot.device,
            )
            for slot in manifest.slots
        }
        return PublishingEngine.owning(found, tensors, mutable or ())
    runner = container.open_container(library, manifest.device)
    if manifest.weights_beside:
        # The engine needs tensors to write to; the weights of the file follow.
        container.fill_with_zeros(runner)
    binding = found if isinstance(found, str) else "the file does not say how weights are laid out"
    return SwappingEngine(runner, mutable, binding=binding)


def _has_slots(library: native.Library, manifest: package.PackageManifest) -> bool:
    """Return whether a library has weights of the names and about the sizes of the slots."""
    nbytes = {slot.name: slot.nbytes for slot in manifest.slots}
    is_named = library.sizes.keys() == nbytes.keys() == manifest.strides.keys()
    # the library rounds sizes up
    return is_named and all(0 <= library.sizes[n] - nbytes[n] < native.ALIGNMENT for n in nbytes)


def _check_slots(engine: AOTInductorEngine, manifest: package.PackageManifest, path: Path) -> None:
    """Check that the library has the slots in the manifest.

    Raises:
        UnsupportedTargetError: It has not. The error lists all differences.
    """
    found, wanted = dict(engine.slots), {slot.name: slot for slot in manifest.slots}
    problems = [Problem(name, "not in the library") for name in sorted(wanted.keys() - found)]
    problems += [Problem(name, "not in the manifest") for name in sorted(found.keys() - wanted)]
    problems += [
        Problem(name, "differs", _text(found[name]), _text(wanted[name]))
        for name in sorted(found.keys() & wanted)
        if _text(found[name]) != _text(wanted[name])
    ]
    if problems:
        message = f"{str(path)!r} holds a library and a manifest of different models."
        raise UnsupportedTargetError(message, problems=problems)


def _text(slot: Slot) -> str:
    return f"{slot.dtype} {slot.shape}"


def _write_weights(engine: AOTInductorEngine, weights: ArchivedTensors, path: Path) -> None:
    """Write the weights of a file to an engine, one at a time.

    Raises:
        UnsupportedTargetError: They do not fit the slots. The error lists all problems.
    """
    infos = weights.infos
    problems = [Problem(n, "no value") for n in sorted(engine.slots.keys() - infos)]
    problems += list(_misfits(engine, infos))
    # All of it is checked before anything is written.
    if problems:
        message = f"{str(path)!r} holds weights of another model."
        raise UnsupportedTargetError(message, problems=problems)
    for name, value in weights:
        engine.write_active({name: value})


def _misfits(engine: AOTInductorEngine, infos: Mapping[str, TensorInfo]) -> Iterator[Problem]:
    for name, info in sorted(infos.items()):
        if name not in engine.slots:
            yield Problem(name, "no such slot")
            continue
        found = f"{info.dtype} {info.shape}"
        if found != _text(engine.slots[name]):
            yield Problem(name, "value", found, _text(engine.slots[name]))


def _open_torch_package(archive: Archive, path: Path) -> AOTInductorModule:
    folder = TemporaryFolder()
    blob = package.extract_torch_package(archive, folder.path)
    # ``is_torch_package`` has found one
    library = next(folder.path.glob("*.so"))
    metadata = next(folder.path.glob("*wrapper_metadata.json"), None)
    device = json.loads(metadata.read_text())["AOTI_DEVICE_KEY"] if metadata else "cpu"
    runner = container.open_container(library, device)
    if blob:
        with archive.open(blob) as member:
            container.fill_from_blob(runner, member.copy)
    # Torch can package a library that expects its weights from the caller at run time.
    if not runner.extract_constants_map(False):  # noqa: FBT003
        raise NotRefittableError(
            f"{str(path)!r} was packaged without its weights.",
            hint="Compile it with refitkit.compile, or leave package_constants_in_so on.",
        )
    # Saving the module writes all files of the folder. An engine does not need these.
    for source in [*folder.path.glob("*.cpp"), *folder.path.glob("*.o")]:
        source.unlink()
    files = EngineFiles(
        folder=folder,
        library=library.name,
        device=device,
        weights_beside=bool(blob),
        call=None,
    )
    return AOTInductorModule(files, SwappingEngine(runner, binding=UNKNOWN_INPUTS), {})
