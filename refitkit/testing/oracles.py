"""What checks compare and feed in: bits of tensors, values for slots, and observers.

Nothing here calls the code under test. In reading order:

* bits of tensors, and random values for slots;
* layouts: the same elements as views that a raw copy of memory gets wrong;
* memory: which storages torch allocates, counted one by one, so results do not depend on the
  operating system or on other processes;
* sources that record which tensors are read, written to and kept, that mix the tensors of two
  others, that have odd values, and that live where another one lived;
* plans with a copy of all leaves and rows.
"""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from refitkit.program.ambient import WatchingMode
from refitkit.protocols import HoldsProgram, SlotValue, SteadyValues

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from torch.export import ExportedProgram

    from refitkit.model import Slot, TensorInfo
    from refitkit.protocols import Plan, WeightSource


Bits = tuple[str, bytes]
"""Dtype name without ``torch.``, and the bytes of all elements in logical order."""

_INTEGER_LIMIT = 100  # random integers stay below it, so that they fit into int8


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype with a name such as ``float32``."""
    found: torch.dtype = getattr(torch, name)
    return found


def bits(tensor: torch.Tensor) -> Bits:
    """Dtype and bytes of a tensor with any layout and on any device.

    -0 and 0 have different bits, and a NaN equals itself.
    """
    # numpy() takes neither lazy conjugates nor negations, so compute them first.
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    raw = plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return str(plain.dtype).removeprefix("torch."), raw


def snapshot(tensors: Mapping[str, torch.Tensor]) -> dict[str, Bits]:
    """The bits of tensors by name: a copy that later writes do not change."""
    return {name: bits(tensor) for name, tensor in tensors.items()}


def differing(found: Mapping[str, Bits], wanted: Mapping[str, Bits]) -> list[str]:
    """Sorted names whose bits differ, or that only one of the two mappings has."""
    names = sorted(found.keys() | wanted.keys())
    return [name for name in names if found.get(name) != wanted.get(name)]


def random_values(slots: Iterable[Slot], seed: int) -> dict[str, torch.Tensor]:
    """A value for each slot by name: finite, contiguous, on the CPU, different for each seed.

    A slot without a shape gets a flat tensor. Floats of two or more elements contain a zero, whose
    sign depends on the seed: code that compares values instead of bits then fails.
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
        # Seeds differ by a factor of 2, so that even float8 does not round them to one value.
        drawn *= 2.0 ** (seed % 5)
        if slot.count > 1 and dtype is not torch.float8_e8m0fnu:  # e8m0 has no zero
            drawn.view(-1)[0] = -0.0 if seed % 2 else 0.0
        return drawn.to(dtype)
    drawn = torch.randint(_INTEGER_LIMIT // 2, shape, generator=generator)
    return ((drawn + seed) % _INTEGER_LIMIT).to(dtype)


def slot_values(slots: Mapping[str, Slot], values: Mapping[str, torch.Tensor]) -> SteadyValues:
    """Values as an engine gets them: each loads its tensor on demand."""
    return SteadyValues(slot_value(slots[name], value) for name, value in values.items())


def slot_value(slot: Slot, value: torch.Tensor) -> SlotValue:
    """One value as a strategy returns it: ``load`` returns the tensor itself."""
    return SlotValue(slot, "conformance", (slot.name,), lambda: value)


def quoted(names: Sequence[str]) -> str:
    """The first three names in quotes and the number of the others, for a message."""
    most = 3
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


# -- layouts, and values that do not fit --------------------------------------------------------

_NEGATABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64}


def _offset(value: torch.Tensor) -> torch.Tensor:
    larger = torch.zeros(value.numel() + 3, dtype=value.dtype, device=value.device)
    return larger[3:].view(value.shape).copy_(value)


def _strided(value: torch.Tensor) -> torch.Tensor:
    larger = torch.zeros((*value.shape, 2), dtype=value.dtype, device=value.device)
    return larger[..., 0].copy_(value)


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


# Users get negative views from x.conj().imag, for example.
def _negative(value: torch.Tensor) -> torch.Tensor | None:
    return torch._neg_view(-value) if value.dtype in _NEGATABLE else None  # noqa: SLF001


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "views with an offset": _offset,
    "every second element of other tensors": _strided,
    "transposed views": _transposed,
    "one element each, expanded": _expanded,
    "leaves that require grad": _with_gradients,
    "lazy conjugates": _conjugate,
    "lazy negations": _negative,
}
"""Functions that return a value in another layout, by a description for messages.

They return None if the value cannot have the layout. The elements are those of the value, except in
the expanded layout: there all are equal to the last element.
"""


def other_dtypes(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """A value cast to dtypes other than its own: wider, narrower and of another kind."""
    for dtype in (torch.float32, torch.float16, torch.float64, torch.int32, torch.uint8):
        if dtype is not value.dtype:
            # A cast from complex to real warns, and tests turn warnings into errors.
            yield (value.real if value.is_complex() else value).to(dtype)


def other_shapes(slot: Slot, value: torch.Tensor) -> Iterator[torch.Tensor]:
    """A value with other numbers of elements, and with the same number in another shape.

    For a slot without a shape only the number of elements varies.
    """
    flat = value.reshape(-1)
    yield torch.cat([flat, flat, flat.new_zeros(1)])
    if slot.count > 1:
        yield flat[:1].clone()  # copy_ would broadcast it
        yield flat[:-1].clone()
    if slot.shape is not None and value.dim() > 1 and value.mT.shape != value.shape:
        yield value.mT.contiguous()
    if slot.shape is not None and value.dim() > 0:
        yield value.unsqueeze(0).clone()


# -- memory that torch allocates ----------------------------------------------------------------


class Storage:
    """A weak reference to the storage of a tensor.

    Attributes:
        nbytes: Size of the storage in bytes.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        """Refer to the storage of a tensor."""
        storage = tensor.untyped_storage()
        self.nbytes = storage.nbytes()
        self._reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    @property
    def key(self) -> int:
        """Identity of the storage, unique as long as this object refers to it."""
        return int(self._reference.cdata)

    def expired(self) -> bool:
        """Whether no tensor uses the storage any more."""
        return bool(self._reference.expired())  # type: ignore[no-untyped-call]


def overlap(one: object, other: object) -> bool:
    """Whether two objects are tensors whose elements lie in overlapping stretches of memory."""
    if not (_has_storage(one) and _has_storage(other)):
        return False
    (device, start, end), (other_device, other_start, other_end) = map(_stretch, (one, other))
    return device == other_device and max(start, other_start) < min(end, other_end)


def _stretch(tensor: Any) -> tuple[torch.device, int, int]:
    if not tensor.numel():
        return tensor.device, 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in steps)
    return tensor.device, tensor.data_ptr(), tensor.data_ptr() + length * tensor.itemsize


class NewMemory(WatchingMode):
    """A dispatch mode that records all storages that torch allocates in this thread.

    A storage counts as new if an op returns it that did not take it as an argument.
    """

    def __init__(self) -> None:
        """Start without records."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._new: dict[int, Storage] = {}
        self._old: dict[int, Storage] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the op and record the storages of its results."""
        # Before the op: results of in-place ops and views share storages with arguments.
        for tensor in _tensors((args, kwargs)):
            self._record(tensor, self._old)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._record(tensor, self._new)
        return result

    def _record(self, tensor: torch.Tensor, records: dict[int, Storage]) -> None:
        storage = Storage(tensor)
        known = self._new.get(storage.key) or self._old.get(storage.key)
        if known is None:
            # A weak reference keeps its key reserved, so keys are never reused here.
            records[storage.key] = storage

    def kept(self) -> int:
        """Bytes of new storages that are still in use."""
        # Tensors that only a reference cycle keeps alive do not count.
        gc.collect()
        return sum(storage.nbytes for storage in self._new.values() if not storage.expired())


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if _has_storage(leaf)]


def _has_storage(leaf: object) -> bool:
    # Sparse tensors have no storage of their own, but several inner tensors.
    return isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided


# -- reads of a source ----------------------------------------------------------------------------


class ReadRecorder:
    """A source that wraps another one and records which tensors are read.

    Other attributes, such as ``program`` of a ``HoldsProgram``, are those of the wrapped source.

    Attributes:
        read: FQNs passed to ``get``, in the order of the calls.
    """

    def __init__(self, source: WeightSource) -> None:
        """Wrap a source."""
        self.read: list[str] = []
        self._source = source

    @property
    def description(self) -> str:
        """Description of the wrapped source."""
        return self._source.description

    def names(self) -> Collection[str]:
        """Names of the wrapped source."""
        return self._source.names()

    def info(self, fqn: str) -> TensorInfo:
        """Metadata of the wrapped source."""
        return self._source.info(fqn)

    def get(self, fqn: str) -> torch.Tensor:
        """The tensor of the wrapped source; records the name."""
        self.read.append(fqn)
        return self._source.get(fqn)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


class WatchedSource(ReadRecorder):
    """A recorder whose ``get`` returns copies, to find those that are written to or kept.

    Attributes:
        storages: The storage of each copy, with the name of the entry.
    """

    def __init__(self, source: WeightSource) -> None:
        """Wrap a source."""
        super().__init__(source)
        self.storages: list[tuple[str, Storage]] = []
        self._copies: list[tuple[str, torch.Tensor, tuple[object, ...]]] = []

    def get(self, fqn: str) -> torch.Tensor:
        """A copy of the tensor of the wrapped source."""
        copy = super().get(fqn).detach().clone()
        self._copies.append((fqn, copy, _marks(copy)))
        self.storages.append((fqn, Storage(copy)))
        return copy

    def written(self) -> list[str]:
        """Sorted names of tensors that were written to or reshaped, even if no bit changed."""
        return sorted({fqn for fqn, copy, before in self._copies if _marks(copy) != before})


def kept_of(source: WeightSource, use: Callable[[WatchedSource], object]) -> list[str]:
    """Sorted names of tensors that are alive after a use of their source; all if the source is."""
    watched = WatchedSource(source)
    reference, storages = weakref.ref(watched), watched.storages
    use(watched)
    del watched
    gc.collect()
    alive = reference() is not None
    return sorted({fqn for fqn, storage in storages if alive or not storage.expired()})


def _marks(tensor: torch.Tensor) -> tuple[object, ...]:
    """What changes if somebody writes to a tensor, or changes its shape in place."""
    # Torch counts the writes to a tensor, except in inference mode.
    version = 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - no other name
    return version, tuple(tensor.shape), tensor.stride(), bits(tensor)


def with_odd_values(value: torch.Tensor) -> torch.Tensor:
    """A copy whose first elements are NaN, infinite, tiny and -0: code may want to repair them.

    Other dtypes than floating-point numbers are copied as they are.
    """
    copy = value.detach().clone(memory_format=torch.contiguous_format)
    if copy.dtype in {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
        tiny = torch.finfo(copy.dtype).smallest_normal / 2
        odd = torch.tensor([float("nan"), float("inf"), tiny, -0.0], dtype=copy.dtype)
        copy.view(-1)[: odd.numel()] = odd[: copy.numel()].to(copy.device)
    return copy


def reversed_dimensions(value: torch.Tensor) -> torch.Tensor | None:
    """The tensor as programs with the other order of dimensions save it; None if it looks equal."""
    found = value.permute(tuple(reversed(range(value.dim())))).contiguous()
    return None if found.shape == value.shape else found


def with_more_digits(value: torch.Tensor) -> torch.Tensor | None:
    """Numbers in float64 that no cast to the value's dtype keeps; None: there are none."""
    if value.dtype in {torch.float64, torch.bool} or value.is_complex():
        return None
    return value.detach().double() + (2.0**-60 if value.is_floating_point() else 0.25)


def at_the_place_of_a_deleted(
    first: WeightSource, other: WeightSource, use: Callable[[ReadRecorder], object]
) -> ReadRecorder | None:
    """A recorder of ``other`` with the ``id`` of one of ``first`` that was used and deleted.

    Python soon uses the memory of deleted objects again, so an ``id`` is no key for a source.

    Args:
        first: Source of the deleted recorder.
        other: Source of the result.
        use: Is called with the recorder of ``first``.

    Returns:
        None if somebody keeps what ``use`` got, or if the memory was not used again.
    """
    # One round is enough, unless something else takes the memory.
    for _ in range(20):
        source = ReadRecorder(first)
        address, reference = id(source), weakref.ref(source)
        use(source)
        del source
        if reference() is not None:
            gc.collect()
        if reference() is not None:
            return None
        others = []  # alive, so that each of them is elsewhere
        for _ in range(100):
            found = ReadRecorder(other)
            if id(found) == address:
                return found
            others.append(found)
    return None


class MixedSource:
    """A source with some tensors of one source, and all others of another one of equal names."""

    def __init__(self, first: WeightSource, other: WeightSource, names: Collection[str]) -> None:
        """Mix two sources; the tensors of ``names`` are those of the first one."""
        self._first, self._other, self._of_first = first, other, names

    @property
    def description(self) -> str:
        """Description of the first source."""
        return self._first.description

    def names(self) -> Collection[str]:
        """Names of the first source."""
        return self._first.names()

    def info(self, fqn: str) -> TensorInfo:
        """Metadata of the first source."""
        return self._first.info(fqn)

    def get(self, fqn: str) -> torch.Tensor:
        """The tensor of the source that the name belongs to."""
        return (self._first if fqn in self._of_first else self._other).get(fqn)


def state_of_program(source: WeightSource) -> dict[str, Bits]:
    """Bits of the tensors in a source's program, by "program <name>"; empty without a program."""
    if not isinstance(source, HoldsProgram):
        return {}
    state = source.program.state_dict
    return {f"program {name}": bits(tensor) for name, tensor in state.items()}


def parts_of_program(program: ExportedProgram) -> dict[str, Bits]:
    """Everything of a program that belongs to its user, as bits by a description.

    That is each tensor, whether it requires grad, and the graph.
    """
    constants = {n: t for n, t in program.constants.items() if isinstance(t, torch.Tensor)}
    tensors = {**constants, **program.state_dict}
    flags = {f"{name}.requires_grad": t.requires_grad for name, t in tensors.items()}
    return {
        **snapshot(tensors),
        **{name: ("bool", bytes([flag])) for name, flag in flags.items()},
        "the graph": ("text", str(program.graph).encode()),
    }


# -- plans of two copies --------------------------------------------------------------------------

PREFIX = "second."
"""Prefix of the copies in a ``CopiedPlan``."""


class CopiedPlan:
    """A plan with a copy of every leaf and row under a prefix.

    Attributes:
        data: Data of the plan with both copies.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, one = plan, plan.data
        leaves = [leaf.model_copy(update={"fqn": PREFIX + leaf.fqn}) for leaf in one.leaves]
        ties = [tuple(PREFIX + name for name in tie) for tie in one.ties]
        self._copies = {
            "leaves": tuple(leaves),
            "ties": tuple(ties),
            "ledger": tuple(map(_copied, one.ledger)),
        }
        both = {name: getattr(one, name) + copies for name, copies in self._copies.items()}
        self.data: Any = one.model_copy(update=both)

    def copies_only(self) -> CopiedPlan:
        """A plan with the copies, and without the leaves and rows that they were made from."""
        found = type(self)(self._plan)
        found.data = found.data.model_copy(update=self._copies)
        return found

    def pinned(self, name: str) -> torch.Tensor:
        """The tensor of the first plan."""
        return self._plan.pinned(name)


def _copied(row: Any) -> Any:
    slot = row.slot.model_copy(update={"name": PREFIX + row.slot.name})
    sources = tuple(PREFIX + name for name in row.sources)
    fqn = getattr(row.value, "fqn", None)
    # Only the value of a plain weight has a name in it.
    value = row.value if fqn is None else row.value.model_copy(update={"fqn": PREFIX + fqn})
    return row.model_copy(update={"slot": slot, "sources": sources, "value": value})
