"""A part of a module that torch executes, as an engine of the same transaction."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from refitkit.builtin.torch_tensorrt.networks import tensor_in, tensors_in
from refitkit.errors import Problem, WeightMismatchError
from refitkit.model import EngineMemory, Slot
from refitkit.program.bits import same_bits
from refitkit.program.dtypes import dtype_name
from refitkit.recipe.sources import odd_names

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch.fx import GraphModule

    from refitkit.protocols import SlotValue

Tensors = dict[str, torch.Tensor]


class TorchPartEngine:
    """Parameters, buffers and constants of a torch module, written in place.

    They stay the same tensors: whoever holds one, a captured graph for example, sees new values.
    """

    def __init__(self, name: str, module: GraphModule, mutable: Collection[str] = ()) -> None:
        """Touch nothing yet.

        Args:
            name: Name of the child that it is.
            module: The module.
            mutable: Names of tensors that calls change.
        """
        self._name = name
        self._module = module
        self._mutable = frozenset(mutable)
        self._new: Tensors = {}
        self._old: Tensors = {}
        self._before: tuple[str, ...] = ()  # of which the old values are those before a commit

    @property
    def name(self) -> str:
        """Its name."""
        return self._name

    @cached_property
    def slots(self) -> Mapping[str, Slot]:
        """All tensors, by their names in the module; a tied one has a slot for each name."""
        return {name: self._slot(name, tensor) for name, tensor in sorted(self.live.items())}

    def _slot(self, name: str, tensor: torch.Tensor) -> Slot:
        return Slot(
            engine=self._name,
            name=name,
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            count=tensor.numel(),
            device=str(tensor.device),
            readable=True,
            mutable=name in self._mutable,
        )

    @property
    def live(self) -> Tensors:
        """The tensors themselves, detached."""
        return {name: tensor.detach() for name, tensor in tensors_in(self._module).items()}

    @property
    def memory(self) -> EngineMemory:
        """Copies of what was live, and of what is to be."""
        size = sum(2 * tensor.nbytes for tensor in self.live.values())
        return EngineMemory(engine=self._name, kind="device", bytes=size)

    def read(self, slot: str) -> torch.Tensor:
        """The live tensor itself."""
        return tensor_in(self._module, slot).detach()

    def stage(self, values: Sequence[SlotValue]) -> StagedTensors:
        """Copy new values for all tensors.

        Raises:
            WeightMismatchError: Lists all that do not fit.
        """
        return self._stage(values, partial=False)

    def stage_partial(self, values: Sequence[SlotValue]) -> StagedTensors:
        """Copy new values for some tensors.

        Raises:
            WeightMismatchError: Lists all that do not fit.
        """
        return self._stage(values, partial=True)

    def _stage(self, values: Sequence[SlotValue], *, partial: bool) -> StagedTensors:
        live = self.live
        problems = odd_names(live, values, partial=partial)
        names: list[str] = []
        with torch.no_grad():
            for value in (known for known in values if known.slot.name in live):
                name, tensor = value.slot.name, value.load()
                found = list(_misfits(name, live[name], tensor))
                problems += found
                if not found:
                    names.append(name)
                    _room(self._new, name, live[name]).copy_(tensor)
                    _room(self._old, name, live[name])
        _drain(self._new.values())
        problems += _untied({name: live[name] for name in names}, self._new)
        if problems:
            raise WeightMismatchError("Values do not fit the module.", problems=problems)
        return StagedTensors(self, live, names)

    @property
    def copies(self) -> tuple[Tensors, Tensors]:
        """New values that are staged, and room for old ones."""
        return self._new, self._old

    def note_before(self, names: Sequence[str]) -> None:
        """Say of which tensors the old values are those from before the last commit."""
        self._before = tuple(names)

    def previous(self) -> Tensors:
        """The old values of the tensors that the last commit changed."""
        return {name: self._old[name] for name in self._before}

    def free_spare(self) -> int:
        """Free both copies; returns their bytes."""
        self.note_before(())
        freed = sum(t.nbytes for copies in (self._new, self._old) for t in copies.values())
        self._new, self._old = {}, {}
        return freed


class StagedTensors:
    """New values beside the live tensors."""

    def __init__(self, engine: TorchPartEngine, live: Tensors, names: Sequence[str]) -> None:
        """Made by ``TorchPartEngine.stage``."""
        self._engine, self._live, self._names = engine, live, names
        self._new, self._old = engine.copies
        self._kept: list[str] = []

    def commit(self) -> None:
        """Put the live values aside, which calls may have changed since, and write the new."""
        self._engine.note_before(())
        with torch.no_grad():
            for name in self._names:
                self._old[name].copy_(self._live[name])
            _drain(self._old.values())
            self._kept = list(self._names)
            for name in self._names:
                self._live[name].copy_(self._new[name])
        _drain(self._live.values())
        self._engine.note_before(self._names)

    def rollback(self) -> None:
        """Write the old values."""
        self._engine.note_before(())
        with torch.no_grad():
            for name in self._kept:
                self._live[name].copy_(self._old[name])
        _drain(self._live.values())

    def discard(self) -> None:
        """Leave the copies: the next refit writes over them."""

    def changed(self) -> bool:
        """Whether any bit differs from the live values."""
        return any(not same_bits(self._new[name], self._live[name]) for name in self._names)

    def staged(self, slot: str) -> torch.Tensor:
        """The copy of the new value of a slot."""
        return self._new[slot]


def _misfits(name: str, live: torch.Tensor, value: torch.Tensor) -> Iterator[Problem]:
    found = f"{dtype_name(value.dtype)} {tuple(value.shape)}"
    wanted = f"{dtype_name(live.dtype)} {tuple(live.shape)}"
    if found != wanted:
        yield Problem(name, "value", found, wanted)
    elif _overlaps(live):
        yield Problem(name, "layout", f"strides {live.stride()}", "elements of its own")


def _untied(live: Tensors, new: Tensors) -> Iterator[Problem]:
    """Names of one tensor whose new values differ."""
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in live.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        other = first.setdefault(place, name) if tensor.numel() else name
        if other != name and not same_bits(new[name], new[other]):
            yield Problem(name, "tie", f"another value than {other}", "one value: one tensor")


def _room(rooms: Tensors, name: str, like: torch.Tensor) -> torch.Tensor:
    room = rooms.get(name)
    if room is None or room.device != like.device:
        room = rooms[name] = torch.empty_like(like)
    return room


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether two elements may share memory: a dimension larger than 1 without a stride."""
    return any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def _drain(tensors: Collection[torch.Tensor]) -> None:
    for device in {t.device for t in tensors if t.device.type == "cuda"}:
        torch.cuda.synchronize(device)
