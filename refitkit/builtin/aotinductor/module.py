"""An opened AOTInductor module: call it, save it, open it again."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from refitkit.builtin.aotinductor import container, native, package
from refitkit.builtin.aotinductor.engine import ENGINE, AOTInductorEngine, SwappingEngine
from refitkit.builtin.aotinductor.inputs import CallSpec, InputChecker, run_unchecked, spec_of
from refitkit.builtin.aotinductor.names import NAME
from refitkit.builtin.aotinductor.publishing import PublishingEngine, like
from refitkit.builtin.aotinductor.shared import SharedEngine, sharing
from refitkit.errors import (
    EngineError,
    raise_if_resource,
)
from refitkit.files.replacing import replacing
from refitkit.program import facts_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch.export import ExportedProgram

    from refitkit.builtin.aotinductor.shared_memory import SharedWeights
    from refitkit.files.temporary import TemporaryFolder
    from refitkit.model import SlotKey


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
        in_spec, out_spec = engine.call_spec
        self._structured = structuring(pytree.treespec_loads(out_spec))
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
            outputs = run_unchecked(self._engine.call, inputs.tensors)
        else:
            outputs = self._run(inputs.tensors)
            inputs.write_back()
        # The program returns a number here, as the model does; an engine returns tensors only.
        for position in self.files.call.numbers if self.files.call else ():
            if isinstance(outputs[position], torch.Tensor):
                outputs[position] = outputs[position].item()
        return self._structured(outputs)

    def _run(self, tensors: list[torch.Tensor]) -> list[Any]:
        try:
            outputs: list[Any] = self._engine.call(tensors)
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
        # an engine of known inputs may be called through the C interface
        library = self.files.path / self.files.library
        if isinstance(self._engine, SwappingEngine):
            self._engine = engine_on(self._engine.runner, library, self.files.device, mutable)
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
            strides=self._engine.strides,
            call=files.call,
            versions=dict(files.versions),
            settings=dict(files.settings),
            attachments=tuple(attachments),
        )
        weights = self._engine.values()
        with replacing(path) as file:
            package.write(file, manifest, folder, weights, attachments)

    def reopen(self) -> AOTInductorModule:
        """Return a second module with the same present weights.

        It shares the library, and the weights as long as neither is refitted, if it can.
        """
        files = self.files
        engine = self._engine.sibling()
        if engine is None:
            runner = container.open_container(files.path / files.library, files.device)
            if files.weights_beside:
                container.fill_with_zeros(runner)
            engine = SwappingEngine(runner, files.mutable, binding=self._engine.binding)
            # the new container holds zeros, or the weights of its compilation
            engine.write_active(self._engine.values())
        return AOTInductorModule(files, engine, self.attachments)

    def serve(self, models: int) -> None:
        """Run several calls side by side; see ``refitkit.protocols.ServesSideBySide``."""
        self._engine.serve(models)

    @property
    def shared(self) -> SharedWeights | None:
        """The memory that other processes serve from, too; see ``SharesWeights``."""
        return self._engine.shared if isinstance(self._engine, SharedEngine) else None

    def share(self, version: int) -> SharedWeights:
        """Move the weights to memory that processes share; see ``SharesWeights``."""
        if not isinstance(self._engine, SharedEngine):
            self._engine = sharing(self._engine, version)
        return self._engine.shared

    @property
    def publishes(self) -> bool:
        """Whether calls go on while new weights become live; see ``OpensStaged``."""
        return self._engine.publishes

    def with_staged(self, staged: Mapping[str, Any]) -> AOTInductorModule:
        """Return the module as it will be; see ``refitkit.protocols.OpensStaged``."""
        if ENGINE not in staged:
            return self
        module = copy.copy(self)
        module._engine = staged[ENGINE].engine  # noqa: SLF001 - a copy of this object
        return module


def structuring(spec: pytree.TreeSpec) -> Callable[[list[Any]], Any]:
    """Return the function that gives a list of outputs the structure of the model's outputs."""
    count = spec.num_leaves
    simple: Callable[[list[Any]], Any]
    if spec == pytree.tree_structure(0):
        simple = itemgetter(0)
    elif spec == pytree.tree_structure((0,) * count):
        simple = tuple
    elif spec == pytree.tree_structure([0] * count):
        simple = list
    else:
        return lambda outputs: pytree.tree_unflatten(outputs, spec)

    def structured(outputs: list[Any]) -> Any:
        # torch's function raises the error if their number is wrong
        is_right = len(outputs) == count
        return simple(outputs) if is_right else pytree.tree_unflatten(outputs, spec)

    return structured


def engine_on(
    runner: Any, library: Path, device: str, mutable: frozenset[str]
) -> AOTInductorEngine:
    """Return the best engine for a library, with the weights that a container has.

    Args:
        runner: The container, behind torch's binding.
        library: The library.
        device: Device that it was compiled for.
        mutable: Slots that calls change in place.
    """
    swapping = SwappingEngine(runner, mutable)  # checks names and layouts
    found = native.opened(library, device)
    if isinstance(found, str):
        swapping.binding = found
        return swapping
    # copies: the container's own memory goes with it
    tensors = {name: like(t).copy_(t) for name, t in swapping.live.items()}
    return PublishingEngine.owning(found, tensors, mutable)
