"""Two sets of an engine's weights: one that the refitter reads, and one to go back to.

TensorRT cannot be asked what weights an engine holds. So what was given to it is kept: the staging
set, whose addresses the refitter knows, holds the live values once a refit is over. The next refit
copies them aside before it overwrites them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from refitkit.errors import Problem, WeightMismatchError
from refitkit.program.bits import all_finite, finite, same_bits
from refitkit.program.dtypes import dtype_name, dtype_of
from refitkit.protocols import Place, Places, SideBySide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from refitkit.builtin.torch_tensorrt.refitter import WeightFact
    from refitkit.protocols import SlotValue


Keep = Literal["device", "pinned-host"]
"""Where the second set is: a copy on the device is fast, one on the host spares its memory."""


class Copies(Mapping[str, torch.Tensor]):
    """Values that are copied one by one, whenever they are asked for."""

    def __init__(self, names: Iterable[str], copy: Callable[[str], torch.Tensor]) -> None:
        """Copy nothing yet."""
        self._names, self._copy = dict.fromkeys(names), copy

    def __getitem__(self, name: str) -> torch.Tensor:
        self._names[name]
        return self._copy(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # the inherited one would copy


class WeightSets:
    """The staging set, the base set, and which of them holds what is live.

    Attributes:
        staging: What the refitter reads.
    """

    def __init__(self, layout: Layout, device: torch.device, keep: Keep) -> None:
        """Allocate the staging set only."""
        self._layout, self._device, self._keep = layout, device, keep
        self.staging = Arena(layout, device)
        self._live: Literal["staging", "base"] | None = None
        self._base: Arena | None = None
        self._has_previous = False  # whether it holds what was live before the last commit

    @property
    def live(self) -> Literal["staging", "base"] | None:
        """Which set holds the live values; None: neither, nobody knows them."""
        return self._live

    @live.setter
    def live(self, which: Literal["staging", "base"] | None) -> None:
        self._live, self._has_previous = which, False

    def settle(self) -> None:
        """What is staged is live from now on, and what was put aside is what was before."""
        previous = self._live == "base"
        self.live, self._has_previous = "staging", previous

    def previous(self) -> Mapping[str, torch.Tensor]:
        """What was live before the last commit, where that is still there."""
        return self._ready_base().tensors if self._has_previous else {}

    @property
    def known(self) -> bool:
        """Whether the live values are known."""
        return self.live is not None

    @property
    def nbytes(self) -> int:
        """Bytes of one set."""
        return self._layout.nbytes

    @property
    def spare(self) -> int:
        """Bytes of the base set; 0 while it is not allocated."""
        return self.nbytes if self._base is not None else 0

    def begin(self, *, partial: bool) -> None:
        """Have the live values aside, so that the staging set may be written.

        Args:
            partial: Whether the staging set must hold the live values, too.
        """
        self._has_previous = False
        if self.live == "staging":
            self._ready_base().copy_from(self.staging)
            self.live = "base"
        elif self.live == "base" and partial:
            self.restore()

    def restore(self) -> None:
        """Copy the values that were put aside back into the staging set."""
        self.staging.copy_from(self._ready_base())

    def changed(self) -> bool | None:
        """Whether any bit of the two sets differs; None where the live values are not known."""
        if self.live != "base":
            return None
        return not same_bits(self.staging.memory, self._ready_base().memory)

    def known_value(self, name: str) -> torch.Tensor | None:
        """The live value of a weight: an alias; None where it is not known."""
        if self._live is None:
            return None
        return (self.staging if self._live == "staging" else self._ready_base()).tensors[name]

    def side_by_side(self) -> SideBySide | None:
        """Both sets as they lie in memory; None where the live values are not put aside."""
        if self.live != "base":
            return None
        return SideBySide(self._ready_base().memory, self.staging.memory, self._layout.places)

    def spoilt(self) -> Iterator[tuple[str, int]]:
        """Weights with elements that are not finite where the live ones are: name and number."""
        if self.live != "base":
            return
        base = self._ready_base()
        for kind, run in self.staging.runs.items():
            if all_finite(run):
                continue
            for name, new in self.staging.views.items():
                if self._layout.facts[name].dtype != kind or all_finite(new):
                    continue
                bad = ~finite(new) & finite(base.views[name]).to(new.device)
                count = int(bad.sum())
                if count:
                    yield name, count

    def free_base(self) -> int:
        """Free the base set; returns its bytes."""
        if self.live == "base":
            self.restore()
            self.live = "staging"
        freed, self._base, self._has_previous = self.spare, None, False
        return freed

    def _ready_base(self) -> Arena:
        if self._base is None:
            on_host = self._keep == "pinned-host"
            device = torch.device("cpu") if on_host else self._device
            pinned = on_host and self._device.type == "cuda"
            self._base = Arena(self._layout, device, pinned=pinned)
        return self._base


# MERGED arena: Room for all weights of an engine, in one piece of memory.

_ALIGNMENT = 256  # bytes; what CUDA's own allocator gives


@dataclass(frozen=True)
class Layout:
    """Where each weight lies. Weights of one dtype lie together, so that one kernel reads them.

    Attributes:
        facts: All weights, in order.
        offsets: Where each begins, in bytes, by name.
        nbytes: Size of all.
        runs: First byte and end of all weights of a dtype, by its name.
        places: The same for those who compare two sets.
    """

    facts: Mapping[str, WeightFact]
    offsets: Mapping[str, int]
    nbytes: int
    runs: Mapping[str, tuple[int, int]]
    places: Places

    @classmethod
    def of(cls, facts: Iterable[WeightFact]) -> Layout:
        """Lay out weights, each at an address that suits every type."""
        ordered = sorted(facts, key=lambda fact: (fact.dtype, fact.name))
        offsets: dict[str, int] = {}
        runs: dict[str, tuple[int, int]] = {}
        end = 0
        for fact in ordered:
            offsets[fact.name] = end
            size = fact.count * dtype_of(fact.dtype).itemsize
            first, _ = runs.get(fact.dtype, (end, end))
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
            runs[fact.dtype] = (first, end)
        places = Places(
            Place(fact.name, dtype_of(fact.dtype), offsets[fact.name], fact.count)
            for fact in ordered
        )
        return cls({fact.name: fact for fact in ordered}, offsets, end, runs, places)


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that is not expected to change, as it was at one time.

    Attributes:
        tensor: It, or a view of it; kept, so that nothing else comes to lie at its address.
        version: How often its memory had been changed.
    """

    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Constant | None:
        """A tensor as it is now; None where torch does not count its changes, or puts off some."""
        uncertain = tensor.is_inference() or tensor.is_neg() or tensor.is_conj()
        return None if uncertain else cls(tensor, tensor._version)  # noqa: SLF001

    def is_same_as(self, other: Constant | None) -> bool:
        """Whether both are the same elements of the same memory, unchanged in between."""
        if other is None or self.version != other.version:
            return False
        mine, theirs = self.tensor, other.tensor
        return mine is theirs or (
            mine.data_ptr() == theirs.data_ptr()
            and mine.device == theirs.device
            and mine.dtype is theirs.dtype
            and mine.shape == theirs.shape
            and mine.stride() == theirs.stride()
        )


class Arena:
    """One set of weights.

    Attributes:
        memory: All of it, as bytes; gaps between weights are zero, and stay so.
        views: Each weight, flat, by name.
        tensors: Each weight in its shape, where that is known, by name.
        constants: What weights were last written from, where that is a constant, by name.
    """

    def __init__(self, layout: Layout, device: torch.device, *, pinned: bool = False) -> None:
        """Allocate one, full of zeros."""
        self.memory = torch.zeros(
            layout.nbytes, dtype=torch.uint8, device=device, pin_memory=pinned
        )
        self.views = {
            name: self._view(layout.offsets[name], fact.count, fact.dtype)
            for name, fact in layout.facts.items()
        }
        self.tensors = {
            name: view if (shape := layout.facts[name].shape) is None else view.view(shape)
            for name, view in self.views.items()
        }
        self.constants: dict[str, Constant] = {}
        self.runs = {
            name: self.memory[first:end].view(dtype_of(name))
            for name, (first, end) in layout.runs.items()
        }

    def _view(self, offset: int, count: int, dtype: str) -> torch.Tensor:
        kind = dtype_of(dtype)
        return self.memory[offset : offset + count * kind.itemsize].view(kind)

    def copy_from(self, other: Arena) -> None:
        """Take over all values of another one with the same layout."""
        self.constants.clear()
        self.memory.copy_(other.memory, non_blocking=True)


# MERGED staging: Bringing a caller's values into the staging set of an engine.


def fill(
    arena: Arena,
    facts: Mapping[str, WeightFact],
    values: Sequence[SlotValue],
    uploader: Uploader,
) -> None:
    """Copy values that fit; the caller's tensors are free when this returns, or raises.

    What the plan keeps is not copied where the arena holds it already: some networks have more
    constants than weights.

    Raises:
        WeightMismatchError: Lists all that do not fit.
    """
    problems: list[Problem] = []
    copied: dict[str, Constant] = {}
    try:
        with torch.no_grad():
            for value in values:
                name, tensor = value.slot.name, value.load()
                constant = Constant.of(tensor) if value.pinned else None
                if constant and constant.is_same_as(arena.constants.get(name)):
                    continue
                room = arena.tensors[name]
                if tensor.dtype is not room.dtype or tensor.shape != room.shape:
                    wrong = list(_misfits(facts[name], tensor))
                    problems += wrong
                    if wrong:
                        continue
                arena.constants.pop(name, None)
                uploader.copy(room, tensor)
                if constant:
                    copied[name] = constant
    finally:
        uploader.finish()
    arena.constants |= copied  # they are there only now
    if problems:
        raise WeightMismatchError("Values do not fit the engine.", problems=problems)


def _misfits(fact: WeightFact, tensor: torch.Tensor) -> Iterator[Problem]:
    """What keeps a tensor from being the weight: nothing where only nobody knows its shape."""
    kind = dtype_name(tensor.dtype)
    if kind != fact.dtype:
        yield Problem(fact.name, "dtype", kind, fact.dtype)
    if tensor.numel() != fact.count:
        found = f"{tensor.numel()} {tuple(tensor.shape)}"
        yield Problem(fact.name, "number of elements", found, str(fact.count))
    elif fact.shape is not None and tuple(tensor.shape) != fact.shape:
        yield Problem(fact.name, "shape", str(tuple(tensor.shape)), str(fact.shape))


# MERGED upload: Copying a caller's tensors into room of our own, in few launches however many
# tensors there are.
#
# A launch takes the CPU some microseconds, and an engine has hundreds of weights of a few bytes:
# of such an engine most of a refit's time was launches.

_CHUNK = 32 << 20  # bytes; PCIe is at full speed from about 8 MiB
_SMALL = 1 << 16  # bytes; values of the host up to this size are sent together
_TOGETHER = 1 << 20  # bytes of such values that are sent at once
_WAITING = 64 << 20  # bytes of values that are held until they are copied
_AS_ONE = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32}
)
"""Types that one call copies for many tensors."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their size: whatever a value is, its bits are copied."""


class Uploader:
    """Copies values to one device: on the device directly, from the host through pinned memory.

    A copy from pageable memory takes several times as long as one from pinned memory, and pinning
    the whole model would take as much memory again. So there are two pinned chunks: while the
    device reads one of them, the other is filled. Small values are laid end to end and sent as one.
    """

    def __init__(self, device: torch.device, chunk: int = _CHUNK) -> None:
        """Allocate nothing yet."""
        self._device = device
        self._size = chunk
        self._chunks: list[torch.Tensor] = []
        self._read: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._held = 0  # bytes of what is waiting
        self._packed: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._used = 0  # bytes of what is in there

    def copy(self, room: torch.Tensor, value: torch.Tensor) -> None:
        """Copy all elements in logical order, at the latest in ``finish``.

        Args:
            room: Contiguous, flat or of the value's shape, of its dtype and count, on the device.
            value: Any layout, any device, without gradients. Free only after ``finish``.
        """
        if value.is_conj() or value.is_neg():
            value = value.resolve_conj().resolve_neg()
        if value.device == room.device:
            self._later(room, value)
        elif value.is_cpu and value.nbytes <= _SMALL:
            self.copy_with_others(room, value)
        elif value.is_cpu and not value.is_pinned():
            self.copy_in_chunks(room, value)
        else:
            room.view(value.shape).copy_(value, non_blocking=True)

    def _later(self, room: torch.Tensor, value: torch.Tensor) -> None:
        """Have a value of the device copied with others."""
        if value.dtype not in _AS_ONE or not value.is_contiguous():
            room.view(value.shape).copy_(value, non_blocking=True)
            return
        alike = value.dim() == room.dim()
        self._waiting.append((room, value if alike else value.view(room.shape)))
        self._held += value.nbytes
        if self._held > _WAITING:
            self._copy_waiting()

    def _copy_waiting(self) -> None:
        rooms: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
        values: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
        for room, value in self._waiting:
            rooms[room.dtype].append(room)
            values[room.dtype].append(value)
        for dtype, some in rooms.items():
            torch._foreach_copy_(some, values[dtype], non_blocking=True)
        self._waiting, self._held = [], 0

    def copy_with_others(self, room: torch.Tensor, value: torch.Tensor) -> None:
        """Copy a small value of the host, in one piece with those that come before and after."""
        if self._used + value.nbytes > _TOGETHER:
            self._send_pack()
        self._used += value.nbytes
        self._packed.setdefault(value.dtype, []).append((room, value.reshape(-1)))

    def _send_pack(self) -> None:
        """Lay small values end to end, send them, and have them copied to where they belong."""
        packed, self._packed, self._used = self._packed, {}, 0
        for some in packed.values():
            values = [value for _, value in some]
            pack = _end_to_end(values, pinned=self._device.type == "cuda")
            there = pack.to(self._device, non_blocking=True, copy=True)
            pieces = there.split_with_sizes([value.numel() for value in values])
            for (room, _), piece in zip(some, pieces, strict=True):
                self._later(room, piece)

    def copy_in_chunks(self, room: torch.Tensor, value: torch.Tensor) -> None:
        """Copy a value of the host through the pinned chunks."""
        source = value.contiguous().reshape(-1).view(torch.uint8)
        target = room.view(-1).view(torch.uint8)
        for first in range(0, source.numel(), self._size):
            part = source[first : first + self._size]
            chunk = self._next()[: part.numel()]
            chunk.copy_(part)
            target[first : first + self._size].copy_(chunk, non_blocking=True)
            self._mark()

    def _next(self) -> torch.Tensor:
        """The chunk whose turn it is, once the device has read it."""
        if not self._chunks:
            pinned = self._device.type == "cuda"
            self._chunks = [
                torch.empty(self._size, dtype=torch.uint8, pin_memory=pinned) for _ in self._read
            ]
        read = self._read[self._turn]
        if read is not None:
            read.synchronize()
        return self._chunks[self._turn]

    def _mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's
            event.record(torch.cuda.current_stream(self._device))
            self._read[self._turn] = event
        self._turn = 1 - self._turn

    def finish(self) -> None:
        """Make and await all copies, and free the chunks: the caller's tensors are free now."""
        try:
            self._send_pack()
            self._copy_waiting()
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        finally:
            self._chunks, self._read = [], [None, None]
            self._waiting, self._held = [], 0


def _end_to_end(values: list[torch.Tensor], *, pinned: bool) -> torch.Tensor:
    """Flat values of one dtype, one after another in memory of our own."""
    kind = values[0].dtype
    whole = torch.empty(sum(v.numel() for v in values), dtype=kind, pin_memory=pinned)
    bits = _BITS.get(kind.itemsize, kind)
    torch.cat([value.view(bits) for value in values], out=whole.view(bits))
    return whole
