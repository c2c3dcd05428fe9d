"""Opening files as modules: those that refitkit wrote, and those that torch wrote."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from refitkit.builtin.aotinductor import container, package
from refitkit.builtin.aotinductor.engine import AOTInductorEngine
from refitkit.builtin.aotinductor.module import AOTInductorModule, Files
from refitkit.errors import NotRefittableError, Problem, UnsupportedTargetError
from refitkit.recipe import Archive, ArchiveError
from refitkit.recipe.safetensors_format import ArchivedTensors
from refitkit.temporary import TemporaryFolder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from refitkit.builtin.aotinductor.package import Manifest
    from refitkit.model import Slot, TensorInfo

_ZIP_MAGIC = b"PK"


def open_file(path: Path) -> AOTInductorModule | None:
    """Open a saved module; None where the file is none of this backend's.

    This loads a shared library from the file, and so runs code of whoever made it.

    Raises:
        UnsupportedTargetError: It is damaged, of another version, or for a device that is missing.
        NotRefittableError: It cannot be refitted.
    """
    if not _is_zip(path):
        return None
    try:
        with Archive(path) as archive:
            if package.is_ours(archive):
                return _open_ours(archive, path)
            if package.is_torchs(archive):
                return _open_torchs(archive, path)
    except ArchiveError as exc:
        raise package.broken(path, exc) from exc
    return None


def describe_file(path: Path) -> Mapping[str, Any] | None:
    """What a saved module holds, without running any of it."""
    if not _is_zip(path):
        return None
    try:
        with Archive(path) as archive:
            if package.is_ours(archive):
                manifest = package.read_manifest(archive, path)
                described = manifest.model_dump(mode="json")
                described["bytes"] = sum(slot.nbytes for slot in manifest.slots)
                return described
            if package.is_torchs(archive):
                members = {name: archive.size(name) for name in archive.names()}
                return {"format": "torch AOTInductor package", "members": members}
    except ArchiveError as exc:
        raise package.broken(path, exc) from exc
    return None


def attachments_of(path: Path) -> Mapping[str, bytes]:
    """What is kept beside the engine of a saved module, without running any of it."""
    if not _is_zip(path):
        return {}
    try:
        with Archive(path) as archive:
            if not package.is_ours(archive):
                return {}
            return package.read_attachments(archive, package.read_manifest(archive, path))
    except ArchiveError as exc:
        raise package.broken(path, exc) from exc


def _is_zip(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(2) == _ZIP_MAGIC


def _open_ours(archive: Archive, path: Path) -> AOTInductorModule:
    manifest = package.read_manifest(archive, path)
    folder = TemporaryFolder()
    package.extract_code(archive, manifest, folder.path)
    weights = ArchivedTensors(archive, package.WEIGHTS)
    attachments = package.read_attachments(archive, manifest)
    runner = container.open_container(folder.path / manifest.library, manifest.device)
    if manifest.weights_beside:
        container.fill_with_zeros(runner)
    known = manifest.call is not None  # else it is torch's package, and was never planned
    mutable = frozenset(slot.name for slot in manifest.slots if slot.mutable) if known else None
    engine = AOTInductorEngine(runner, mutable)
    _check_slots(engine, manifest, path)
    _fill(engine, weights, path)
    files = Files(
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


def _check_slots(engine: AOTInductorEngine, manifest: Manifest, path: Path) -> None:
    """Check that the library's slots are the manifest's."""
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


def _fill(engine: AOTInductorEngine, weights: ArchivedTensors, path: Path) -> None:
    """Write the file's weights into the engine, one at a time, checked against its slots."""
    infos = weights.infos
    problems = [Problem(n, "no value") for n in sorted(engine.slots.keys() - infos)]
    problems += list(_misfits(engine, infos))
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


def _open_torchs(archive: Archive, path: Path) -> AOTInductorModule:
    folder = TemporaryFolder()
    blob = package.extract_torchs(archive, folder.path)
    library = next(folder.path.glob("*.so"))
    metadata = next(folder.path.glob("*wrapper_metadata.json"), None)
    device = json.loads(metadata.read_text())["AOTI_DEVICE_KEY"] if metadata else "cpu"
    runner = container.open_container(library, device)
    if blob:
        with archive.open(blob) as member:
            container.fill_from_blob(runner, member.copy)
    if not runner.extract_constants_map(False):  # noqa: FBT003
        raise NotRefittableError(
            f"{str(path)!r} was packaged without its weights.",
            hint="Compile it with refitkit.compile, or leave package_constants_in_so on.",
        )
    for source in [*folder.path.glob("*.cpp"), *folder.path.glob("*.o")]:
        source.unlink()
    files = Files(
        folder=folder,
        library=library.name,
        device=device,
        weights_beside=bool(blob),
        call=None,
    )
    return AOTInductorModule(files, AOTInductorEngine(runner), {})
