"""Values of all weights as an engine keeps them: a second piece of memory in the same layout."""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import torch

from refitkit.builtin.torch_tensorrt.direct.folds import FoldsAtOnce
from refitkit.builtin.torch_tensorrt.direct.moves import Moves, PieceCopy, dense_digits_of, is_plain
from refitkit.builtin.torch_tensorrt.direct.places import Place, words_of
from refitkit.builtin.torch_tensorrt.direct.screening import Sample, Screen
from refitkit.builtin.torch_tensorrt.weight_buffers import Arena, Layout, stored
from refitkit.program.bits import same_bits, same_memory
from refitkit.program.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from refitkit.builtin.torch_tensorrt.direct.layout import EngineLayout, Parts
    from refitkit.builtin.torch_tensorrt.direct.moves import Kind, Mover, Way
    from refitkit.builtin.torch_tensorrt.refitter import WeightSpec
    from refitkit.builtin.torch_tensorrt.weight_buffers import Constant, Uploader, ValueArena

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
        writes: How often values were written.
    """

    def __init__(
        self,
        layout: EngineLayout,
        specs: Mapping[str, WeightSpec],
        piece: torch.Tensor,
        parts: Parts,
        mover: Mover,
    ) -> None:
        """Allocate it.

        Args:
            layout: The layout.
            specs: All weights by name.
            piece: The engine's memory. What lies between its weights is copied.
            parts: What of the memory a commit copies.
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
        self._folds = FoldsAtOnce(
            layout.folds, layout.places, self._folded.views, runs, mover.kernels
        )
        self._is_folded = False
        self._answers_due = torch.zeros(2, dtype=torch.int32, device=device)
        doubt, differs = self._answers_due.split(1)  # type: ignore[no-untyped-call] # torch's
        self._screen = Screen(self._looked_at(), doubt, mover.kernels)
        self._screen_of_fixed = Screen(list(self.fixed.runs.values()), doubt, mover.kernels)
        self._sample = Sample(layout, self.memory, differs, mover.kernels)
        self._rooms: list[tuple[str, torch.Tensor]] = []
        self._room_bytes = 0
        self._values: dict[str, torch.Tensor] = {}
        self._alike: _Alike | None = None
        self._asked: PlacedArena | None = None  # the arena that the pending checks compare with
        self._seen = torch.zeros(2, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._answers: _Answers | None = None
        self.writes = 0
        self._over = PieceCopy(parts, self.memory, piece, mover)
        PieceCopy(parts, piece, self.memory, mover)()  # compiles the kernels, and changes nothing

    @property
    def commits_fast(self) -> bool:
        """Whether few launches make a commit."""
        return self._over.is_fast

    def commit(self) -> None:
        """Copy the weights over those of the engine, on the current stream. Norms are folded."""
        self._over()

    def _looked_at(self) -> list[torch.Tensor]:
        """All values but those of fixed weights, flat where nothing lies in between."""
        found = list(self._folded.runs.values())
        for name, place in self._layout.places.items():
            words = self._words[self._layout.dtypes[name]]
            dense = place.is_dense
            found.append(words[place.start : place.end] if dense else place.of_piece(words))
        return found

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
        answers = self._answers
        if answers is not None and answers.differ_from(other):
            return False
        self.fold()
        other.fold()
        # the usual answer: each question to a GPU takes a while
        self._answers_due.zero_()
        self._sample.ask(other.memory)
        if self._answers_due[1].item():
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
        if self._answers is not None:
            return self._answers.is_finite
        self._answers_due.zero_()
        self._ask_if_finite()
        return not self._answers_due[0].item()

    def _ask_if_finite(self) -> None:
        self._screen.ask()
        # fixed weights that the engine takes are those that it holds
        if self.accepted is None:
            self._screen_of_fixed.ask()

    def _forget_answers(self) -> None:
        self._answers = None
        self.writes += 1

    # -- writing ----------------------------------------------------------------------------

    def begin(self, uploader: Uploader) -> None:
        """Drop pending copies; see ``ValueArena``."""
        self._rooms, self._room_bytes, self._asked = [], 0, None
        self._mover.forget()
        uploader.forget()

    def copy(self, name: str, value: torch.Tensor, uploader: Uploader) -> None:
        """Copy a value; see ``ValueArena``."""
        self._forget_answers()
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
        self,
        names: tuple[str, ...],
        values: Sequence[torch.Tensor],
        uploader: Uploader,
        live: ValueArena | None,
    ) -> None:
        """Copy values; see ``ValueArena``.

        With kernels, all of them are moved, norms are folded, and sums and samples are taken
        together. So the questions whether values are finite and new need not wait for the device.
        """
        alike = self._alike
        if alike is None or alike.names is not names:
            for name, value in zip(names, values, strict=True):
                self.copy(name, value, uploader)
            self._alike = self._noted(names, values)
            return
        self._forget_answers()
        self._is_folded = False
        if alike.moves_fixed:
            self.accepted = None
        for place in alike.rest:
            self.copy(names[place], values[place], uploader)
        # launch queued copies first, because the checks below read all values
        self._move_all(uploader)
        uploader.flush()
        moved = [values[place] for place in alike.moved]
        if isinstance(live, PlacedArena) and self._is_written(alike, moved, live):
            self._asked = live
            return
        for place, value in zip(alike.moved, moved, strict=True):
            self.copy(names[place], value, uploader)

    def _is_written(self, alike: _Alike, values: Sequence[torch.Tensor], live: PlacedArena) -> bool:
        """Launch all moves and checks. Return False if the kernels cannot read some values."""
        moves = alike.moves
        if moves is not None:
            if not moves.give(list(map(torch.Tensor.data_ptr, values))):
                return False
            if not moves.launch(self.memory):
                self._alike = None
                return False
        self._folds.write(self._words)
        live.fold()
        self._answers_due.zero_()
        self._ask_if_finite()
        self._sample.ask(live.memory)
        self._seen.copy_(self._answers_due, non_blocking=True)
        return True

    def _noted(self, names: tuple[str, ...], values: Sequence[torch.Tensor]) -> _Alike:
        """How values were copied."""
        groups: dict[Kind, list[tuple[Way, int]]] = defaultdict(list)
        rest = []
        for place, (name, value) in enumerate(zip(names, values, strict=True)):
            beside = self._beside.get(name)
            if beside is None:
                way = self._way(name, value)
            else:
                way = self._way_beside(beside.views[name], value)
            if way is None or way.kind is None or self._mover.kernels is None:
                rest.append(place)
            else:
                groups[way.kind].append((way, place))
        ways = {kind: [way for way, _ in some] for kind, some in groups.items()}
        return _Alike(
            names,
            Moves(ways, self._mover.kernels, self._device) if ways else None,
            [place for some in groups.values() for _, place in some],
            rest,
            any(self._beside.get(name) is self.fixed for name in names),
        )

    def _way_beside(self, target: torch.Tensor, value: torch.Tensor) -> Way | None:
        """The way of a value to a weight that lies beside the engine's layout."""
        if value.device != self._device or not value.is_contiguous() or value.is_neg():
            return None
        # relative to the engine's layout, so that one launch can write to both
        start = (target.data_ptr() - self.memory.data_ptr()) // target.itemsize
        digits = ((target.numel(), 1),) if target.numel() > 1 else ()
        return self._mover.way_to(Place(start, digits), value.reshape(-1))

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
            if self._asked is not None:
                doubt, differs = self._seen.tolist()
                live = self._asked
                self._answers = _Answers(
                    weakref.ref(live), live.writes, is_finite=not doubt, differs=bool(differs)
                )
                self._is_folded = True
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
        # first, because an interrupt may follow
        self._is_folded, self.accepted = False, None
        self._forget_answers()
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
        self._forget_answers()
        values = {name: self.value(name) for name in self._specs}
        self.memory.copy_(self._layout.written(piece, values))


class _Alike(NamedTuple):
    """How values were copied, for values with the same headers.

    Attributes:
        names: Their names: this very object.
        moves: Launches for the values that kernels can move; None if there are none.
        moved: Places of those among the names.
        rest: Places of the others.
        moves_fixed: Whether some of all are weights that stay fixed.
    """

    names: tuple[str, ...]
    moves: Moves | None
    moved: list[int]
    rest: list[int]
    moves_fixed: bool


class _Answers(NamedTuple):
    """What is known of all values.

    Attributes:
        live: The arena that they were compared with.
        writes: How often it had been written to.
        is_finite: Whether they are surely finite.
        differs: Whether they surely differ from those.
    """

    live: weakref.ref[PlacedArena]
    writes: int
    is_finite: bool
    differs: bool

    def differ_from(self, other: PlacedArena) -> bool:
        """Whether they surely differ from the values of an arena."""
        return self.differs and self.live() is other and other.writes == self.writes


def fixed_layout(layout: EngineLayout, specs: Mapping[str, WeightSpec]) -> Layout:
    """Return how the weights that stay fixed lie in an arena.

    Args:
        layout: Layout of the engine.
        specs: All weights by name.
    """
    return Layout.of(specs[name] for name in layout.fixed)
