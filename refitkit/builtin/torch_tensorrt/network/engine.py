"""One part of a network module as an engine: values in a file, engine bytes in another.

A refit writes the new values into a second file, which is mapped, and has the session build with
them. It keeps the first for the way back. All that can fail does before the commit: committing and
rolling back only say which files are live.
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
    """Values, and the engine that was built with them.

    Attributes:
        region: The values.
        engine: The engine bytes; None for a part that torch runs.
    """

    region: Region
    engine: Path | None


class NetworkEngine:
    """One part; see ``refitkit.protocols.Engine``.

    Attributes:
        structure: What it is, apart from its weights.
    """

    def __init__(
        self,
        structure: Structure,
        slots: Sequence[Slot],
        builder: PartBuilder,
        scratch: ScratchFolder,
    ) -> None:
        """Take a part of a session; ``settle`` or ``adopt`` bring its values here.

        Args:
            structure: What it is.
            slots: Its slots, in the order of the session.
            builder: Builds it.
            scratch: Where its files go.
        """
        self.structure = structure
        self._slots = {slot.name: slot for slot in slots}
        self._builder, self._scratch = builder, scratch
        self._live: BuiltPart | None = None
        self._before: BuiltPart | None = None

    def settle(self, session: SessionClient) -> None:
        """Bring the values of a program into a file, and build with them.

        Args:
            session: The session that has the program with its values.

        Raises:
            CompileError: The part cannot be built.
        """
        path = self._scratch.new("weights")
        session.call("copy", engine=self.name, path=str(path))
        self._live = self._built(Region.open(path, self._slots.values()))

    def adopt(self, values: Mapping[str, torch.Tensor], engine: bytes | None) -> None:
        """Take values, and an engine that was built with them, instead of ``settle``."""
        region = Region.create(self._scratch.new("weights"), self._slots.values())
        for name, view in region.views.items():
            view.copy_(values[name].reshape(-1))
        path = None
        if engine is not None:
            path = self._scratch.new("engine")
            path.write_bytes(engine)
        self._live = BuiltPart(region, path)

    # -- what an engine offers --------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name of the part."""
        return self.structure.name

    @property
    def slots(self) -> Mapping[str, Slot]:
        """All weights of its layers, by engine weight name."""
        return self._slots

    @property
    def memory(self) -> EngineMemory:
        """The way back is a file with the previous values."""
        size = sum(slot.nbytes for slot in self._slots.values())
        return EngineMemory(engine=self.name, kind="mapped-file", bytes=size)

    def read(self, slot: str) -> torch.Tensor:
        """The live value of a slot: an alias, valid until the next commit."""
        return self.value_in(self.live, slot)

    def value_in(self, built: BuiltPart, slot: str) -> torch.Tensor:
        """The value of a slot in what was built with it: an alias."""
        shape = self._slots[slot].shape
        value = built.region.views[slot]
        return value if shape is None else value.view(shape)

    def free_spare(self) -> int:
        """Delete the weights and the engine before the last refit; returns the values' bytes."""
        before, self._before = self._before, None
        if before is None:
            return 0
        self._remove(before)
        return int(before.region.whole.nbytes)

    def previous(self) -> Mapping[str, torch.Tensor]:
        """The values in the file from before the last commit; once it is deleted, still mapped."""
        before = self._before
        return {} if before is None else {name: self.value_in(before, name) for name in self._slots}

    def stage(self, values: Sequence[SlotValue]) -> StagedBuild:
        """Build with new values for all slots; see ``refitkit.protocols.Engine``."""
        require_values(self._slots, values)
        return self._stage(values)

    def stage_partial(self, values: Sequence[SlotValue]) -> StagedBuild:
        """Build with new values for some slots, and the present ones for the others."""
        require_values(self._slots, values, partial=True)
        return self._stage(values)

    def _stage(self, values: Sequence[SlotValue]) -> StagedBuild:
        path = self._scratch.new("weights")
        self.free_spare()
        try:
            region = Region.create(path, self._slots.values())
            self._fill(region, values)
            built = self._built(region)
        except BaseException:
            self._scratch.remove(path)
            raise
        return StagedBuild(self, built)

    def _fill(self, region: Region, values: Sequence[SlotValue]) -> None:
        given = {value.slot.name for value in values}
        problems: list[Problem] = []
        with torch.no_grad():
            for value in values:
                tensor, view = value.load(), region.views[value.slot.name]
                wrong = list(_misfits(value.slot, tensor))
                problems += wrong
                if not wrong:
                    shape = value.slot.shape
                    (view if shape is None else view.view(shape)).copy_(
                        tensor.reshape(-1) if shape is None else tensor
                    )
            for name in self._slots.keys() - given:
                region.views[name].copy_(self.live.region.views[name])
        if problems:
            raise WeightMismatchError("Values do not fit their slots.", problems=problems)

    # -- used by what is staged -------------------------------------------------------------

    @property
    def live(self) -> BuiltPart:
        """What it holds now."""
        if self._live is None:
            raise EngineError(f"The engine {self.name!r} was not built yet.")
        return self._live

    def replace(self, built: BuiltPart) -> None:
        """Make something live, and keep what was."""
        self._live, self._before = built, self.live

    def abandon(self, built: BuiltPart) -> None:
        """Forget what was staged."""
        self._remove(built)

    def _remove(self, built: BuiltPart) -> None:
        self._scratch.remove(built.region.path, built.engine)

    def _built(self, region: Region) -> BuiltPart:
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
    """A built engine on its way in; see ``refitkit.protocols.StagedRefit``."""

    def __init__(self, engine: NetworkEngine, built: BuiltPart) -> None:
        """Made by the engine."""
        self._engine, self._built = engine, built
        self._before = engine.live

    def commit(self) -> None:
        """The new engine bytes and values are the engine's."""
        self._engine.replace(self._built)

    def rollback(self) -> None:
        """The old ones are again.

        The engine is asked which are: an interrupt may have come right after they were replaced.
        """
        if self._engine.live is self._before:
            self._engine.abandon(self._built)
        else:
            self._engine.replace(self._before)
            self._engine.free_spare()

    def discard(self) -> None:
        """Forget the new ones."""
        self._engine.abandon(self._built)

    def changed(self) -> bool:
        """Whether any bit of a value differs from the live ones."""
        return not torch.equal(self._built.region.whole, self._engine.live.region.whole)

    def staged(self, slot: str) -> torch.Tensor:
        """The new value of a slot: an alias."""
        return self._engine.value_in(self._built, slot)


def _misfits(slot: Slot, tensor: torch.Tensor) -> Iterator[Problem]:
    found, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
    if found != slot.dtype:
        yield Problem(slot.name, "dtype", found, slot.dtype)
    if (shape != slot.shape) if slot.shape is not None else (tensor.numel() != slot.count):
        yield Problem(slot.name, "shape", str(shape), str(slot.shape or f"{slot.count} elements"))


# MERGED scratch: Files of one module, and the session that builds with them.


class ScratchFolder:
    """A folder that is gone with the object, and files in it.

    They are those of the process that made them: in a fork of it they can only be read.
    """

    def __init__(self) -> None:
        """Make the folder."""
        self._folder = TemporaryFolder()
        self._owner = os.getpid()
        self._numbers = itertools.count(1)

    def new(self, suffix: str) -> Path:
        """Where a new file can be written.

        Raises:
            EngineError: This process was forked from the one that made the module.
        """
        if os.getpid() != self._owner:
            raise EngineError(
                "The module was made in the process that this one was forked from, and can only be "
                "refitted there.",
                hint="Load or compile it in this process.",
            )
        return self._folder.path / f"{next(self._numbers)}.{suffix}"

    def remove(self, *paths: Path | None) -> None:
        """Delete files, if they are this process's; what is mapped stays readable."""
        if os.getpid() == self._owner:
            for path in filter(None, paths):
                path.unlink(missing_ok=True)


class PartBuilder:
    """Builds parts with given values, in a session that is replaced when it has died.

    Sessions keep nothing of a build, so one that is new is as good as the old.
    """

    def __init__(self, session: SessionClient, again: Callable[[], SessionClient]) -> None:
        """Take a session.

        Args:
            session: Holds the networks.
            again: Makes another one with the same networks.
        """
        self._session, self._again = session, again
        self._lock = ForkedLock()

    def build(self, part: str, weights: Path, engine: Path) -> None:
        """Write the engine bytes of a part with these values.

        Raises:
            CompileError: TensorRT refused it.
            EngineError: The session died during this very build.
        """
        with self._lock.held:
            if not self._session.alive:
                self._session = self._again()
            session = self._session
        session.call("build", engine=part, path=str(engine), weights=str(weights))
