"""Tensors by name as a weight source, and what makes a tensor unfit to be a weight."""

from __future__ import annotations

import inspect
import sys
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from refitkit.errors import EngineError, Problem, SourceError, WeightMismatchError, raised_as
from refitkit.model import TensorInfo
from refitkit.program.ambient import is_transformed, why_not_real
from refitkit.program.bits import same_bits
from refitkit.program.dtypes import dtype_name, unusable_dtype
from refitkit.protocols import GivesPieces, MayChange, SupportsReread

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping

    from refitkit.protocols import SlotValue, WeightSource


_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_EXTRA_STATE = "_extra_state"  # torch.nn.Module.get_extra_state: anything, under this name


def is_distributed(value: Any) -> bool:
    """Whether a value is a ``DTensor``; whoever has one has imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def unusable_reason(value: Any) -> str:
    """Why a value cannot be a weight as it is; empty if it can.

    Usable are strided tensors with data: any shape, strides, offset and device; and DTensors.
    """
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}, not a tensor"
    if is_distributed(value):
        return unusable_dtype(dtype_name(value.dtype))
    if value.is_nested or type(value) not in _PLAIN:
        return (
            why_not_real(value)
            or f"a tensor of the kind {type(value).__name__}; pass plain tensors"
        )
    if value.layout is not torch.strided:
        return f"layout {str(value.layout).removeprefix('torch.')}; pass value.to_dense()"
    if value.is_quantized:
        return "a quantized tensor; pass value.dequantize() or use a plugin that maps it"
    unfit = unusable_dtype(dtype_name(value.dtype))
    return why_not_real(value) or unfit or _lost_data(value)


def _lost_data(value: torch.Tensor) -> str:
    if value.is_meta:
        return "a meta tensor without data; load the checkpoint first"
    if value.untyped_storage().nbytes() < _extent(value):
        return "a tensor whose memory was freed; gather or unshard it first"
    return ""


def _extent(value: torch.Tensor) -> int:
    """Bytes that a tensor's memory must have for its last element to lie inside."""
    if not value.numel():
        return 0
    if value.is_contiguous():
        return int((value.storage_offset() + value.numel()) * value.itemsize)
    last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    return int((value.storage_offset() + last + 1) * value.itemsize)


def require_values(
    slots: Collection[str], values: Iterable[SlotValue], *, partial: bool = False
) -> None:
    """Check that there is one value for each slot of an engine, before any is loaded.

    Args:
        slots: Names of all slots.
        values: What was given.
        partial: Whether slots without a value keep theirs.

    Raises:
        WeightMismatchError: Lists all that are unknown, given twice, or missing.
    """
    problems = odd_names(slots, values, partial=partial)
    if problems:
        message = "The values are not those of the engine's weights."
        raise WeightMismatchError(message, problems=problems)


def odd_names(
    slots: Collection[str], values: Iterable[SlotValue], *, partial: bool = False
) -> list[Problem]:
    """Names that are unknown, given twice, or missing; see ``require_values``."""
    names = [value.slot.name for value in values]
    if len(names) == len(slots) and set(names) == set(slots):  # mostly each slot has its value
        return []
    given = Counter(names)
    problems = [
        Problem(name, "unexpected", hint="the engine has no such weight")
        for name in sorted(given.keys() - set(slots))
    ]
    problems += [Problem(n, "given twice") for n, times in sorted(given.items()) if times > 1]
    if not partial:
        hint = "a full refit needs a value for every slot"
        problems += [Problem(n, "missing", hint=hint) for n in sorted(set(slots) - given.keys())]
    return problems


def describe_tensor(value: Any, *, persistent: bool = True) -> TensorInfo:
    """What a source says of a value that it holds in memory."""
    unusable = unusable_reason(value)
    if not isinstance(value, torch.Tensor) or value.is_nested or is_lazy(value):
        return TensorInfo(dtype="", shape=(), persistent=persistent, unusable=unusable)
    return TensorInfo(
        dtype=dtype_name(value.dtype),
        shape=tuple(value.shape),
        persistent=persistent,
        unusable=unusable,
    )


def require_reread(source: WeightSource) -> None:
    """Hold all that a source gave against a second reading, where it comes from files.

    Raises:
        SourceError: Files have other bytes now, or the source cannot read them again.
    """
    if isinstance(source, SupportsReread):
        source.reread()
    elif isinstance(source, MayChange):
        raise SourceError(
            f"{source.description} cannot be held against a second reading.",
            hint="Leave reread=True out of the settings, or copy the weights to a file that "
            "refitkit reads itself: .safetensors or torch.save.",
        )


class TensorMap:
    """A mapping from FQN to tensor as a weight source; values are looked up when asked for.

    A ``DTensor`` is put together when it is read. That is a collective: every process of its mesh
    has to read the same ones in the same order, as processes do that refit the same module with the
    same plan and settings. Describing one asks nobody.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        description: str = "a state_dict",
        *,
        not_persistent: Collection[str] = (),
    ) -> None:
        """Keep the mapping, no copies. Extra state of modules, which is no weight, is left out.

        Args:
            tensors: Values by FQN. What is not a usable tensor is told by ``info``.
            description: What this is, for messages.
            not_persistent: Names that a state_dict would not hold.
        """
        self.description = description
        self._tensors = tensors
        self._names = dict.fromkeys(n for n in tensors if n.rpartition(".")[2] != _EXTRA_STATE)
        self._not_persistent = frozenset(not_persistent)

    def names(self) -> Collection[str]:
        """All names."""
        return self._names.keys()

    def info(self, fqn: str) -> TensorInfo:
        """Dtype and shape of one tensor."""
        return describe_tensor(self._tensors[fqn], persistent=fqn not in self._not_persistent)

    def doubtful(
        self, names: Iterable[str], wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> Iterator[str]:
        """Names of tensors that may be unusable, or of another dtype or shape than is wanted.

        For those who read many tensors often: much cheaper than ``info``, which then tells.

        Args:
            names: Names that there are.
            wanted: Dtype and shape by name.
        """
        for name in names:
            value, (dtype, shape) = self._tensors[name], wanted.get(name, (None, ()))
            if not (
                type(value) in _PLAIN
                and not is_transformed(value)
                and value.dtype is dtype
                and value.shape == shape
                and value.layout is torch.strided
                and not value.is_meta
                and value.is_contiguous()
                and value.untyped_storage().nbytes() >= value.nbytes
            ):
                yield name

    def ties(self) -> Collection[tuple[str, ...]]:
        """Names that share all of their memory; see ``refitkit.protocols.KnowsTies``."""
        classes: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for name in self._names:
            value = self._tensors[name]
            if type(value) in _PLAIN and not unusable_reason(value) and value.data_ptr():
                place = value.device, value.data_ptr()
                classes[(*place, value.dtype, value.shape, value.stride())].append(name)
        return [tuple(names) for names in classes.values() if len(names) > 1]

    def get(self, fqn: str) -> torch.Tensor:
        """The tensor itself, without its gradient history; all of a distributed one."""
        value = self._tensors[fqn]
        if type(value) is torch.Tensor and not value.requires_grad:
            return value  # mostly, and an alias of each would cost as much as a check of it
        if not isinstance(value, torch.Tensor):
            raise SourceError(f"{self.description}: {fqn!r} is {unusable_reason(value)}.")
        if type(value) not in _PLAIN and is_distributed(value):
            whole: torch.Tensor = value.detach().full_tensor()  # type: ignore[attr-defined]
            return whole
        return value.detach()


# MERGED pieces: Large entries of sources looked at piece by piece, where the source can give them
# so.
#
# A whole tensor that is read from a file is new memory. Its pieces are not, and they are still in
# the cache of the processor when they are looked at.

LARGE = 1 << 22
"""Bytes from which on pieces are asked for: smaller tensors are no matter."""


def pieces_of(source: WeightSource, fqn: str) -> Iterator[torch.Tensor] | None:
    """An entry in pieces; None where the source gives it as a whole only."""
    return source.pieces(fqn) if isinstance(source, GivesPieces) else None


def write_value(into: torch.Tensor, value: SlotValue) -> bool:
    """Write a value piece by piece, if it comes so and there is a place for it in one run.

    Args:
        into: A tensor of the slot's dtype and shape.
        value: The value.

    Returns:
        Whether it was written.

    Raises:
        SourceError: The pieces are not what the slot takes, or cannot be read.
    """
    pieces = _pieces_for(into, value)
    if pieces is None:
        return False
    for place, piece in _side_by_side(into, pieces, value.slot.name):
        place.copy_(piece)
    return True


def is_value(found: torch.Tensor, value: SlotValue) -> bool:
    """Whether a tensor is known to have the bits of a value that comes in pieces.

    Raises:
        SourceError: The pieces are not what the slot takes, or cannot be read.
    """
    pieces = _pieces_for(found, value)
    return pieces is not None and all(
        same_bits(place, piece) for place, piece in _side_by_side(found, pieces, value.slot.name)
    )


def _pieces_for(tensor: torch.Tensor, value: SlotValue) -> Iterator[torch.Tensor] | None:
    if value.pieces is None or tensor.nbytes < LARGE or not tensor.is_contiguous():
        return None
    return value.pieces()


def _side_by_side(
    tensor: torch.Tensor, pieces: Iterable[torch.Tensor], name: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    flat, done = tensor.view(-1), 0
    for piece in pieces:
        end = done + piece.numel()
        if piece.dtype != flat.dtype or end > flat.numel():
            raise SourceError(f"{name!r} takes {flat.numel()} of {flat.dtype}, not what was read.")
        yield flat[done:end], piece
        done = end
    if done != flat.numel():
        raise SourceError(f"{name!r} takes {flat.numel()} elements, and {done} were read.")


# MERGED module_weights: A live module as a weight source, by two sets of names where state_dict
# hooks change them.


class ModuleWeights(TensorMap):
    """What a live module's state_dict holds, as it is when it is read; gradients do not matter.

    Buffers that no state_dict holds are no weights, so that a module and its state_dict give the
    same result.

    A module's state_dict hooks may rename, drop, add or compute entries, while ``torch.export``
    names weights by where they are in the module. Then the parameters and buffers themselves are
    another set of names: see ``namings``.

    Attributes:
        left_out: Those buffers, by FQN; see ``refitkit.protocols.LeavesOut``.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        """Keep the tensors, no copies.

        Raises:
            SourceError: The module's own code fails to make a state_dict.
        """
        what = f"a live {type(module).__name__}"
        with raised_as(SourceError, f"The state_dict of {what} cannot be made"):
            state = _state_of(module)
        super().__init__(state, what)
        buffers = module.named_buffers(remove_duplicate=False)
        self.left_out = {name: value for name, value in buffers if name not in state}
        own = dict(_own_tensors(module))
        same = own.keys() == self.names() and all(value is state[n] for n, value in own.items())
        self._own = {} if same else own  # nearly always no hook changed anything

    def namings(self) -> Collection[WeightSource]:
        """By FQN, then by the state_dict; see ``refitkit.protocols.HasNamings``."""
        if not self._own:
            return ()
        by_state = f"{self.description}, by its state_dict"
        return self._by_fqn, _Naming(self, self._tensors, by_state)

    @property
    def without_plan(self) -> WeightSource:
        """The set of names for those who have no plan and need the parameters: averages.

        Those are FQNs, unless the state_dict has parameters only in a form that hooks computed and
        gave other names: wrappers do that which keep parameters in pieces.
        """
        own, state = self._own, self._tensors
        places = set(map(_place, own.values()))
        computed = [name for name, value in state.items() if _place(value) not in places]
        all_held = places.issubset(map(_place, state.values()))
        as_they_are = not computed or all_held or any(name in own for name in computed)
        return self._by_fqn if own and as_they_are else self

    @property
    def _by_fqn(self) -> WeightSource:
        """Parameters and buffers. One that hooks drop is no weight that a program has to know."""
        own, state = self._own, self._tensors
        held = {_place(value) for value in state.values()}
        dropped = {n for n, v in own.items() if n not in state and _place(v) not in held}
        what = f"{self.description}, by the names of its parameters and buffers"
        return _Naming(self, own, what, not_persistent=dropped)

    def ties(self) -> Collection[tuple[str, ...]]:
        """Names that are one tensor, be they FQNs or names in the state_dict.

        See ``refitkit.protocols.KnowsTies``. A name that hooks gave to another tensor is in none.
        """
        if not self._own:
            return super().ties()
        classes: dict[Hashable, dict[str, None]] = defaultdict(dict)
        for name, value in (*self._own.items(), *self._tensors.items()):
            here, there = self._own.get(name, value), self._tensors.get(name, value)
            if isinstance(value, torch.Tensor) and _place(here) == _place(there):
                classes[_place(value)][name] = None
        return [tuple(names) for names in classes.values() if len(names) > 1]


def _state_of(module: torch.nn.Module) -> Mapping[str, Any]:
    """A module's state_dict, with parameters as they are, if its own code knows how to."""
    try:
        inspect.signature(module.state_dict).bind(keep_vars=True)
    except TypeError:
        return module.state_dict()
    return module.state_dict(keep_vars=True)


class _Naming(TensorMap):
    """One set of names of a module."""

    def __init__(
        self,
        module: ModuleWeights,
        tensors: Mapping[str, Any],
        description: str,
        *,
        not_persistent: Collection[str] = (),
    ) -> None:
        """Keep the tensors, no copies."""
        super().__init__(tensors, description, not_persistent=not_persistent)
        self._module = module

    def ties(self) -> Collection[tuple[str, ...]]:
        """Those of the module: another source may have the names of its other set."""
        return self._module.ties()


def _place(value: Any) -> Hashable:
    """What two tensors have in common if they are one: memory and layout, or the very object."""
    plain = type(value) in {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
    if not plain or value.layout is not torch.strided or value.is_meta or not value.data_ptr():
        return id(value)
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


def _own_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers by FQN, tied ones under all names; no hook has a say."""
    for path, part in module.named_modules(remove_duplicate=False):
        lost = part._non_persistent_buffers_set  # noqa: SLF001 - torch has no other way
        found = {**part._parameters, **part._buffers}  # noqa: SLF001 - wrappers override the others
        for name, value in found.items():
            if value is not None and name not in lost:
                yield (f"{path}.{name}" if path else name), value


# MERGED overwriting: Values that are written over live ones, without a way back.


class Overwriting:
    """A staged refit that writes when it is committed; see ``protocols.SupportsOverwrite``."""

    def __init__(self, write: Callable[[], None]) -> None:
        """Write nothing yet.

        Args:
            write: Reads the values and writes them over the live ones.
        """
        self._write = write
        self._begun = False

    def commit(self) -> None:
        """Write."""
        self._begun = True
        self._write()

    def rollback(self) -> None:
        """Refuse, once anything may have been written.

        Raises:
            EngineError: It may have been.
        """
        if self._begun:
            raise EngineError("The weights from before were given up: rollback=False.")

    def discard(self) -> None:
        """Leave all as it is: nothing was written."""

    def changed(self) -> None:
        """Nobody has compared: the values are read when they are written."""
