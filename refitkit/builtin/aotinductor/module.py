"""An opened AOTInductor module: call it, read it, save it, open it a second time."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from refitkit.builtin.aotinductor import container, package
from refitkit.builtin.aotinductor.engine import ENGINE, AOTInductorEngine
from refitkit.builtin.aotinductor.inputs import CallSpec, InputChecker, run_unknown, spec_of
from refitkit.builtin.aotinductor.names import NAME
from refitkit.errors import (
    EngineError,
    NotRefittableError,
    Problem,
    UnsupportedTargetError,
    raise_if_resource,
)
from refitkit.files.replacing import replacing
from refitkit.files.safetensors_format import ArchivedTensors
from refitkit.files.temporary import TemporaryFolder
from refitkit.program import facts_of
from refitkit.recipe import Archive, ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch.export import ExportedProgram

    from refitkit.builtin.aotinductor.package import Manifest
    from refitkit.model import Slot, SlotKey, TensorInfo


@dataclass(frozen=True)
class Files:
    """Where an engine's files are and what is known of them; shared by copies of a module.

    Attributes:
        folder: Holds the files that are saved with the module, and no others.
        library: Name of the shared library.
        device: Kind of device that it was compiled for.
        weights_beside: Whether the library expects its weights from outside.
        call: What inputs it takes and outputs it gives.
        mutable: Slots that calls change in place; None: nobody knows.
        versions: Versions of what made it.
        settings: Compilation options, as text.
    """

    folder: TemporaryFolder
    library: str
    device: str
    weights_beside: bool
    call: CallSpec | None
    mutable: frozenset[str] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The folder as a path."""
        return self.folder.path


class AOTInductorModule:
    """An opened module; see ``refitkit.protocols.OpenedModule``."""

    def __init__(
        self, files: Files, engine: AOTInductorEngine, attachments: Mapping[str, bytes]
    ) -> None:
        """Made by the backend."""
        self.files = files
        self.attachments = attachments
        self._engine = engine
        in_spec, out_spec = engine.runner.get_call_spec()
        self._out_spec = pytree.treespec_loads(out_spec)
        self._in_spec = pytree.treespec_loads(in_spec)
        self._inputs = InputChecker(files.call, self._in_spec)

    @property
    def backend(self) -> str:
        """``aotinductor``."""
        return NAME

    @property
    def engines(self) -> Mapping[str, AOTInductorEngine]:
        """The one engine."""
        return {ENGINE: self._engine}

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call it like the model; outputs have no gradient history."""
        inputs = self._inputs.flatten(args, kwargs)
        if self.files.call is None:
            outputs = run_unknown(self._engine.runner, inputs.tensors)
        else:
            outputs = self._run(inputs.tensors)
            inputs.write_back()
        for position in self.files.call.numbers if self.files.call else ():
            if isinstance(outputs[position], torch.Tensor):
                outputs[position] = outputs[position].item()
        return pytree.tree_unflatten(outputs, self._out_spec)

    def _run(self, tensors: list[torch.Tensor]) -> list[Any]:
        try:
            outputs: list[Any] = self._engine.runner.run(tensors)
        except RuntimeError as exc:
            raise_if_resource(exc, "The engine cannot answer")
            first = str(exc).strip().partition("\n")[0]
            hint = "Are values of the inputs in range, such as indices? The module is unharmed."
            raise EngineError(f"The engine failed: {first}", hint=hint) from exc
        return outputs

    def probe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call it, then put back the buffers that it changed."""
        return self.probe_from({}, args, kwargs)

    def probe_from(
        self,
        state: Mapping[SlotKey, torch.Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Call it with other values in buffers that it changes, then put all of those back."""
        kept = self._engine.mutable_values()
        try:
            self._engine.write_active({slot: value for (_, slot), value in state.items()})
            return self.run(args, kwargs)
        finally:
            self._engine.write_active(kept)

    def learn(self, program: ExportedProgram) -> None:
        """Take from the program that was compiled what a package of torch's own does not say."""
        mutable = frozenset(leaf.fqn for leaf in facts_of(program).leaves if leaf.mutated)
        self.files = replace(self.files, call=spec_of(program), mutable=mutable)
        self._engine = AOTInductorEngine(self._engine.runner, mutable)
        self._inputs = InputChecker(self.files.call, self._in_spec)

    def synchronize(self) -> None:
        """Wait for pending work of its devices."""
        self._engine.drain()

    def save(self, path: Path, attachments: Mapping[str, bytes]) -> None:
        """Write it with its present weights."""
        files, folder = self.files, self.files.path
        manifest = package.Manifest(
            device=files.device,
            library=files.library,
            files=package.files_in(folder),
            weights_beside=files.weights_beside,
            slots=tuple(self._engine.slots.values()),
            call=files.call,
            versions=dict(files.versions),
            settings=dict(files.settings),
            attachments=tuple(attachments),
        )
        weights = {name: self._engine.read(name) for name in self._engine.slots}
        with replacing(path) as file:
            package.write(file, manifest, folder, weights, attachments)

    def reopen(self) -> AOTInductorModule:
        """A second container on the same files, with the same present weights."""
        files = self.files
        runner = container.open_container(files.path / files.library, files.device)
        if files.weights_beside:
            container.fill_with_zeros(runner)
        engine = AOTInductorEngine(runner, files.mutable)
        engine.write_active({name: self._engine.read(name) for name in self._engine.slots})
        return AOTInductorModule(files, engine, self.attachments)


# MERGED opening: Opening files as modules: those that refitkit wrote, and those that torch wrote.

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
