"""Tensors by name as a weight source, and what makes a tensor unfit to be a weight."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from refitkit.errors import Problem, SourceError, WeightMismatchError
from refitkit.model import TensorInfo
from refitkit.program.ambient import is_transformed, why_not_real
from refitkit.program.dtypes import dtype_name, unusable_dtype
from refitkit.protocols import MayChange, SupportsReread

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

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
