"""Tensors in memory as weight sources, and checks and reads of source entries.

This module hides which Python values can be weights, and how live modules name theirs. In order:

- ``unusable_reason`` and ``describe_tensor``: what makes a value unusable as a weight;
- ``TensorMap`` and ``ModuleWeights``: a mapping, and a live module, as a source;
- ``pieces_of``, ``write_value`` and ``is_value``: entries that are read in pieces. Reading a
  whole tensor from a file takes new memory. Pieces reuse a buffer or are read into the memory of an
  engine, and are still in the processor's cache when they are checked, compared or copied. What was
  read needs no second read to be compared (``bits_known``);
- ``require_values`` and ``Overwriting``: parts that engines of all backends share.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter, OrderedDict, defaultdict
from operator import ge
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from refitkit.errors import EngineError, Problem, SourceError, WeightMismatchError, raised_as
from refitkit.model import TensorInfo
from refitkit.program.ambient import is_transformed, why_not_real
from refitkit.program.bits import same_bits
from refitkit.program.dtypes import dtype_name, unusable_dtype
from refitkit.protocols import GivesPieces, KnowsBits, MayChange, SupportsReread

if TYPE_CHECKING:
    from collections.abc import (
        Callable,
        Collection,
        Hashable,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

    from refitkit.protocols import SlotValue, WeightSource


PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
"""Types of tensors that run no code of their own."""
_EXTRA_STATE = "_extra_state"
"""Last part of the name of ``torch.nn.Module.get_extra_state`` entries, which hold any object."""

LARGE = 1 << 22
"""Bytes from which on entries are compared in pieces. For smaller ones it saves nothing."""


# -- usable values ----------------------------------------------------------------------------


def unusable_reason(value: Any) -> str:
    """Why a value cannot be a weight as it is. Empty if it can.

    Usable are DTensors, and strided tensors with data: of any shape, strides, offset and device.
    """
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}, not a tensor"
    if is_distributed(value):
        return unusable_dtype(dtype_name(value.dtype))
    if value.is_nested or type(value) not in PLAIN:
        return (
            why_not_real(value)
            or f"a tensor of the kind {type(value).__name__}; pass plain tensors"
        )
    if value.layout is not torch.strided:
        return f"layout {str(value.layout).removeprefix('torch.')}; pass value.to_dense()"
    if value.is_quantized:
        return "a quantized tensor; pass value.dequantize() or use a plugin that maps it"
    dtype_reason = unusable_dtype(dtype_name(value.dtype))
    return why_not_real(value) or dtype_reason or _no_data_reason(value)


def are_plain(values: Sequence[Any]) -> bool:
    """Whether all values are contiguous tensors with data, whose bits are their values.

    It takes much less time than asking each of them.
    """
    # subclasses run code of their own when they are asked for an attribute
    return (
        PLAIN.issuperset(map(type, values))
        and all(value.layout is torch.strided for value in values)
        and not any(value.is_meta or value.is_nested or value.is_quantized for value in values)
        # these have no storage
        and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, values))  # noqa: SLF001
        and not any(map(torch.Tensor.is_neg, values))
        and not any(map(torch.Tensor.is_conj, values))
        and have_memory(values, ends_of(values))
        and all(map(torch.Tensor.is_contiguous, values))
    )


def ends_of(values: Sequence[torch.Tensor]) -> list[int]:
    """Return how many bytes the storage of each contiguous tensor has at least."""
    offsets = map(torch.Tensor.storage_offset, values)
    return [int(v.nbytes + n * v.itemsize) for v, n in zip(values, offsets, strict=True)]


def have_memory(values: Sequence[torch.Tensor], ends: Sequence[int]) -> bool:
    """Whether the memory of no tensor was freed.

    Args:
        values: Tensors with storages.
        ends: See ``ends_of``.
    """
    storages = map(torch.Tensor.untyped_storage, values)
    return all(map(ge, map(torch.UntypedStorage.nbytes, storages), ends))


def is_distributed(value: Any) -> bool:
    """Whether a value is a ``DTensor``."""
    # a process that has a DTensor has imported its module; importing it here would be slow
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _no_data_reason(value: torch.Tensor) -> str:
    if value.is_meta:
        return "a meta tensor without data; load the checkpoint first"
    # FSDP resizes the storage of unsharded parameters to 0, while their shape stays
    if value.untyped_storage().nbytes() < _extent(value):
        return "a tensor whose memory was freed; gather or unshard it first"
    return ""


def _extent(value: torch.Tensor) -> int:
    """Bytes from the start of a tensor's storage to the end of its last element."""
    if not value.numel():
        return 0
    if value.is_contiguous():
        return int((value.storage_offset() + value.numel()) * value.itemsize)
    last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    return int((value.storage_offset() + last + 1) * value.itemsize)


def describe_tensor(value: Any, *, persistent: bool = True) -> TensorInfo:
    """Dtype and shape of a value that a source holds in memory, and why it is unusable, if it is.

    Args:
        value: Any value.
        persistent: Whether a state_dict holds it.
    """
    unusable = unusable_reason(value)
    # nested and lazy tensors raise if they are asked for their shape
    if not isinstance(value, torch.Tensor) or value.is_nested or is_lazy(value):
        return TensorInfo(dtype="", shape=(), persistent=persistent, unusable=unusable)
    return TensorInfo(
        dtype=dtype_name(value.dtype),
        shape=tuple(value.shape),
        persistent=persistent,
        unusable=unusable,
    )


def require_reread(source: WeightSource) -> None:
    """Compare all that a source of files returned with a second read of the files.

    Sources that are not files are left alone.

    Raises:
        SourceError: The files have changed, or the source cannot read them again.
    """
    if isinstance(source, SupportsReread):
        source.reread()
    elif isinstance(source, MayChange):
        raise SourceError(
            f"{source.description} cannot be read a second time for comparison.",
            hint="Leave reread=True out of the settings, or copy the weights to a file that "
            "refitkit reads itself: .safetensors or torch.save.",
        )


# -- sources ----------------------------------------------------------------------------------


class TensorMap:
    """A mapping from FQN to tensor as a weight source. It looks values up on each request.

    ``get`` gathers a ``DTensor``, which is a collective: all processes of the mesh must get the
    same tensors in the same order. They do if they refit the same module with the same plan and
    settings. ``info`` of a ``DTensor`` is local.

    Attributes:
        description: Label of the source in reports and error messages.
        is_donated: Whether ``donate`` was called.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        description: str = "a state_dict",
        *,
        not_persistent: Collection[str] = (),
    ) -> None:
        """Keep the mapping, without copies. Extra state of modules is left out.

        Args:
            tensors: Values by FQN. ``info`` reports values that are not usable tensors.
            description: Label of the source in reports and error messages.
            not_persistent: Names that a state_dict would not hold.
        """
        self.description = description
        self._tensors = tensors
        extra = {n for n in tensors if n.endswith(_EXTRA_STATE)}
        self._names = dict.fromkeys(tensors)
        for name in extra:
            if name.rpartition(".")[2] == _EXTRA_STATE:
                del self._names[name]
        self._not_persistent = frozenset(not_persistent)
        self.is_donated = False

    def donate(self) -> None:
        """Let engines keep the tensors: their owner writes to none of them from now on."""
        self.is_donated = True

    def gives_away(self, fqn: str) -> bool:  # noqa: ARG002 - the protocol's
        """Whether the tensors were donated; see ``refitkit.protocols.GivesAway``."""
        return self.is_donated

    @property
    def in_memory(self) -> Mapping[str, Any] | None:
        """All entries, if looking them up has no effect and takes no time; else None."""
        if type(self._tensors) not in {dict, OrderedDict} or self._not_persistent:
            return None
        tensors = self._tensors
        # its owner may have removed some since
        return (
            {n: tensors[n] for n in self._names} if self._names.keys() <= tensors.keys() else None
        )

    def names(self) -> Collection[str]:
        """All names of the source."""
        return self._names.keys()

    def info(self, fqn: str) -> TensorInfo:
        """Dtype and shape of an entry, and why it is unusable, if it is."""
        return describe_tensor(self._tensors[fqn], persistent=fqn not in self._not_persistent)

    def doubtful(
        self, names: Iterable[str], wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> Iterator[str]:
        """Names of entries that may be unusable, or may have another dtype or shape than wanted.

        This is much cheaper than ``info`` of all entries. Callers need ``info`` of these only.

        Args:
            names: Names of the source.
            wanted: Expected dtype and shape, by name.
        """
        for name in names:
            value, (dtype, shape) = self._tensors[name], wanted.get(name, (None, ()))
            if not (
                type(value) in PLAIN
                and not value.is_nested
                and not is_transformed(value)
                and value.dtype is dtype
                and value.shape == shape
                and value.layout is torch.strided
                and not value.is_meta
                and value.is_contiguous()
                and value.untyped_storage().nbytes() >= _extent(value)
            ):
                yield name

    def ties(self) -> Collection[tuple[str, ...]]:
        """Classes of names that share all of their memory. See ``refitkit.protocols.KnowsTies``."""
        classes: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for name in self._names:
            value = self._tensors[name]
            # tensors without elements all have the address 0, and are not tied
            if type(value) in PLAIN and not unusable_reason(value) and value.data_ptr():
                place = value.device, value.data_ptr()
                classes[(*place, value.dtype, value.shape, value.stride())].append(name)
        return [tuple(names) for names in classes.values() if len(names) > 1]

    def get(self, fqn: str) -> torch.Tensor:
        """The tensor of an entry, without its gradient history. A ``DTensor`` is gathered.

        Raises:
            SourceError: The entry is not a tensor.
        """
        value = self._tensors[fqn]
        # the usual entry; detach() of each would cost as much as its checks do
        if type(value) is torch.Tensor and not value.requires_grad:
            return value
        if not isinstance(value, torch.Tensor):
            raise SourceError(f"{self.description}: {fqn!r} is {unusable_reason(value)}.")
        if type(value) not in PLAIN and is_distributed(value):
            full: torch.Tensor = value.detach().full_tensor()  # type: ignore[attr-defined]
            return full
        return value.detach()


class ModuleWeights(TensorMap):
    """The state_dict of a live module as a source. Values are read when they are requested.

    Buffers that no state_dict holds are left out, so that a module and its state_dict give the same
    result.

    A module's state_dict hooks may rename, drop, add or compute entries, but ``torch.export`` names
    weights by their place in the module. If hooks do so, the module has two sets of names: those of
    its parameters and buffers, and those of its state_dict. See ``namings``.

    Attributes:
        left_out: The buffers that are left out, by FQN. See ``refitkit.protocols.LeavesOut``.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        """Keep the tensors, without copies.

        Args:
            module: Any module.

        Raises:
            SourceError: The module's own code fails to make a state_dict.
        """
        description = f"a live {type(module).__name__}"
        with raised_as(SourceError, f"The state_dict of {description} cannot be made"):
            state = _state_of(module)
        super().__init__(state, description)
        # a hook that drops a buffer from the state_dict leaves it out, too
        buffers = module.named_buffers(remove_duplicate=False)
        self.left_out = {name: value for name, value in buffers if name not in state}
        own = dict(_parameters_and_buffers(module))
        is_same = own.keys() == self.names() and all(v is state[n] for n, v in own.items())
        # empty for nearly all modules: few have hooks that change the state_dict
        self._own_if_different = {} if is_same else own

    @property
    def in_memory(self) -> Mapping[str, Any] | None:
        """All entries; None if the module has two sets of names."""
        return None if self._own_if_different else super().in_memory

    def namings(self) -> Collection[WeightSource]:
        """The source by FQN, then by state_dict. See ``refitkit.protocols.HasNamings``."""
        if not self._own_if_different:
            return ()
        by_state = f"{self.description}, by its state_dict"
        return self._by_fqn, _NameSet(self, self._tensors, by_state)

    @property
    def without_plan(self) -> WeightSource:
        """The set of names for callers that have no plan and need the parameters, such as averages.

        Those are FQNs. The exception are wrappers that keep parameters in shards: their hooks
        compute full parameters and rename them, and only the state_dict has them.
        """
        own, state = self._own_if_different, self._tensors
        own_memory = set(map(_memory_key, own.values()))
        computed = [name for name, value in state.items() if _memory_key(value) not in own_memory]
        holds_all = own_memory.issubset(map(_memory_key, state.values()))
        has_parameters = not computed or holds_all or any(name in own for name in computed)
        return self._by_fqn if own and has_parameters else self

    @property
    def _by_fqn(self) -> WeightSource:
        """Parameters and buffers by FQN. Those that hooks drop are marked as not persistent."""
        own, state = self._own_if_different, self._tensors
        state_memory = {_memory_key(value) for value in state.values()}
        dropped = {
            name
            for name, value in own.items()
            if name not in state and _memory_key(value) not in state_memory
        }
        description = f"{self.description}, by the names of its parameters and buffers"
        return _NameSet(self, own, description, not_persistent=dropped)

    def ties(self) -> Collection[tuple[str, ...]]:
        """Classes of names that are one tensor, from both sets of names.

        See ``refitkit.protocols.KnowsTies``. A name that stands for different tensors in the two
        sets is in no class.
        """
        if not self._own_if_different:
            return super().ties()
        own, state = self._own_if_different, self._tensors
        classes: dict[Hashable, dict[str, None]] = defaultdict(dict)
        for name, value in (*own.items(), *state.items()):
            in_own, in_state = own.get(name, value), state.get(name, value)
            if isinstance(value, torch.Tensor) and _memory_key(in_own) == _memory_key(in_state):
                classes[_memory_key(value)][name] = None
        return [tuple(names) for names in classes.values() if len(names) > 1]


class _NameSet(TensorMap):
    """One of the two sets of names of a module."""

    def __init__(
        self,
        module: ModuleWeights,
        tensors: Mapping[str, Any],
        description: str,
        *,
        not_persistent: Collection[str] = (),
    ) -> None:
        super().__init__(tensors, description, not_persistent=not_persistent)
        self._module = module

    def gives_away(self, fqn: str) -> bool:
        """Whether the module was donated."""
        return self._module.gives_away(fqn)

    def ties(self) -> Collection[tuple[str, ...]]:
        """Ties of the module, because another source may use the names of the other set."""
        return self._module.ties()


def _state_of(module: torch.nn.Module) -> Mapping[str, Any]:
    """A module's state_dict with the parameters themselves, if its own code supports that."""
    # a module may override state_dict with fewer parameters
    try:
        inspect.signature(module.state_dict).bind(keep_vars=True)
    except TypeError:
        return module.state_dict()
    return module.state_dict(keep_vars=True)


def _parameters_and_buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers by FQN, tied ones under all names. No hook is called."""
    for path, part in module.named_modules(remove_duplicate=False):
        not_persistent = part._non_persistent_buffers_set  # noqa: SLF001 - torch has no public one
        # wrappers override named_parameters() and named_buffers()
        tensors = {**part._parameters, **part._buffers}  # noqa: SLF001
        for name, value in tensors.items():
            if value is not None and name not in not_persistent:
                yield (f"{path}.{name}" if path else name), value


def _memory_key(value: Any) -> Hashable:
    """A key that is equal for values that are one tensor: memory and layout, or the object."""
    is_plain = type(value) in PLAIN
    # others have the address 0, or raise if they are asked for it
    if not is_plain or value.layout is not torch.strided or value.is_meta or not value.data_ptr():
        return id(value)
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


# -- pieces -----------------------------------------------------------------------------------


def pieces_of(
    source: WeightSource, fqn: str, into: torch.Tensor | None = None
) -> Iterator[torch.Tensor] | None:
    """An entry in pieces. None if the source returns it only as a whole.

    See ``refitkit.protocols.GivesPieces`` for the arguments, and for dtype, shape and lifetime of
    pieces.
    """
    return source.pieces(fqn, into) if isinstance(source, GivesPieces) else None


def bits_known(source: WeightSource, fqn: str, tensor: torch.Tensor) -> bool | None:
    """Whether a tensor has the bits of an entry. None if the entry has to be read to tell.

    See ``refitkit.protocols.KnowsBits``.
    """
    return source.has_bits(fqn, tensor) if isinstance(source, KnowsBits) else None


def write_value(into: torch.Tensor, value: SlotValue) -> bool:
    """Write a value piece by piece, if it comes in pieces and the target is contiguous.

    A file is read straight into a target on the CPU.

    Args:
        into: A tensor of the slot's dtype and shape.
        value: The value.

    Returns:
        Whether the value was written. If not, the caller loads it as a whole.

    Raises:
        SourceError: The pieces do not fit the slot, or cannot be read.
    """
    if value.pieces is None or not into.is_contiguous():
        return False
    pieces = value.pieces(into if into.is_cpu else None)
    if pieces is None:
        return False
    flat, start, itemsize = into.view(-1), into.data_ptr(), into.itemsize
    for piece, begin, end in _with_places(pieces, flat, value.slot.name):
        if piece.data_ptr() != start + begin * itemsize:  # else it was read there
            flat[begin:end].copy_(piece)
    return True


def is_value(found: torch.Tensor, value: SlotValue) -> bool:
    """Whether a tensor has the bits of a value that a source recognizes or that comes in pieces.

    False can also mean that it is neither, so nothing was compared.

    Args:
        found: A tensor of the slot's dtype and shape.
        value: The value.

    Raises:
        SourceError: The pieces do not fit the slot, or cannot be read.
    """
    if not found.is_contiguous():
        return False
    known = None if value.has_bits is None or not found.is_cpu else value.has_bits(found)
    if known is not None or value.pieces is None or found.nbytes < LARGE:
        return known is True
    pieces, flat = value.pieces(None), found.view(-1)
    return pieces is not None and all(
        same_bits(flat[begin:end], piece)
        for piece, begin, end in _with_places(pieces, flat, value.slot.name)
    )


def _with_places(
    pieces: Iterable[torch.Tensor], flat: torch.Tensor, name: str
) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Each piece, with the range of elements of a flat tensor that it belongs to."""
    dtype, count, start = flat.dtype, flat.numel(), 0
    for piece in pieces:
        end = start + piece.numel()
        if piece.dtype != dtype or end > count:
            raise SourceError(f"{name!r} takes {count} of {dtype}; the source returned others.")
        yield piece, start, end
        start = end
    if start != count:
        raise SourceError(f"{name!r} takes {count} elements; the source returned {start}.")


# -- engines ----------------------------------------------------------------------------------


def require_values(
    slots: Collection[str], values: Iterable[SlotValue], *, partial: bool = False
) -> None:
    """Check that there is one value for each slot of an engine, before any is loaded.

    Args:
        slots: Names of all slots.
        values: The values that the engine was given.
        partial: Whether slots without a value keep their live one.

    Raises:
        WeightMismatchError: Values are unknown, given twice, or missing. Lists all of them.
    """
    problems = odd_names(slots, values, partial=partial)
    if problems:
        message = "The values are not those of the engine's weights."
        raise WeightMismatchError(message, problems=problems)


def odd_names(
    slots: Collection[str], values: Iterable[SlotValue], *, partial: bool = False
) -> list[Problem]:
    """A problem for each name that is unknown, given twice, or missing. See ``require_values``."""
    names = [value.slot.name for value in values]
    if len(names) == len(slots) and set(names) == set(slots):  # the usual case, without sorting
        return []
    counts = Counter(names)
    problems = [
        Problem(name, "unexpected", hint="the engine has no such weight")
        for name in sorted(counts.keys() - set(slots))
    ]
    problems += [Problem(n, "given twice") for n, times in sorted(counts.items()) if times > 1]
    if not partial:
        hint = "a full refit needs a value for every slot"
        problems += [Problem(n, "missing", hint=hint) for n in sorted(set(slots) - counts.keys())]
    return problems


class Overwriting:
    """A staged refit that writes over the live values on commit, and cannot roll back.

    See ``refitkit.protocols.SupportsOverwrite``.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        """Write nothing yet.

        Args:
            write: Reads the values and writes them over the live ones.
        """
        self._write = write
        self._has_started = False

    def commit(self) -> None:
        """Write the values."""
        self._has_started = True
        self._write()

    def rollback(self) -> None:
        """Do nothing if ``commit`` was not called.

        Raises:
            EngineError: Live values may have been overwritten.
        """
        if self._has_started:
            raise EngineError("The previous weights were overwritten: rollback=False.")

    def discard(self) -> None:
        """Do nothing: no value was written."""

    def changed(self) -> None:
        """None: values are read when they are written, so they were not compared."""
