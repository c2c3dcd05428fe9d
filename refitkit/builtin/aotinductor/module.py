"""An opened AOTInductor module: call it, read it, save it, open it a second time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from refitkit.builtin.aotinductor import container, package
from refitkit.builtin.aotinductor.engine import ENGINE, AOTInductorEngine
from refitkit.builtin.aotinductor.inputs import CallSpec, InputChecker, run_unknown, spec_of
from refitkit.builtin.aotinductor.names import NAME
from refitkit.errors import EngineError, raise_if_resource
from refitkit.program import facts_of
from refitkit.replacing import replacing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch.export import ExportedProgram

    from refitkit.model import SlotKey
    from refitkit.temporary import TemporaryFolder


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

    def drain(self) -> None:
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
