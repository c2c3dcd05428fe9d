"""An opened AOTInductor module: call it, save it, open it from a file.

``AOTInductorModule`` comes first. Then come the functions that open files: those that refitkit
saved, and packages that torch wrote.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from refitkit.builtin.aotinductor import container, package
from refitkit.builtin.aotinductor.engine import ENGINE, AOTInductorEngine
from refitkit.builtin.aotinductor.inputs import CallSpec, InputChecker, run_unchecked, spec_of
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

    from refitkit.model import Slot, SlotKey, TensorInfo


@dataclass(frozen=True)
class EngineFiles:
    """An engine's files and their metadata. Copies of a module share them.

    Attributes:
        folder: Folder with the files that are saved with the module, and no others.
        library: Name of the shared library.
        device: Kind of device that the library was compiled for.
        weights_beside: Whether the library expects its weights from outside.
        call: Description of inputs and outputs; None if it is unknown.
        mutable: Slots that calls change in place; None if that is unknown.
        versions: Versions of the software that compiled the engine, by package.
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
        """Path of the folder."""
        return self.folder.path


class AOTInductorModule:
    """An opened module; see ``refitkit.protocols.OpenedModule``.

    Attributes:
        files: The engine's files.
        attachments: Data that a saved file keeps beside the engine, by name.
    """

    def __init__(
        self, files: EngineFiles, engine: AOTInductorEngine, attachments: Mapping[str, bytes]
    ) -> None:
        """Create a module.

        Args:
            files: The engine's files.
            engine: Engine with weights.
            attachments: Data that a saved file keeps beside the engine, by name.
        """
        self.files = files
        self.attachments = attachments
        self._engine = engine
        in_spec, out_spec = engine.runner.get_call_spec()
        self._out_spec = pytree.treespec_loads(out_spec)
        self._in_spec = pytree.treespec_loads(in_spec)
        self._inputs = InputChecker(files.call, self._in_spec)

    @property
    def backend(self) -> str:
        """Name of the backend: ``aotinductor``."""
        return NAME

    @property
    def engines(self) -> Mapping[str, AOTInductorEngine]:
        """The only engine, by its name ``model``."""
        return {ENGINE: self._engine}

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the module as the model is called. Outputs have no gradient history.

        Raises:
            InputMismatchError: The module was compiled for other inputs.
            EngineError: The engine failed.
        """
        inputs = self._inputs.flatten(args, kwargs)
        if self.files.call is None:
            outputs = run_unchecked(self._engine.runner, inputs.tensors)
        else:
            outputs = self._run(inputs.tensors)
            inputs.write_back()
        # The program returns a number here, as the model does; an engine returns tensors only.
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
        """Call the module, then restore the slots that the call changed."""
        return self.probe_from({}, args, kwargs)

    def probe_from(
        self,
        state: Mapping[SlotKey, torch.Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Call the module with other values of mutable slots, then restore all mutable slots.

        See ``refitkit.protocols.ProbesFromState``.
        """
        # The caller's state must survive a probe, also if the call raises halfway.
        kept = self._engine.mutable_values()
        try:
            self._engine.write_active({slot: value for (_, slot), value in state.items()})
            return self.run(args, kwargs)
        finally:
            self._engine.write_active(kept)

    def learn(self, program: ExportedProgram) -> None:
        """Add to a package of torch what it lacks: its inputs, and which slots calls change.

        Args:
            program: The program that was compiled.

        Raises:
            CompileError: The program takes inputs that cannot be checked.
        """
        mutable = frozenset(leaf.fqn for leaf in facts_of(program).leaves if leaf.mutated)
        self.files = replace(self.files, call=spec_of(program), mutable=mutable)
        # The weights are in the runner, so a new engine on it has the same values.
        self._engine = AOTInductorEngine(self._engine.runner, mutable)
        self._inputs = InputChecker(self.files.call, self._in_spec)

    def synchronize(self) -> None:
        """Wait for pending work on the engine's devices."""
        self._engine.drain()

    def save(self, path: Path, attachments: Mapping[str, bytes]) -> None:
        """Write the module with its present weights to a file.

        Raises:
            ResourceError: The system refused to write the file.
        """
        files, folder = self.files, self.files.path
        manifest = package.PackageManifest(
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
        """Return a second module with a container of its own, and the same present weights."""
        files = self.files
        runner = container.open_container(files.path / files.library, files.device)
        if files.weights_beside:
            container.fill_with_zeros(runner)
        engine = AOTInductorEngine(runner, files.mutable)
        # the new container holds zeros, or the weights of its compilation
        engine.write_active({name: self._engine.read(name) for name in self._engine.slots})
        return AOTInductorModule(files, engine, self.attachments)


# -- opening files ----------------------------------------------------------------------------

_ZIP_MAGIC = b"PK"


def open_file(path: Path) -> AOTInductorModule | None:
    """Open a saved module; return None if neither refitkit nor AOTInductor wrote the file.

    This loads a shared library from the file, and so runs code of its author.

    Raises:
        UnsupportedTargetError: The file is damaged, of another version, or for a device that this
            machine lacks.
        NotRefittableError: The engine cannot be refitted.
    """
    if not _is_zip(path):
        return None
    try:
        with Archive(path) as archive:
            if package.is_saved_module(archive):
                return _open_saved_module(archive, path)
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
                described["bytes"] = sum(slot.nbytes for slot in manifest.slots)
                return described
            if package.is_torch_package(archive):
                members = {name: archive.size(name) for name in archive.names()}
                return {"format": "torch AOTInductor package", "members": members}
    except ArchiveError as exc:
        raise package.damaged(path, exc) from exc
    return None


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


def _open_saved_module(archive: Archive, path: Path) -> AOTInductorModule:
    manifest = package.read_manifest(archive, path)
    # lives as long as the module, because ``save`` packs its files again
    folder = TemporaryFolder()
    package.extract_code(archive, manifest, folder.path)
    weights = ArchivedTensors(archive, package.WEIGHTS)
    attachments = package.read_attachments(archive, manifest)
    runner = container.open_container(folder.path / manifest.library, manifest.device)
    if manifest.weights_beside:
        # The engine needs tensors to write to; the weights of the file follow below.
        container.fill_with_zeros(runner)
    # Without a call, this is a package of torch that was saved without ever being planned.
    known = manifest.call is not None
    mutable = frozenset(slot.name for slot in manifest.slots if slot.mutable) if known else None
    engine = AOTInductorEngine(runner, mutable)
    _check_slots(engine, manifest, path)
    _write_weights(engine, weights, path)
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
    return AOTInductorModule(files, AOTInductorEngine(runner), {})
