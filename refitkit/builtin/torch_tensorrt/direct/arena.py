"""Values of all weights as an engine keeps them: a second piece of memory in the same layout."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch

from refitkit.builtin.torch_tensorrt.direct.folds import FoldsAtOnce
from refitkit.builtin.torch_tensorrt.direct.moves import dense_digits_of, is_plain
from refitkit.builtin.torch_tensorrt.direct.places import words_of
from refitkit.builtin.torch_tensorrt.weight_buffers import Arena, Layout, stored
from refitkit.program.bits import all_finite, all_finite_at_once, same_bits, same_memory
from refitkit.program.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from refitkit.builtin.torch_tensorrt.direct.layout import EngineLayout
    from refitkit.builtin.torch_tensorrt.direct.moves import Kind, Mover, Way
    from refitkit.builtin.torch_tensorrt.refitter import WeightSpec
    from refitkit.builtin.torch_tensorrt.weight_buffers import Constant, Uploader

_SAMPLE = 1 << 16
"""Elements that are compared before all others."""
_ROOM_BYTES = 256 << 20
"""Values of the host wait in so much memory of the device to be moved."""


class PlacedArena:
    """Memory for one value of each weight; see ``weight_buffers.ValueArena``.

    Most weights lie in ``memory``, which is laid out as the engine's own. So a commit is one copy
    of it. Weights of norms that are folded, and weights that stay fixed, lie beside it.

    Attributes:
        memory: As large as the engine's memory, as ``uint8``; what lies between the weights, too.
        fixed: The weights that stay fixed.
        accepted: What the engine held of them when they were found to be equal; None: not compared.
        constants: See ``ValueArena``.
        nbytes: See ``ValueArena``.
    """

    def __init__(
        self,
        layout: EngineLayout,
        specs: Mapping[str, WeightSpec],
        piece: torch.Tensor,
        mover: Mover,
    ) -> None:
        """Allocate it.

        Args:
            layout: The layout.
            specs: All weights by name.
            piece: The engine's memory. What lies between its weights is copied.
            mover: Moves values.
        """
        self._layout, self._specs, self._mover = layout, specs, mover
        self._device = device = piece.device
        self.memory = piece.clone()
        self.constants: dict[str, Constant] = {}
        self._words = {dtype: words_of(self.memory, dtype) for dtype in set(layout.dtypes.values())}
        folded = {name for fold in layout.folds for name in fold.names}
        self._folded = Arena(Layout.of(specs[name] for name in sorted(folded)), device)
        self.fixed = Arena(fixed_layout(layout, specs), device)
        self.accepted: torch.Tensor | None = None
        self._beside = {
            **dict.fromkeys(folded, self._folded),
            **dict.fromkeys(layout.fixed, self.fixed),
        }
        self.nbytes = self.memory.numel() + self._folded.nbytes + self.fixed.nbytes
        runs = {dtype_of(name): run for name, run in self._folded.runs.items()}
        self._folds = FoldsAtOnce(layout.folds, layout.places, self._folded.views, runs)
        self._is_folded = False
        self._rooms: list[tuple[str, torch.Tensor]] = []
        self._room_bytes = 0
        self._values: dict[str, torch.Tensor] = {}
        self._screened = self._screen()
        self._alike: _Alike | None = None

    def _screen(self) -> torch.dtype | None:
        """The dtype in which one look at all memory finds NaN and infinity; None if none does."""
        if len(self._words) > 1:
            return None
        (dtype,) = self._words
        first, last = self._layout.span
        whole = self.memory.clone()
        for view in self._layout.views(whole).values():
            view.zero_()
        return dtype if all_finite(words_of(whole[first:last], dtype)) else None

    # -- reading ----------------------------------------------------------------------------

    def value(self, name: str) -> torch.Tensor:
        """Return a weight; see ``ValueArena``."""
        found = self._values.get(name)
        if found is not None:
            return found
        if name in self._beside:
            found = self._beside[name].value(name)
        else:
            view = self._layout.places[name].of_piece(self._words[self._layout.dtypes[name]])
            shape = self._specs[name].shape
            found = view.reshape(-1 if shape is None else shape)
            if found.untyped_storage().data_ptr() != self.memory.data_ptr():
                return found  # a copy
        self._values[name] = found
        return found

    def same(self, other: PlacedArena) -> bool:
        """Return whether an arena of the same layout holds the same bits."""
        self.fold()
        other.fold()
        # the usual answer, from the first weight: each question to a GPU takes a while
        for name in islice(self._layout.places, 1):
            if not same_bits(self.value(name), other.value(name), first=_SAMPLE):
                return False
        if not all(a.same(b) for a, b in zip(self._apart, other._apart, strict=True)):
            return False
        # what lies between the weights may differ, and means nothing
        return same_memory(self.memory, other.memory) or all(
            same_bits(self.value(name), other.value(name)) for name in self._layout.places
        )

    @property
    def _apart(self) -> tuple[Arena, Arena]:
        return self._folded, self.fixed

    def is_finite(self) -> bool:
        """Return whether all values are surely finite."""
        if self._screened is None:
            return False
        first, last = self._layout.span
        words = words_of(self.memory[first:last], self._screened)
        # fixed weights that the engine takes are those that it holds
        fixed = () if self.accepted is not None else self.fixed.runs.values()
        return all_finite_at_once([words, *self._folded.runs.values(), *fixed])

    # -- writing ----------------------------------------------------------------------------

    def begin(self, uploader: Uploader) -> None:
        """Drop pending copies; see ``ValueArena``."""
        self._rooms, self._room_bytes = [], 0
        self._mover.forget()
        uploader.forget()

    def copy(self, name: str, value: torch.Tensor, uploader: Uploader) -> None:
        """Copy a value; see ``ValueArena``."""
        # the usual case: a value like one before
        way = self._way(name, value)
        if way is not None:
            self._mover.add(self.memory, way, value)
            return
        arena = self._beside.get(name)
        if arena is not None:
            if arena is self._folded:
                self._is_folded = False
            else:
                self.accepted = None
            arena.copy(name, value, uploader)
            return
        if value.device == self._device:
            self._move(name, stored(value))
        else:
            self._copy_by_room(name, stored(value), uploader)

    def copy_alike(
        self, names: tuple[str, ...], values: Sequence[torch.Tensor], uploader: Uploader
    ) -> None:
        """Copy values; see ``ValueArena``."""
        if self._alike is None or self._alike.names is not names:
            for name, value in zip(names, values, strict=True):
                self.copy(name, value, uploader)
            self._alike = self._noted(names, values)
            return
        for kind, ways, places in self._alike.moves:
            self._mover.move(kind, self.memory, ways, [values[place] for place in places])
        for place in self._alike.rest:
            self.copy(names[place], values[place], uploader)

    def _noted(self, names: tuple[str, ...], values: Sequence[torch.Tensor]) -> _Alike:
        """How values were copied."""
        moves: dict[Kind, tuple[list[Way], list[int]]] = {}
        rest = []
        for place, (name, value) in enumerate(zip(names, values, strict=True)):
            way = self._way(name, value)
            if way is None or way.kind is None:
                rest.append(place)
            else:
                ways, places = moves.setdefault(way.kind, ([], []))
                ways.append(way)
                places.append(place)
        return _Alike(names, [(kind, *some) for kind, some in moves.items()], rest)

    def _way(self, name: str, value: torch.Tensor) -> Way | None:
        """The way in which a value like this one was moved; None if there was none."""
        way = self._mover.ways.get((name, value.stride()))
        if (
            way is not None
            and value.shape == way.shape
            and value.device == self._device
            and not value.is_neg()
        ):
            return way
        return None

    def _move(self, name: str, value: torch.Tensor) -> None:
        place = self._layout.places[name]
        way = self._mover.way(name, place, value)
        if way is None:
            value = value.reshape(-1).contiguous()
            way = self._mover.way(name, place, value)
        if way is None:
            raise TypeError("a contiguous value has a way to each place")
        self._mover.add(self.memory, way, value)

    def _copy_by_room(self, name: str, value: torch.Tensor, uploader: Uploader) -> None:
        """Copy a value of the host: to where it lies, or to other memory to be moved there."""
        place = self._layout.places[name]
        if is_plain(dense_digits_of(place)):
            words = self._words[self._layout.dtypes[name]]
            uploader.copy(words[place.start : place.start + place.count], value)
            return
        room = torch.empty(place.count, dtype=value.dtype, device=self._device)
        uploader.copy(room, value)
        self._rooms.append((name, room))
        self._room_bytes += room.nbytes
        if self._room_bytes > _ROOM_BYTES:
            self._move_all(uploader)

    def _move_all(self, uploader: Uploader) -> None:
        uploader.flush()
        rooms, self._rooms, self._room_bytes = self._rooms, [], 0
        for name, room in rooms:
            self._move(name, room)
        self._mover.finish(self.memory)

    def finish(self, uploader: Uploader) -> None:
        """Make all pending copies, and wait for them; see ``ValueArena``."""
        try:
            self._move_all(uploader)
            uploader.finish()
        finally:
            self.begin(uploader)

    def rehearse(self, uploader: Uploader) -> None:
        """Fill it with zeros as with any values, so that all kernels are compiled and loaded.

        Args:
            uploader: Makes the copies.
        """
        self.constants.clear()
        self.begin(uploader)
        try:
            for name, spec in self._specs.items():
                shape = (spec.count,) if spec.shape is None else spec.shape
                zeros = torch.zeros(shape, dtype=dtype_of(spec.dtype), device=self._device)
                self.copy(name, zeros, uploader)
        finally:
            self.finish(uploader)
        self.fold()
        self.is_finite()
        self.same(self)

    def copy_from(self, other: PlacedArena) -> None:
        """Copy all values of an arena of the same layout, without synchronizing."""
        self.constants.clear()
        self._is_folded, self.accepted = False, None  # if it is interrupted
        self.memory.copy_(other.memory)
        self._folded.copy_from(other._folded)
        self.fixed.copy_from(other.fixed)
        self._is_folded, self.accepted = other._is_folded, other.accepted

    def fold(self) -> None:
        """Write what lies in the engine's memory instead of norms that are folded."""
        if not self._is_folded:
            self._folds.write(self._words)
            self._is_folded = True

    def take_between(self, piece: torch.Tensor) -> None:
        """Copy what lies between the weights in the engine's memory, and keep all values.

        Args:
            piece: The engine's memory.
        """
        values = {name: self.value(name) for name in self._specs}
        self.memory.copy_(self._layout.written(piece, values))


class _Alike(NamedTuple):
    """How values were copied, for values with the same headers.

    Attributes:
        names: Their names: this very object.
        moves: Kind, ways and places among the names of those that one launch moves.
        rest: Places of the others.
    """

    names: tuple[str, ...]
    moves: list[tuple[Kind, list[Way], list[int]]]
    rest: list[int]


def fixed_layout(layout: EngineLayout, specs: Mapping[str, WeightSpec]) -> Layout:
    """Return how the weights that stay fixed lie in an arena.

    Args:
        layout: Layout of the engine.
        specs: All weights by name.
    """
    return Layout.of(specs[name] for name in layout.fixed)
