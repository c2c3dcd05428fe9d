"""One part of a network module as an engine: values in one file, engine bytes in another.

A refit writes the new values to a second file, which is memory-mapped, and has the session build
with them. The first file stays for a rollback. Everything that can fail happens before the commit;
commit and rollback only change which files are live.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from refitkit.builtin.torch_tensorrt.worker.messages import Region
from refitkit.errors import EngineError, Problem, WeightMismatchError
from refitkit.files.temporary import TemporaryFolder
from refitkit.model import EngineMemory
from refitkit.processes import ForkedLock
from refitkit.program.dtypes import dtype_name
from refitkit.recipe.sources import require_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from refitkit.builtin.torch_tensorrt.parts import Structure
    from refitkit.builtin.torch_tensorrt.worker.client import SessionClient
    from refitkit.model import Slot
    from refitkit.protocols import SlotValue


@dataclass(frozen=True)
class BuiltPart:
    """Values of a part, and the engine that was built with them.

    Attributes:
        region: The values.
        engine: Path of the engine bytes; None for a part that torch runs.
    """

    region: Region
    engine: Path | None


class NetworkEngine:
    """One part of a network module; see ``refitkit.protocols.Engine``.

    Attributes:
        structure: The part's structure.
    """

    def __init__(
        self,
        structure: Structure,
        slots: Sequence[Slot],
        builder: PartBuilder,
        scratch: ScratchFolder,
    ) -> None:
        """Create an engine without values; call ``build_from_session`` or ``adopt`` next.

        Args:
            structure: The part's structure.
            slots: The part's slots, in the order of the session.
            builder: Builds the part.
            scratch: Folder for the part's files.
        """
        self.structure = structure
        self._slots = {slot.name: slot for slot in slots}
        self._builder, self._scratch = builder, scratch
        self._live: BuiltPart | None = None
        self._previous: BuiltPart | None = None

    def build_from_session(self, session: SessionClient) -> None:
        """Copy the program's values from a session into a file, and build with them.

        Args:
            session: The session that has the program with its values.

        Raises:
            CompileError: The part cannot be built.
        """
        path = self._scratch.new("weights")
        session.call("copy", engine=self.name, path=str(path))
        self._live = self._build(Region.open(path, self._slots.values()))

    def adopt(self, values: Mapping[str, torch.Tensor], engine: bytes | None) -> None:
        """Use existing values and the engine that was built with them, without a build.

        Args:
            values: Tensors by slot name, with the dtypes and counts of the slots.
            engine: The engine bytes; None for a part that torch runs.
        """
        region = Region.create(self._scratch.new("weights"), self._slots.values())
        for name, view in region.views.items():
            view.copy_(values[name].reshape(-1))
        path = None
        if engine is not None:
            path = self._scratch.new("engine")
            path.write_bytes(engine)
        self._live = BuiltPart(region, path)

    # -- the Engine protocol ----------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name of the part."""
        return self.structure.name

    @property
    def slots(self) -> Mapping[str, Slot]:
        """All weights of the part's layers, by engine weight name."""
        return self._slots

    @property
    def memory(self) -> EngineMemory:
        """Memory for a rollback: the file with the previous values."""
        size = sum(slot.nbytes for slot in self._slots.values())
        return EngineMemory(engine=self.name, kind="mapped-file", bytes=size)

    def read(self, slot: str) -> torch.Tensor:
        """The live value of a slot: a view, valid until the next commit."""
        return self.value_in(self.live, slot)

    def value_in(self, built: BuiltPart, slot: str) -> torch.Tensor:
        """The value of a slot in a build: a view."""
        shape = self._slots[slot].shape
        value = built.region.views[slot]
        return value if shape is None else value.view(shape)

    def free_spare(self) -> int:
        """Delete the files of the previous build, and return the size of its values in bytes."""
        previous, self._previous = self._previous, None
        if previous is None:
            return 0
        self._remove(previous)
        return int(previous.region.whole.nbytes)

    def previous(self) -> Mapping[str, torch.Tensor]:
        """The values before the last commit, by slot name; empty after ``free_spare``.

        Returned views stay valid when the files are deleted, because the files stay mapped.
        """
        previous = self._previous
        return (
            {}
            if previous is None
            else {name: self.value_in(previous, name) for name in self._slots}
        )

    def stage(self, values: Sequence[SlotValue]) -> StagedBuild:
        """Build with new values for all slots; see ``refitkit.protocols.Engine``."""
        require_values(self._slots, values)
        return self._stage(values)

    def stage_partial(self, values: Sequence[SlotValue]) -> StagedBuild:
        """Build with new values for some slots and the live values for the others."""
        require_values(self._slots, values, partial=True)
        return self._stage(values)

    def _stage(self, values: Sequence[SlotValue]) -> StagedBuild:
        path = self._scratch.new("weights")
        # the previous values go first, so that at most two sets of files exist at a time
        self.free_spare()
        try:
            region = Region.create(path, self._slots.values())
            self._fill(region, values)
            built = self._build(region)
        except BaseException:  # an interrupt too: no other code knows the file
            self._scratch.remove(path)
            raise
        return StagedBuild(self, built)

    def _fill(self, region: Region, values: Sequence[SlotValue]) -> None:
        replaced = {value.slot.name for value in values}
        problems: list[Problem] = []
        with torch.no_grad():
            for value in values:  # one at a time: all tensors together may not fit into memory
                tensor, view = value.load(), region.views[value.slot.name]
                wrong = list(_mismatches(value.slot, tensor))
                problems += wrong
                if not wrong:
                    shape = value.slot.shape
                    (view if shape is None else view.view(shape)).copy_(
                        tensor.reshape(-1) if shape is None else tensor
                    )
            # the build reads one file, so a partial refit copies the other values into it
            for name in self._slots.keys() - replaced:
                region.views[name].copy_(self.live.region.views[name])
        if problems:
            raise WeightMismatchError("Values do not fit their slots.", problems=problems)

    # -- used by StagedBuild ----------------------------------------------------------------

    @property
    def live(self) -> BuiltPart:
        """The current build.

        Raises:
            EngineError: The part is not built yet.
        """
        if self._live is None:
            raise EngineError(f"The engine {self.name!r} is not built yet.")
        return self._live

    def replace(self, built: BuiltPart) -> None:
        """Make a build live, and keep the live one as the previous."""
        self._live, self._previous = built, self.live

    def remove_build(self, built: BuiltPart) -> None:
        """Delete the files of a staged build."""
        self._remove(built)

    def _remove(self, built: BuiltPart) -> None:
        self._scratch.remove(built.region.path, built.engine)

    def _build(self, region: Region) -> BuiltPart:
        if not self.structure.accelerated:
            return BuiltPart(region, None)
        path = self._scratch.new("engine")
        try:
            self._builder.build(self.name, region.path, path)
        except BaseException:
            self._scratch.remove(path)
            raise
        return BuiltPart(region, path)


class StagedBuild:
    """A staged build; see ``refitkit.protocols.StagedRefit``."""

    def __init__(self, engine: NetworkEngine, built: BuiltPart) -> None:
        """Stage a build; ``NetworkEngine.stage`` calls this.

        Args:
            engine: The engine.
            built: The build with the new values.
        """
        self._engine, self._build = engine, built
        self._previous = engine.live

    def commit(self) -> None:
        """Make the new values and engine bytes live."""
        self._engine.replace(self._build)

    def rollback(self) -> None:
        """Restore the old values and engine bytes.

        It checks which build is live, because an interrupt can come during ``commit``, after the
        replacement.
        """
        if self._engine.live is self._previous:
            self._engine.remove_build(self._build)
        else:
            self._engine.replace(self._previous)
            self._engine.free_spare()

    def discard(self) -> None:
        """Delete the new values and engine bytes."""
        self._engine.remove_build(self._build)

    def changed(self) -> bool:
        """Whether any bit of a new value differs from the live values."""
        return not torch.equal(self._build.region.whole, self._engine.live.region.whole)

    def staged(self, slot: str) -> torch.Tensor:
        """The new value of a slot: a view."""
        return self._engine.value_in(self._build, slot)


def _mismatches(slot: Slot, tensor: torch.Tensor) -> Iterator[Problem]:
    found, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
    if found != slot.dtype:
        yield Problem(slot.name, "dtype", found, slot.dtype)
    if (shape != slot.shape) if slot.shape is not None else (tensor.numel() != slot.count):
        yield Problem(slot.name, "shape", str(shape), str(slot.shape or f"{slot.count} elements"))


# -- files and builds of a module ----------------------------------------------------------------


class ScratchFolder:
    """A temporary folder that is deleted together with the object.

    Only the process that created it writes files; a forked process can only read them.
    """

    def __init__(self) -> None:
        """Create the folder."""
        self._folder = TemporaryFolder()
        self._owner = os.getpid()
        self._numbers = itertools.count(1)

    def new(self, suffix: str) -> Path:
        """A path for a new file.

        Args:
            suffix: Suffix of the file name, without the dot.

        Raises:
            EngineError: The folder belongs to the parent of this forked process.
        """
        if os.getpid() != self._owner:
            raise EngineError(
                "The module belongs to the parent of this forked process and can only be refitted "
                "there.",
                hint="Load or compile the module in this process.",
            )
        return self._folder.path / f"{next(self._numbers)}.{suffix}"

    def remove(self, *paths: Path | None) -> None:
        """Delete files, unless this is a forked process. Mapped values stay readable."""
        if os.getpid() == self._owner:
            for path in filter(None, paths):
                # a rollback that was interrupted is repeated, and removes its files again
                path.unlink(missing_ok=True)


class PartBuilder:
    """Builds parts with given values, and replaces its session after the session died.

    Sessions store nothing about earlier builds, so a new session works as well as the old one.
    """

    def __init__(self, session: SessionClient, restart: Callable[[], SessionClient]) -> None:
        """Create a builder.

        Args:
            session: The session with the networks.
            restart: Creates another session with the same networks.
        """
        self._session, self._restart = session, restart
        self._lock = ForkedLock()

    def build(self, part: str, weights: Path, engine: Path) -> None:
        """Build a part and write its engine bytes.

        Args:
            part: Name of the part.
            weights: File with the values; see ``worker.messages.Region``.
            engine: File for the engine bytes.

        Raises:
            CompileError: TensorRT refuses the network.
            EngineError: The session died during this build.
        """
        with self._lock.held:
            # a session can die by itself, for example if memory runs out
            if not self._session.alive:
                self._session = self._restart()
            session = self._session
        # outside the lock: a build takes long, and the session has a lock of its own
        session.call("build", engine=part, path=str(engine), weights=str(weights))
