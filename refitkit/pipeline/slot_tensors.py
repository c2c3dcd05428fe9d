"""Tensors by slot as a weight source: what a module holds, and what a source would give it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import Problem, SourceError, UnsupportedTargetError
from refitkit.model import TensorInfo
from refitkit.pipeline.changes import live_value
from refitkit.protocols import SupportsReadback

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    import torch

    from refitkit.model import Slot
    from refitkit.pipeline.compiled import CompiledModule
    from refitkit.protocols import Engine, SlotValue




class SlotTensors:
    """Tensors by slot, read or computed when they are asked for.

    Attributes:
        description: What they are, in words.
        notes: How the names of the weights that they come from were read.
    """

    def __init__(
        self,
        description: str,
        tensors: Iterable[tuple[Slot, Callable[[], torch.Tensor]]],
        *,
        engines: int,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Read nothing yet.

        Args:
            description: What they are, in words.
            tensors: Slots, each with what loads its tensor.
            engines: Number of engines of the module: of several, names begin with the engine's.
            notes: How the names of the weights that they come from were read.
        """
        self.description, self.notes = description, notes
        self._tensors: Mapping[str, tuple[Slot, Callable[[], torch.Tensor]]] = {
            slot.name if engines == 1 else f"{slot.engine}/{slot.name}": (slot, load)
            for slot, load in tensors
        }

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All slots that there are tensors for."""
        return tuple(slot for slot, _ in self._tensors.values())

    def names(self) -> Collection[str]:
        """Names of the slots."""
        return self._tensors.keys()

    def info(self, fqn: str) -> TensorInfo:
        """What the engine says of a slot; where it knows no shape, the tensor is flat."""
        slot, _ = self._tensors[fqn]
        return TensorInfo(dtype=slot.dtype, shape=_shape(slot))

    def get(self, fqn: str) -> torch.Tensor:
        """Its tensor."""
        slot, load = self._tensors[fqn]
        value = load()
        return value.reshape(_shape(slot)) if value.numel() == slot.count else value


def held_by(compiled: CompiledModule, slots: Iterable[Slot]) -> SlotTensors:
    """What slots of a module hold, read or remembered.

    Raises:
        UnsupportedTargetError: Nobody knows it; lists the engines.
    """
    engines, listed = compiled.engines, tuple(slots)
    unknown = [
        name
        for name, engine in engines.items()
        if not isinstance(engine, SupportsReadback)
        and any(_known(engine, slot.name) is None for slot in listed if slot.engine == name)
    ]
    if unknown:
        raise UnsupportedTargetError(
            "Nobody knows what the module holds: some of its engines cannot be read, and were not "
            "refitted since they were opened.",
            problems=[Problem(name, "cannot be read") for name in unknown],
            hint="Compare with the weights that it was last refitted to, or made from.",
        )
    loads = [(slot, _reading(engines[slot.engine], slot.name)) for slot in listed]
    return SlotTensors(f"a module of {compiled.backend}", loads, engines=len(engines))


def given_by(
    description: str,
    compiled: CompiledModule,
    values: Iterable[SlotValue],
    *,
    notes: tuple[str, ...] = (),
) -> SlotTensors:
    """What slots of a module would get. A plan may know shapes that the engine does not."""
    loads = [(compiled.engines[v.slot.engine].slots[v.slot.name], v.load) for v in values]
    return SlotTensors(description, loads, engines=len(compiled.engines), notes=notes)


def _shape(slot: Slot) -> tuple[int, ...]:
    return slot.shape if slot.shape is not None else (slot.count,)


def _known(engine: Engine, slot: str) -> torch.Tensor | None:
    read = live_value(engine)
    return None if read is None else read(slot)


def _reading(engine: Engine, slot: str) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        value = _known(engine, slot)
        if value is None:
            raise SourceError(f"The engine {engine.name!r} does not know {slot!r} any more.")
        return value

    return load
