"""Fill an arena with the values of a refit, and do it faster if the last refit was alike.

``Filler`` checks the caller's values and copies them. The values of a service's refits are alike
(``SteadyValues``): the same slots, read in the same way from tensors with the same headers. Then
nothing is checked or looked up for each value again, and the arena copies all values as before.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch

from refitkit.builtin.torch_tensorrt.weight_buffers import Constant
from refitkit.errors import Problem, WeightMismatchError
from refitkit.program.dtypes import dtype_name, dtype_of
from refitkit.protocols import SlotValue, SteadyValues

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from refitkit.builtin.torch_tensorrt.refitter import WeightSpec
    from refitkit.builtin.torch_tensorrt.weight_buffers import Uploader, ValueArena
    from refitkit.protocols import StagedRefit


class Filler:
    """Copies values into the arenas of one engine."""

    def __init__(self, uploader: Uploader) -> None:
        """Know no values yet.

        Args:
            uploader: Makes the copies.
        """
        self._uploader = uploader
        self._last: _Noted | None = None

    def knows(self, values: Sequence[SlotValue]) -> bool:
        """Whether these values were the last that filled an arena, so that their names fit."""
        return self._last is not None and self._last.values() is values

    def forget(self) -> None:
        """Know no values: the next ones are checked."""
        self._last = None

    def fill(
        self,
        arena: ValueArena,
        specs: Mapping[str, WeightSpec],
        values: Sequence[SlotValue],
        live: ValueArena | None = None,
    ) -> None:
        """Copy values into an arena. The caller may change its tensors once this has ended.

        A constant of the plan that the arena already holds is not copied again: some networks have
        more constants than weights.

        Args:
            arena: Destination of the copies.
            specs: Dtype, count and shape that the engine requires of each weight, by name.
            values: Values of all or some weights.
            live: Arena that holds the live values, if one does.

        Raises:
            WeightMismatchError: Some values have the wrong dtype, count or shape; lists all of
                them. The values that fit were copied.
        """
        # first, because an interrupt may have come before the end of an earlier filling
        arena.begin(self._uploader)
        last = self._last if self.knows(values) else None
        problems: list[Problem] = []
        copied: dict[str, Constant] = {}
        try:
            with torch.no_grad():
                if last is None or not self._holds(arena, last):
                    copied = self._copy(arena, specs, values, problems)
                else:
                    computed = [values[place] for place in last.computed]
                    self._copy(arena, specs, computed, problems)
                    # they are tensors in memory, so loading all at once takes none
                    moved = [load() for load in last.loads]
                    arena.copy_alike(last.names, moved, self._uploader, live)
        finally:
            self._finish(arena)
        arena.constants |= copied  # only now: a copy that failed must not count as done
        if problems:
            raise WeightMismatchError("Values do not fit the engine.", problems=problems)
        if isinstance(values, SteadyValues) and last is None:
            self._last = _Noted.of(values)  # at once: an interrupt comes before or after it

    def _finish(self, arena: ValueArena) -> None:
        """Make all pending copies. Nothing reads the caller's tensors once this has ended."""
        try:
            with torch.no_grad():
                arena.finish(self._uploader)
        except BaseException:
            self._uploader.wait()
            raise

    @staticmethod
    def _holds(arena: ValueArena, last: _Noted) -> bool:
        """Whether an arena holds all constants, and nothing else is one."""
        constants = arena.constants
        for name, load in last.pinned:
            held, tensor = constants.get(name), load()
            if held is None or not held.still_is(tensor):
                return False
        return constants.keys().isdisjoint(last.names)

    def _copy(
        self,
        arena: ValueArena,
        specs: Mapping[str, WeightSpec],
        values: Sequence[SlotValue],
        problems: list[Problem],
    ) -> dict[str, Constant]:
        """Copy values one by one, and note those that do not fit. Return the constants."""
        copied: dict[str, Constant] = {}
        constants = arena.constants
        dtypes = {name: dtype_of(name) for name in {spec.dtype for spec in specs.values()}}
        for value in values:
            name, tensor = value.slot.name, value.load()
            constant = Constant.of(tensor) if value.pinned else None
            if constant and constant.is_same_as(constants.get(name)):
                continue
            spec = specs[name]
            # the cheap comparison comes first: most values fit
            if tensor.dtype is not dtypes[spec.dtype] or tensor.shape != spec.shape:
                mismatches = list(_mismatches(spec, tensor))
                problems += mismatches
                if mismatches:
                    continue
            if name in constants:
                del constants[name]
            arena.copy(name, tensor, self._uploader)
            if constant:
                copied[name] = constant
        return copied


class ArrivingValues:
    """Values of one engine that are staged as they arrive; see ``refitkit.protocols.Filling``."""

    def __init__(
        self, add: Callable[[Sequence[SlotValue]], None], finish: Callable[[], StagedRefit]
    ) -> None:
        """Create the handle; an engine calls this once its staging arena is ready.

        Args:
            add: Copies values into the staging arena.
            finish: Checks the arena, and makes it a staged refit.
        """
        self.add, self.finish = add, finish

    def discard(self) -> None:
        """Do nothing: the next refit overwrites the staging arena."""


class _Noted(NamedTuple):
    """What is known of values that filled an arena.

    Attributes:
        values: The values.
        pinned: Names and loaders of those that the plan keeps.
        computed: Places of those that are computed each time.
        loads: Load the others, which are tensors of the source.
        names: Names of the slots of those.
    """

    values: weakref.ref[SteadyValues]
    pinned: list[tuple[str, Callable[[], torch.Tensor]]]
    computed: list[int]
    loads: list[Callable[[], torch.Tensor]]
    names: tuple[str, ...]

    @classmethod
    def of(cls, values: SteadyValues) -> _Noted:
        pinned = [(value.slot.name, value.load) for value in values if value.pinned]
        computed, moved = list[int](), list[SlotValue]()
        for place, value in enumerate(values):
            if not value.pinned and not value.identity:
                computed.append(place)
            elif not value.pinned:
                moved.append(value)
        names = tuple(value.slot.name for value in moved)
        return cls(weakref.ref(values), pinned, computed, [value.load for value in moved], names)


def _mismatches(spec: WeightSpec, tensor: torch.Tensor) -> Iterator[Problem]:
    """Problems of a tensor as a value of a weight. Any shape fits if the spec has none."""
    kind = dtype_name(tensor.dtype)
    if kind != spec.dtype:
        yield Problem(spec.name, "dtype", kind, spec.dtype)
    if tensor.numel() != spec.count:
        found = f"{tensor.numel()} {tuple(tensor.shape)}"
        yield Problem(spec.name, "number of elements", found, str(spec.count))
    elif spec.shape is not None and tuple(tensor.shape) != spec.shape:
        yield Problem(spec.name, "shape", str(tuple(tensor.shape)), str(spec.shape))
