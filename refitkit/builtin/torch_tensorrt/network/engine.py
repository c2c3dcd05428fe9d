"""One part of a network module as an engine: values in a file, engine bytes in another.

The session's network reads its weights from a mapped file, which this process maps, too. A refit
writes the new values into a second file, has the session read that one and build, and keeps the
first for the way back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from refitkit.builtin.torch_tensorrt.worker.regions import Region
from refitkit.errors import EngineError, Problem, WeightMismatchError
from refitkit.model import EngineMemory
from refitkit.program.dtypes import dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from refitkit.builtin.torch_tensorrt.parts import Structure
    from refitkit.builtin.torch_tensorrt.worker.client import SessionClient
    from refitkit.model import Slot
    from refitkit.protocols import SlotValue


@dataclass(frozen=True)
class Built:
    """Values, and the engine that was built with them.

    Attributes:
        region: The values.
        engine: The engine bytes; None for a part that torch runs.
    """

    region: Region
    engine: Path | None

    def remove(self) -> None:
        """Delete both files; what is mapped stays readable."""
        self.region.path.unlink(missing_ok=True)
        if self.engine is not None:
            self.engine.unlink(missing_ok=True)


class NetworkEngine:
    """One part; see ``refitkit.protocols.Engine``.

    Attributes:
        structure: What it is, apart from its weights.
    """

    def __init__(
        self, structure: Structure, slots: Sequence[Slot], session: SessionClient, folder: Path
    ) -> None:
        """Take a part of a session; ``settle`` brings its values here.

        Args:
            structure: What it is.
            slots: Its slots, in the order of the session.
            session: Holds the network.
            folder: Where its files go; its own.
        """
        self.structure = structure
        self._slots = {slot.name: slot for slot in slots}
        self._session, self._folder = session, folder
        self._number = 0
        self._live: Built | None = None
        self._before: Built | None = None

    def settle(self) -> None:
        """Bring the values of the session into a file, and build with them.

        Raises:
            CompileError: The part cannot be built.
        """
        path = self._new_path("weights")
        self._session.call("settle", engine=self.name, path=str(path))
        region = Region.open(path, self._slots.values())
        self._live = Built(region, self._build())

    def adopt(self, values: Mapping[str, torch.Tensor], engine: Path | None) -> None:
        """Take values, and an engine that was built with them, instead of ``settle``."""
        region = Region.create(self._new_path("weights"), self._slots.values())
        for name, view in region.views.items():
            view.copy_(values[name].reshape(-1))
        self._point(region)
        self._live = Built(region, engine)

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
        shape = self._slots[slot].shape
        value = self.live.region.views[slot]
        return value if shape is None else value.view(shape)

    def free_spare(self) -> int:
        """Delete the weights and the engine before the last refit; returns the values' bytes."""
        before, self._before = self._before, None
        if before is None:
            return 0
        before.remove()
        return int(before.region.whole.nbytes)

    def stage(self, values: Sequence[SlotValue]) -> StagedBuild:
        """Build with new values for all slots; see ``refitkit.protocols.Engine``."""
        missing = self._slots.keys() - {value.slot.name for value in values}
        if missing:
            problems = [Problem(name, "missing") for name in sorted(missing)]
            raise WeightMismatchError(
                "A full refit needs a value for every slot.", problems=problems
            )
        return self.stage_partial(values)

    def stage_partial(self, values: Sequence[SlotValue]) -> StagedBuild:
        """Build with new values for some slots, and the present ones for the others."""
        self.free_spare()
        region = Region.create(self._new_path("weights"), self._slots.values())
        try:
            self._fill(region, values)
            self._point(region)
            engine = self._build()
        except BaseException:
            self._point(self.live.region)
            region.path.unlink(missing_ok=True)
            raise
        return StagedBuild(self, Built(region, engine))

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
    def live(self) -> Built:
        """What it holds now."""
        if self._live is None:
            raise EngineError(f"The engine {self.name!r} was not built yet.")
        return self._live

    def replace(self, built: Built) -> Built:
        """Make something live; returns what was."""
        before = self.live
        self._point(built.region)
        self._live, self._before = built, before
        return before

    def abandon(self, built: Built) -> None:
        """Forget what was staged."""
        self._point(self.live.region)
        built.remove()

    def _point(self, region: Region) -> None:
        self._session.call("point", engine=self.name, path=str(region.path))

    def _build(self) -> Path | None:
        if not self.structure.accelerated:
            return None
        path = self._new_path("engine")
        self._session.call("build", engine=self.name, path=str(path))
        return path

    def _new_path(self, suffix: str) -> Path:
        self._number += 1
        return self._folder / f"{self._number}.{suffix}"


class StagedBuild:
    """A built engine on its way in; see ``refitkit.protocols.StagedRefit``."""

    def __init__(self, engine: NetworkEngine, built: Built) -> None:
        """Made by the engine."""
        self._engine, self._built = engine, built
        self._before: Built | None = None

    def commit(self) -> None:
        """The new engine bytes and values are the engine's."""
        self._before = self._engine.replace(self._built)

    def rollback(self) -> None:
        """The old ones are again."""
        if self._before is None:
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


def _misfits(slot: Slot, tensor: torch.Tensor) -> Iterator[Problem]:
    found, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
    if found != slot.dtype:
        yield Problem(slot.name, "dtype", found, slot.dtype)
    if (shape != slot.shape) if slot.shape is not None else (tensor.numel() != slot.count):
        yield Problem(slot.name, "shape", str(shape), str(slot.shape or f"{slot.count} elements"))
