"""Bits of tensors, found without the code under test, and values for slots."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from refitkit.program.ambient import WatchingMode
from refitkit.protocols import HoldsProgram, SlotValue

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from refitkit.model import Slot, TensorInfo
    from refitkit.protocols import WeightSource


Bits = tuple[str, bytes]
"""Dtype, and all elements in logical order."""

_LARGEST = 100  # integers stay below it, so that every integer type has them


def dtype_of(name: str) -> torch.dtype:
    """A dtype by torch's name, without the ``torch.``."""
    found: torch.dtype = getattr(torch, name)
    return found


def bits(tensor: torch.Tensor) -> Bits:
    """Dtype and elements of a tensor, whatever its layout and device.

    -0 is not 0, and a NaN is itself.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    raw = plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return str(plain.dtype).removeprefix("torch."), raw


def snapshot(held: Mapping[str, torch.Tensor]) -> dict[str, Bits]:
    """The bits of everything, by name: what later changes cannot touch."""
    return {name: bits(tensor) for name, tensor in held.items()}


def differing(found: Mapping[str, Bits], wanted: Mapping[str, Bits]) -> list[str]:
    """Names whose bits differ, or that only one of both has."""
    names = sorted(found.keys() | wanted.keys())
    return [name for name in names if found.get(name) != wanted.get(name)]


def random_values(slots: Iterable[Slot], seed: int) -> dict[str, torch.Tensor]:
    """A value for each slot: finite, contiguous, on the CPU, other ones for other seeds.

    Floats have a zero of either sign among them, so that what compares values instead of bits
    shows.
    """
    generator = torch.Generator().manual_seed(seed)
    return {slot.name: _random(slot, seed, generator) for slot in slots}


def _random(slot: Slot, seed: int, generator: torch.Generator) -> torch.Tensor:
    dtype, shape = dtype_of(slot.dtype), slot.shape if slot.shape is not None else (slot.count,)
    if dtype is torch.bool:
        ones = torch.arange(slot.count) + seed
        return (ones % 2 == 0).reshape(shape)
    if dtype.is_complex:
        parts = torch.randn((*shape, 2), generator=generator, dtype=torch.float64)
        return torch.view_as_complex(parts).to(dtype)
    if dtype.is_floating_point:
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64) / 4 + 1
        drawn *= 2.0 ** (seed % 5)  # so far apart that no type rounds two seeds to one value
        if slot.count > 1 and dtype is not torch.float8_e8m0fnu:  # which has no zero
            drawn.view(-1)[0] = -0.0 if seed % 2 else 0.0
        return drawn.to(dtype)
    drawn = torch.randint(_LARGEST // 2, shape, generator=generator)
    return ((drawn + seed) % _LARGEST).to(dtype)


def slot_values(slots: Mapping[str, Slot], values: Mapping[str, torch.Tensor]) -> list[SlotValue]:
    """Values as a strategy gives them: promises to load tensors."""
    return [given(slots[name], value) for name, value in values.items()]


def given(slot: Slot, value: torch.Tensor) -> SlotValue:
    """One value as a strategy gives it."""
    return SlotValue(slot, "conformance", (slot.name,), lambda: value)


def copies(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values in memory of their own."""
    return {name: value.detach().clone() for name, value in values.items()}


def shown(names: Sequence[str]) -> str:
    """Some names, for a message."""
    most = 3
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


# MERGED layouts: The same elements in layouts that raw copies of memory get wrong, and values
# that do not fit.

_NEGATABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64}


def _offset(value: torch.Tensor) -> torch.Tensor:
    room = torch.zeros(value.numel() + 3, dtype=value.dtype, device=value.device)
    return room[3:].view(value.shape).copy_(value)


def _strided(value: torch.Tensor) -> torch.Tensor:
    room = torch.zeros((*value.shape, 2), dtype=value.dtype, device=value.device)
    return room[..., 0].copy_(value)


def _transposed(value: torch.Tensor) -> torch.Tensor | None:
    return value.mT.contiguous().mT if value.dim() > 1 else None


def _expanded(value: torch.Tensor) -> torch.Tensor | None:
    return value.reshape(-1)[-1:].clone()[0].expand(value.shape) if value.numel() else None


def _with_gradients(value: torch.Tensor) -> torch.Tensor | None:
    if not (value.is_floating_point() or value.is_complex()):
        return None
    return value.detach().clone().requires_grad_()


def _conjugate(value: torch.Tensor) -> torch.Tensor | None:
    return value.conj().resolve_conj().conj() if value.is_complex() else None


def _negative(value: torch.Tensor) -> torch.Tensor | None:
    return torch._neg_view(-value) if value.dtype in _NEGATABLE else None  # noqa: SLF001


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "views with an offset": _offset,
    "every second element of other tensors": _strided,
    "transposed views": _transposed,
    "one element each, expanded": _expanded,
    "leaves that require grad": _with_gradients,
    "conjugates that were put off": _conjugate,
    "negations that were put off": _negative,
}
"""A value in another layout, by words for it; None where the value has no such layout.

All but the expanded one, whose elements are equal, have the elements of the value.
"""


def of_other_dtypes(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """A value cast to dtypes that are not its own: wider, narrower and of another kind."""
    for dtype in (torch.float32, torch.float16, torch.float64, torch.int32, torch.uint8):
        if dtype is not value.dtype:
            yield (value.real if value.is_complex() else value).to(dtype)


def of_other_shapes(slot: Slot, value: torch.Tensor) -> Iterator[torch.Tensor]:
    """A value with other numbers of elements, and with its own in another shape.

    Where the engine knows no shape of the slot, only the number of elements counts.
    """
    flat = value.reshape(-1)
    yield torch.cat([flat, flat, flat.new_zeros(1)])
    if slot.count > 1:
        yield flat[:1].clone()  # which copy_ would broadcast
        yield flat[:-1].clone()
    if slot.shape is not None and value.dim() > 1 and value.mT.shape != value.shape:
        yield value.mT.contiguous()
    if slot.shape is not None and value.dim() > 0:
        yield value.unsqueeze(0).clone()


# MERGED memory: Which memory torch has made on the CPU and still holds, counted storage by
# storage.
#
# Nothing here asks the operating system, so the numbers are the same on every run.


class Storage:
    """The memory of a tensor, watched without keeping it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Watch the memory of a tensor."""
        storage = tensor.untyped_storage()
        self.nbytes = storage.nbytes()
        self._reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    @property
    def key(self) -> int:
        """What tells it from all others that are watched."""
        return int(self._reference.cdata)

    def expired(self) -> bool:
        """Whether nobody holds it any more."""
        return bool(self._reference.expired())  # type: ignore[no-untyped-call]


class NewMemory(WatchingMode):
    """Watches all memory that torch makes while it is on, in this thread.

    Memory is new if it comes out of an op into which it did not go.
    """

    def __init__(self) -> None:
        """Nothing was seen yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: dict[int, Storage] = {}
        self._old: dict[int, Storage] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the op and note what it made."""
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, self._old)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._note(tensor, self._seen)
        return result

    def _note(self, tensor: torch.Tensor, where: dict[int, Storage]) -> None:
        storage = Storage(tensor)
        known = self._seen.get(storage.key) or self._old.get(storage.key)
        if known is None:
            where[storage.key] = storage

    def kept(self) -> int:
        """Bytes of new memory that somebody still holds."""
        gc.collect()
        return sum(storage.nbytes for storage in self._seen.values() if not storage.expired())


def _tensors(things: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(things) if _has_storage(leaf)]


def _has_storage(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided


# MERGED watching: Sources that tell what was read of them.


class Watched:
    """A source that notes which tensors are read. It has the program of one that holds one.

    Attributes:
        read: Names of what was read.
    """

    def __init__(self, source: WeightSource) -> None:
        """Stand before a source."""
        self.read: list[str] = []
        self._source = source

    @property
    def description(self) -> str:
        """The source's own."""
        return self._source.description

    def names(self) -> Collection[str]:
        """The source's own."""
        return self._source.names()

    def info(self, fqn: str) -> TensorInfo:
        """The source's own."""
        return self._source.info(fqn)

    def get(self, fqn: str) -> torch.Tensor:
        """The source's own, noted."""
        self.read.append(fqn)
        return self._source.get(fqn)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def state_of_program(source: WeightSource) -> dict[str, Bits]:
    """Bits of the tensors of the program that a source holds; nothing where it holds none."""
    if not isinstance(source, HoldsProgram):
        return {}
    state = source.program.state_dict
    return {f"program {name}": bits(tensor) for name, tensor in state.items()}
