"""The tensors of a part that torch executes, as an engine of the same transaction.

Torch-TensorRT leaves some operators of a program to torch, as child modules. ``TorchPartEngine``
stages new values beside the tensors of one child. ``StagedTensors`` writes them in place, so that
every reference to a tensor, such as a captured CUDA graph, gets the new values.
"""

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
    """Parameters, buffers and constants of a torch module; see ``refitkit.protocols.Engine``."""

    def __init__(self, name: str, module: GraphModule, mutable: Collection[str] = ()) -> None:
        """Touch nothing yet.

        Args:
            name: Name of the child module, and of the engine.
            module: The child module.
            mutable: Names of tensors that calls change.
        """
        self._name = name
        self._module = module
        self._mutable = frozenset(mutable)
        self._new: Tensors = {}
        self._old: Tensors = {}
        # names whose old values are those from before the last commit
        self._previous: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the engine."""
        return self._name

    @cached_property
    def slots(self) -> Mapping[str, Slot]:
        """One slot per tensor, by its name in the module. A tied tensor has a slot per name."""
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
        """The live tensors, detached, by name: aliases."""
        return {name: tensor.detach() for name, tensor in tensors_in(self._module).items()}

    @property
    def memory(self) -> EngineMemory:
        """Memory of the new and the old values together: twice the size of the tensors."""
        size = sum(2 * tensor.nbytes for tensor in self.live.values())
        return EngineMemory(engine=self._name, kind="device", bytes=size)

    def read(self, slot: str) -> torch.Tensor:
        """The live tensor of a slot, detached: an alias.

        Raises:
            KeyError: The module has no tensor of this name.
        """
        return tensor_in(self._module, slot).detach()

    # -- staging ----------------------------------------------------------------------------

    def stage(self, values: Sequence[SlotValue]) -> StagedTensors:
        """Copy new values for all tensors.

        Raises:
            WeightMismatchError: Names, dtypes, shapes or ties are wrong; lists all problems.
        """
        return self._stage(values, partial=False)

    def stage_partial(self, values: Sequence[SlotValue]) -> StagedTensors:
        """Copy new values for some tensors.

        Raises:
            WeightMismatchError: Names, dtypes, shapes or ties are wrong; lists all problems.
        """
        return self._stage(values, partial=True)

    def _stage(self, values: Sequence[SlotValue], *, partial: bool) -> StagedTensors:
        live = self.live
        problems = odd_names(live, values, partial=partial)
        names: list[str] = []
        with torch.no_grad():
            for value in (known for known in values if known.slot.name in live):
                name, tensor = value.slot.name, value.load()
                mismatches = list(_mismatches(name, live[name], tensor))
                problems += mismatches
                if not mismatches:
                    names.append(name)
                    _buffer(self._new, name, live[name]).copy_(tensor)
                    # allocate now: running out of memory must fail the staging, not the commit
                    _buffer(self._old, name, live[name])
        _synchronize(self._new.values())
        problems += _tie_conflicts({name: live[name] for name in names}, self._new)
        if problems:
            raise WeightMismatchError("Values do not fit the module.", problems=problems)
        return StagedTensors(self, live, names)

    @property
    def buffers(self) -> tuple[Tensors, Tensors]:
        """Staged new values, and buffers for the old values, by name."""
        return self._new, self._old

    def set_previous(self, names: Sequence[str]) -> None:
        """Record the tensors whose old values are those from before the last commit."""
        self._previous = tuple(names)

    def previous(self) -> Tensors:
        """The values from before the last commit, of the tensors that it changed: aliases."""
        return {name: self._old[name] for name in self._previous}

    def free_spare(self) -> int:
        """Free the buffers of new and old values and return their size in bytes."""
        self.set_previous(())
        freed = sum(t.nbytes for tensors in (self._new, self._old) for t in tensors.values())
        self._new, self._old = {}, {}
        return freed


class StagedTensors:
    """New values beside the live tensors; see ``refitkit.protocols.StagedRefit``."""

    def __init__(self, engine: TorchPartEngine, live: Tensors, names: Sequence[str]) -> None:
        """Record what to write. Only ``TorchPartEngine`` creates one.

        Args:
            engine: The engine.
            live: Live tensors by name.
            names: Names of the tensors to write.
        """
        self._engine, self._live, self._names = engine, live, names
        self._new, self._old = engine.buffers
        self._saved: list[str] = []

    def commit(self) -> None:
        """Save the live values and write the new ones, on the current streams."""
        self._engine.set_previous(())
        with torch.no_grad():
            # only now, not when staging: calls may have changed the live values since
            for name in self._names:
                self._old[name].copy_(self._live[name])
            # from here on a rollback writes: before, the old values may be incomplete
            self._saved = list(self._names)
            for name in self._names:
                self._live[name].copy_(self._new[name])
        self._engine.set_previous(self._names)

    def rollback(self) -> None:
        """Write the saved values. Do nothing if the commit saved none."""
        self._engine.set_previous(())
        with torch.no_grad():
            for name in self._saved:
                self._live[name].copy_(self._old[name])
        _synchronize(self._live.values())

    def discard(self) -> None:
        """Do nothing: the next refit overwrites the buffers."""

    def changed(self) -> bool:
        """Whether any bit differs from the live values."""
        return any(not same_bits(self._new[name], self._live[name]) for name in self._names)

    def staged(self, slot: str) -> torch.Tensor:
        """The new value of a slot: an alias."""
        return self._new[slot]


def _mismatches(name: str, live: torch.Tensor, value: torch.Tensor) -> Iterator[Problem]:
    """Problems of a value for a live tensor: dtype, shape, or a layout that cannot be written."""
    found = f"{dtype_name(value.dtype)} {tuple(value.shape)}"
    wanted = f"{dtype_name(live.dtype)} {tuple(live.shape)}"
    if found != wanted:
        yield Problem(name, "value", found, wanted)
    elif _overlaps(live):
        # such a tensor, an expanded one, cannot take different elements
        yield Problem(name, "layout", f"strides {live.stride()}", "elements of its own")


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements share memory: a dimension larger than 1 has stride 0."""
    return any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def _buffer(buffers: Tensors, name: str, like: torch.Tensor) -> torch.Tensor:
    """The buffer of a name, allocated on the device of a tensor if it is not there yet."""
    buffer = buffers.get(name)
    if buffer is None or buffer.device != like.device:
        buffer = buffers[name] = torch.empty_like(like)
    return buffer


def _tie_conflicts(live: Tensors, new: Tensors) -> Iterator[Problem]:
    """Names of one live tensor whose new values differ."""
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in live.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        # empty tensors share the address 0 without being tied
        other = first.setdefault(place, name) if tensor.numel() else name
        if other != name and not same_bits(new[name], new[other]):
            yield Problem(name, "tie", f"another value than {other}", "one value: one tensor")


def _synchronize(tensors: Collection[torch.Tensor]) -> None:
    """Wait for all CUDA devices that hold these tensors."""
    for device in {t.device for t in tensors if t.device.type == "cuda"}:
        torch.cuda.synchronize(device)
