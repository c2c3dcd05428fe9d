"""Move values to the places where an engine keeps them.

A value has strides of its own, and so has its place. ``digits_of`` writes both as digits of one
index. Where all digits merge into one, the move is a plain copy; else elements change their order.
A few launches move all weights of an engine. Without Triton, torch makes one copy for each.
``Mover`` moves values of any refit, ``Moves`` those of refits that are alike. ``PieceCopy`` copies
what is laid out already.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, partial
from math import gcd, prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from refitkit.builtin.torch_tensorrt.direct.launching import Launch
from refitkit.builtin.torch_tensorrt.direct.places import words_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from refitkit.builtin.torch_tensorrt.direct.layout import Parts
    from refitkit.builtin.torch_tensorrt.direct.places import Place

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by size in bytes. Plain copies take the largest that fit: GPUs copy them faster."""
_MOST = (1 << 31) - 1
"""Strides and sizes of one weight are integers of 32 bits."""


class Digit(NamedTuple):
    """One digit of the index of an element, and what a step of it is worth in elements.

    Attributes:
        size: How many values it has.
        source: Its stride in the value.
        target: Its stride in the engine's memory.
    """

    size: int
    source: int
    target: int


def digits_of(
    shape: tuple[int, ...], strides: tuple[int, ...], place: Place
) -> tuple[Digit, ...] | None:
    """Return the digits in which a value and its place agree, the fastest of the value first.

    Args:
        shape: Shape of the value.
        strides: Its strides, in elements.
        place: Where its elements lie, in the order of their indices.

    Returns:
        As few digits as there can be; None if no digits fit both.
    """
    source = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    target = list(reversed(place.digits))
    found: list[Digit] = []
    while source and target:
        (n, s), (m, t) = source.pop(), target.pop()
        count = gcd(n, m)
        if count == 1:
            return None
        found.append(Digit(count, s, t))
        if n > count:
            source.append((n // count, s * count))
        if m > count:
            target.append((m // count, t * count))
    if source or target:
        return None
    return _merged(found)


def dense_digits_of(place: Place) -> tuple[Digit, ...]:
    """Return the digits in which a contiguous value and its place agree; see ``digits_of``."""
    step, found = 1, []
    for count, stride in place.digits:
        found.append(Digit(count, step, stride))
        step *= count
    return _merged(found)


def _merged(digits: Iterable[Digit]) -> tuple[Digit, ...]:
    """Return fewer digits of the same move: in which order elements are counted does not matter."""
    found: list[Digit] = []
    for digit in sorted(digits, key=lambda digit: digit.source):
        last = found[-1] if found else None
        if last and digit[1:] == (last.size * last.source, last.size * last.target):
            found[-1] = last._replace(size=last.size * digit.size)
        else:
            found.append(digit)
    return tuple(found)


def is_plain(digits: Sequence[Digit]) -> bool:
    """Return whether value and place are both without gaps and in the same order."""
    return not digits or (len(digits) == 1 and digits[0][1:] == (1, 1))


@dataclass(frozen=True, eq=False)
class Way:
    """How values of one weight with the same strides are moved.

    Attributes:
        number: Tells ways of one mover apart.
        place: Where the weight lies.
        shape: Shape of the values.
        size: Of an element, in bytes.
        kind: What the launch needs to be; None if torch moves them.
        sides: Digits along which the kernel reads and writes.
    """

    number: int
    place: Place
    shape: torch.Size
    size: int
    kind: Kind | None
    sides: _Sides


class Mover:
    """Moves many values to places in one piece of memory.

    Attributes:
        ways: Each way so far, by name of the weight and strides of the value.
    """

    def __init__(self, device: torch.device, *, kernel: bool | None = None) -> None:
        """Plan nothing yet.

        Args:
            device: Device of values and memory.
            kernel: Whether to use the kernels; by default on GPUs, where Triton is installed.
        """
        self._device = device
        self._kernels = (
            _kernels() if (device.type == "cuda" if kernel is None else kernel) else None
        )
        self.ways: dict[tuple[str, tuple[int, ...]], Way] = {}
        self._made = 0
        self._queue: dict[Kind, list[tuple[Way, torch.Tensor]]] = defaultdict(list)
        self._queue_bytes = 0
        self._moves: dict[tuple[int, ...], Moves] = {}

    @property
    def kernels(self) -> Any:
        """The module of the kernels; None if they are not used."""
        return self._kernels

    def way(self, name: str, place: Place, value: torch.Tensor) -> Way | None:
        """Return how values like one are moved.

        Args:
            name: Name of the weight.
            place: Where.
            value: The value: a tensor on the device.

        Returns:
            The way; None if its strides and the place fit no digits. A contiguous value has one.
        """
        found = self.ways.get((name, value.stride()))
        if found is not None and found.shape == value.shape:
            return found
        found = self.way_to(place, value)
        if found is not None:
            self.ways[name, value.stride()] = found
        return found

    def way_to(self, place: Place, value: torch.Tensor) -> Way | None:
        """Return how values like one are moved, as ``way`` does, and do not remember it."""
        digits = digits_of(tuple(value.shape), value.stride(), place)
        if digits is None:
            return None
        self._made += 1
        kind, sides = None, _NO_SIDES
        if self._kernels is not None and value.element_size() in _WORDS and digits:
            kind, sides = _kind(value.element_size(), place.start, digits)
        return Way(self._made, place, value.shape, value.element_size(), kind, sides)

    def add(self, piece: torch.Tensor, way: Way, value: torch.Tensor) -> None:
        """Move a value, now or in ``finish``.

        Args:
            piece: The memory as ``uint8``, the same for all values until ``finish``.
            way: How.
            value: The value. Nobody may change it before the move is done.
        """
        if way.kind is None:
            _copy(piece, way.place, value)
            return
        self._queue[way.kind].append((way, value))
        self._queue_bytes += value.nbytes
        if self._queue_bytes > _QUEUE_BYTES:  # values that were computed take memory
            self.finish(piece)

    def finish(self, piece: torch.Tensor) -> None:
        """Launch what is queued, on the current stream.

        Args:
            piece: The memory.
        """
        queue = self._queue
        self.forget()
        for kind, moves in queue.items():
            self.move(kind, piece, [way for way, _ in moves], [value for _, value in moves])

    def move(
        self, kind: Kind, piece: torch.Tensor, ways: Sequence[Way], values: Sequence[torch.Tensor]
    ) -> None:
        """Move values in one launch, on the current stream.

        Args:
            kind: That of all ways.
            piece: The memory.
            ways: How each is moved.
            values: The values. Nobody may change them before the move is done.
        """
        sources = list(map(torch.Tensor.data_ptr, values))
        apart: list[int] = []
        if kind.plain:  # their words can be larger than their elements
            apart = [place for place, source in enumerate(sources) if source % kind.size]
        if apart:
            left = [place for place in range(len(ways)) if place not in apart]
            for place in apart:
                _copy(piece, ways[place].place, values[place])
            ways, values = [ways[place] for place in left], [values[place] for place in left]
            sources = [sources[place] for place in left]
        if not ways:
            return
        moves = self._moves_of(kind, ways)
        moves.give(sources)
        if not moves.launch(piece):
            self._kernels = None  # Triton can compile no other kernel, either
            for way, value in zip(ways, values, strict=True):
                _copy(piece, way.place, value)

    def forget(self) -> None:
        """Drop what is queued."""
        self._queue, self._queue_bytes = defaultdict(list), 0

    def _moves_of(self, kind: Kind, ways: Sequence[Way]) -> Moves:
        key = tuple([way.number for way in ways])
        moves = self._moves.get(key)
        if moves is None:
            if len(self._moves) == _TABLES:
                self._moves.clear()
            moves = self._moves[key] = Moves({kind: ways}, self._kernels, self._device)
        return moves


_QUEUE_BYTES = 512 << 20
_TABLES = 256
"""One for each launch of refits that differ: whole ones, partial ones, other strides."""


def _copy(piece: torch.Tensor, place: Place, value: torch.Tensor) -> None:
    words = words_of(piece, value.dtype)
    place.of_piece(words).copy_(value.reshape([n for n, _ in reversed(place.digits)]))


def _copied(piece: torch.Tensor, place: Place, value: torch.Tensor) -> bool:
    _copy(piece, place, value)
    return True


@cache
def _kernels() -> Any:
    """The module of the kernels; None without Triton."""
    try:
        return importlib.import_module("refitkit.builtin.torch_tensorrt.direct.kernels")
    except ImportError:
        return None


# -- the kernels' tables --------------------------------------------------------------------------

_TILE = 64
"""Length of each side of a tile."""
BLOCK = 4096
"""Words that a program copies, where nothing is turned."""
_GROUP = 4
"""Most digits along one side."""

_Sides = tuple[tuple[Digit, ...], tuple[Digit, ...]]
_NO_SIDES: _Sides = ((), ())


class Kind(NamedTuple):
    """What one launch has in common. Each digit more costs all of its weights.

    Attributes:
        size: Of a word, in bytes. It can hold several elements if values are copied as they are.
        plain: Whether values are copied as they are; else see ``kernels.turn``.
        read: Number of digits along which is read.
        written: Number of digits along which is written.
        read_dense: Whether that is along adjacent words.
        written_dense: Whether that is along adjacent words.
    """

    size: int
    plain: bool = True
    read: int = 0
    written: int = 0
    read_dense: bool = True
    written_dense: bool = True


def _kind(size: int, start: int, digits: tuple[Digit, ...]) -> tuple[Kind | None, _Sides]:
    """Return the kind of a move, and both sides of its tiles; None if no kernel can make it."""
    if is_plain(digits):
        return Kind(_word(size * start, size * digits[0].size)), ((digits[0],), ())
    sides = _sides(digits)
    if sides is None:
        return None, _NO_SIDES
    dense = [
        [digit[at] for digit in side]
        == [prod(digit.size for digit in side[:number]) for number in range(len(side))]
        for at, side in ((1, sides[0]), (2, sides[1]))
    ]
    kind = Kind(
        size,
        plain=False,
        read=len(sides[0]),
        written=max(len(sides[1]), 1),
        read_dense=dense[0],
        written_dense=dense[1],
    )
    return kind, sides


def _sides(digits: tuple[Digit, ...]) -> _Sides | None:
    """Divide digits into those along which a tile is read, and those along which it is written.

    If the fast digit is the same on both sides, a tile is written as it was read.

    Returns:
        Both groups, the fastest digit of each first; None if the kernel cannot take them.
    """
    fast = min(digits, key=lambda digit: digit.target)
    rest = sorted(digits, key=lambda digit: digit.source)
    written = [fast] if fast is not rest[0] else []
    rest = [digit for digit in rest if digit not in written]
    read: list[Digit] = []
    while rest and (not read or prod(digit.size for digit in read) < _TILE):
        read.append(rest.pop(0))
    written += sorted(rest, key=lambda digit: digit.target)
    sizes = [prod(digit.size for digit in side) for side in (read, written)]
    ends = [sum((d.size - 1) * d[at] for d in digits) for at in (1, 2)]
    if max(len(read), len(written)) > _GROUP or max(sizes + ends) > _MOST - _TILE:
        return None
    return tuple(read), tuple(written)


def _row(sides: _Sides) -> list[int]:
    """What the kernel has to know of one weight; see ``kernels.turn``."""
    read, written = sides
    as_read = not written or read[0].target < written[0].target
    row = [prod(digit.size for digit in side) for side in sides] + [int(as_read), 4 + 5 * _GROUP]
    for side in sides:
        for digit in [*side, *[Digit(1, 0, 0)] * (_GROUP - len(side))]:
            row += [*digit, *_divider(digit.size)]
    return row


def _divider(divisor: int) -> tuple[int, int]:
    """Return the numbers with which the kernel divides, the first as a signed integer."""
    shift = (divisor - 1).bit_length()
    magic = (((1 << shift) - divisor) << 32) // divisor + 1
    return magic - (magic >> 31 << 32), shift


def _word(*numbers: int) -> int:
    """Return the size of the largest words that all of these numbers of bytes are a multiple of."""
    return next((size for size in sorted(_WORDS, reverse=True) if not gcd(*numbers) % size), 0)


class Moves:
    """Moves of the same weights, made again and again: one launch for each kind."""

    def __init__(
        self, ways: Mapping[Kind, Sequence[Way]], kernels: Any, device: torch.device
    ) -> None:
        """Copy to the device what the kernels have to know.

        Args:
            ways: How each value is moved, by kind.
            kernels: The module of the kernels.
            device: Device of values and memory.
        """
        # an even number of addresses for each kind, so that all tables are aligned alike
        rooms = [len(some) + len(some) % 2 for some in ways.values()]
        on_gpu = device.type == "cuda"
        self._given = torch.zeros(sum(rooms), dtype=torch.int64, pin_memory=on_gpu)
        self._numbers = self._given.numpy()
        self._sources = torch.zeros(sum(rooms), dtype=torch.int64, device=device)
        places: list[int] = []
        words: list[int] = []  # words can be larger than elements
        self._tables: list[_Table] = []
        start = 0
        for (kind, some), room in zip(ways.items(), rooms, strict=True):
            places += range(start, start + len(some))
            words += [kind.size if kind.plain else 1] * len(some)
            self._tables.append(
                _Table(kind, some, kernels, self._sources[start : start + len(some)])
            )
            start += room
        self._places, self._words = torch.tensor([places, words]).numpy()

    def give(self, sources: Sequence[int]) -> bool:
        """Note where the values lie, for all launches until the next time.

        Args:
            sources: Address of each value, in the order of their ways. The last launch has to be
                done.

        Returns:
            Whether the kernels can read them.
        """
        self._numbers[self._places] = sources
        return not (self._numbers[self._places] % self._words).any()

    def launch(self, piece: torch.Tensor) -> bool:
        """Move the values, on the current stream.

        Args:
            piece: The memory as ``uint8``.

        Returns:
            False if kernels cannot be compiled.
        """
        self._sources.copy_(self._given, non_blocking=True)
        return all(table.launch(piece) for table in self._tables)


class _Table:
    """What one kernel has to know of some weights, on the device. Only addresses change."""

    def __init__(
        self, kind: Kind, ways: Sequence[Way], kernels: Any, sources: torch.Tensor
    ) -> None:
        self._word = _WORDS[kind.size]
        starts = torch.tensor([way.place.start for way in ways])
        if kind.plain:
            sizes = torch.tensor([way.size for way in ways])
            starts = starts * sizes // kind.size
            rows = [[way.sides[0][0].size * way.size // kind.size] for way in ways]
            tiles = blocks_of([size for (size,) in rows])
            kernel, constants = kernels.copy, {"BLOCK": BLOCK}
        else:
            rows = [_row(way.sides) for way in ways]
            tiles = _tiles([-(-row[0] // _TILE) * -(-row[1] // _TILE) for row in rows])
            kernel = kernels.turn
            constants = {
                "COLUMNS": len(rows[0]),
                "TILE": _TILE,
                "READ": kind.read,
                "WRITTEN": kind.written,
                "READ_DENSE": kind.read_dense,
                "WRITTEN_DENSE": kind.written_dense,
            }
        table = starts, torch.tensor(rows, dtype=torch.int64 if kind.plain else torch.int32), tiles
        moved = [some.to(sources.device) for some in table]
        self._launch = Launch(kernel, len(tiles), sources, *moved, **constants)

    def launch(self, piece: torch.Tensor) -> bool:
        return self._launch(words_of(piece, self._word))


def blocks_of(sizes: Sequence[int]) -> torch.Tensor:
    """Return the values and blocks that the programs of a launch read, one row for each program.

    Args:
        sizes: Number of words of each value.

    Returns:
        Number of the value, and number of the block of ``BLOCK`` words in it, as int32.
    """
    return _tiles([-(-size // BLOCK) for size in sizes])


def _tiles(counts: Sequence[int]) -> torch.Tensor:
    """Number of the weight and number of the tile in it, for each program of a launch."""
    weights = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    firsts = torch.tensor([0, *counts]).cumsum(0)
    return torch.stack([weights, torch.arange(len(weights)) - firsts[weights]], 1).to(torch.int32)


class PieceCopy:
    """Copies weights from one piece of memory to another of the same layout."""

    def __init__(
        self,
        parts: Parts,
        source: torch.Tensor,
        target: torch.Tensor,
        mover: Mover,
    ) -> None:
        """Copy nothing yet.

        Args:
            parts: What to copy.
            source: Memory as ``uint8``.
            target: Memory of the same size.
            mover: Uses kernels or not.
        """
        self._parts, self._source, self._target = parts, source, target
        is_one = len(parts.ranges) == 1 and not parts.scattered
        self._launches = [] if is_one or mover.kernels is None else self._planned(mover)

    @property
    def is_fast(self) -> bool:
        """Whether few launches make all copies."""
        return bool(self._launches) or len(self._parts.ranges) < _MOST_RANGES

    def _planned(self, mover: Mover) -> list[Callable[[], bool]]:
        """Launches that make all copies; none if kernels cannot."""
        by_word: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for start, end in self._parts.ranges:
            body = end - end % max(_WORDS)  # most of it is copied in large words
            for some in ((start, body), (body, end)) if start < body else ((start, end),):
                if some[0] < some[1]:
                    by_word[_word(*some)].append(some)
        if 0 in by_word:
            return []
        ranges = [
            _RangeLaunch(mover.kernels, size, some, self._source, self._target)
            for size, some in by_word.items()
        ]
        return [*ranges, *self._moves(mover)]

    def _moves(self, mover: Mover) -> Iterator[Callable[[], bool]]:
        """Launches that copy weights with gaps."""
        ways: dict[Kind, list[Way]] = defaultdict(list)
        for place, dtype in self._parts.scattered:
            view = place.of_piece(words_of(self._source, dtype))
            way = mover.way_to(place, view)
            if way is None:
                raise TypeError("a place has a way to itself")
            if way.kind is None:
                yield partial(_copied, self._target, place, view)
            else:
                ways[way.kind].append(way)
        if ways:
            moves = Moves(ways, mover.kernels, self._source.device)
            first = self._source.data_ptr()
            moves.give(
                [first + way.size * way.place.start for some in ways.values() for way in some]
            )
            yield partial(moves.launch, self._target)

    def __call__(self) -> None:
        """Copy, on the current stream."""
        if self._launches:
            if all(launch() for launch in self._launches):
                return
            self._launches = []
        targets, sources = (
            [
                *[piece[start:end] for start, end in self._parts.ranges],
                *[place.of_piece(words_of(piece, kind)) for place, kind in self._parts.scattered],
            ]
            for piece in (self._target, self._source)
        )
        torch._foreach_copy_(targets, sources)


_MOST_RANGES = 1000
"""So many ranges torch can copy one by one while calls wait."""


class _RangeLaunch:
    """Ranges that are copied in words of one size."""

    def __init__(
        self,
        kernels: Any,
        size: int,
        ranges: Sequence[tuple[int, int]],
        source: torch.Tensor,
        target: torch.Tensor,
    ) -> None:
        edges = torch.tensor(ranges)
        firsts, counts = edges[:, 0], edges.diff(dim=1).flatten() // size
        blocks = blocks_of(counts.tolist())
        self._words = words_of(target, _WORDS[size])
        table = source.data_ptr() + firsts, firsts // size, counts, blocks
        moved = [some.to(source.device) for some in table]
        self._launch = Launch(kernels.copy, len(blocks), *moved, BLOCK=BLOCK)

    def __call__(self) -> bool:
        return self._launch(self._words)
