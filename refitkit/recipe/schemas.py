"""What a recording has to know of an op: what it writes to, what it tells, what decides it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_DRAWN = frozenset(
    f"aten::{name}"
    for name in (
        *("normal_", "uniform_", "random_", "exponential_", "cauchy_", "geometric_", "log_normal_"),
        *("rand_like", "randn_like", "randint_like"),
    )
)
"""Random ops whose result does not depend on the values of their operand."""
_STATISTICS = {
    "aten::native_batch_norm": (("running_mean", "running_var"), "training"),
    "aten::cudnn_batch_norm": (("running_mean", "running_var"), "training"),
    "aten::miopen_batch_norm": (("running_mean", "running_var"), "training"),
    "aten::batch_norm_update_stats": (("running_mean", "running_var"), ""),
    "aten::batch_norm_gather_stats": (("running_mean", "running_var"), ""),
    "aten::batch_norm_gather_stats_with_counts": (("running_mean", "running_var"), ""),
}
"""Ops that write to operands and do not say so in their schema: to which, and if what is true."""
_QUIET = frozenset(
    {
        "aten::sym_size",
        "aten::sym_stride",
        "aten::sym_numel",
        "aten::sym_storage_offset",
        "aten::is_contiguous",
        "aten::is_non_overlapping_and_dense",
        "aten::is_strides_like_format",
        "aten::size",
        "aten::stride",
        "aten::dim",
        "aten::numel",
        "aten::is_pinned",
        "aten::is_same_size",
        "aten::_has_compatible_shallow_copy_type",
        "prim::device",
        "prim::layout",
    }
)
"""Ops that give no tensor and tell nothing of values."""


_LAYOUT = frozenset(
    {
        *("self", "a", "dtype", "out_dtype", "layout", "memory_format", "size", "sizes", "shape"),
        *("stride", "storage_offset", "dim", "dims", "dim0", "dim1", "dim2", "dimension", "axis"),
        *("start_dim", "end_dim", "source", "destination", "output_size", "input_size"),
        *("input_sizes", "bias_sizes", "normalized_shape", "chunks", "num_chunks", "sections"),
        *("split_size", "split_sizes", "reduction", "groups", "group", "padding", "dilation"),
        *("kernel_size", "output_padding", "pad", "N", "C", "HxW", "num_heads", "num_head"),
    }
)
"""Arguments of whole numbers that say how tensors lie, not which values they have."""


def is_quiet(op: Any) -> bool:
    """Whether an op that gives no tensor tells nothing of values."""
    return _name(op) in _QUIET or _name(op).startswith("prim::")


def is_random(op: Any) -> bool:
    """Whether random numbers decide what an op gives."""
    return torch.Tag.nondeterministic_seeded in op.tags


def is_drawn(op: Any) -> bool:
    """Whether nothing but random numbers decides what such an op gives."""
    return _name(op) in _DRAWN


def deciding(op: Any, inputs: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Operands whose values decide the shape of what an op gives."""
    if torch.Tag.dynamic_output_shape not in op.tags:
        return []
    indexing = _name(op) == "aten::index"
    return [tensor for tensor in inputs if tensor.dtype is torch.bool or not indexing]


def numbers_of(
    op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[int | float | complex]:
    """The Python numbers in a call that decide values, not how tensors lie."""
    for position, name, counts in _numbers(op):
        given = args[position] if position < len(args) else kwargs.get(name)
        if given is not None:
            for one in given if isinstance(given, list | tuple) else (given,):
                if isinstance(one, int | float | complex) and (counts or not isinstance(one, bool)):
                    yield one


@cache
def _numbers(op: Any) -> tuple[tuple[int, str, bool], ...]:
    """Position and name of arguments for such numbers, and whether truth values are some."""
    arguments = op._schema.arguments  # noqa: SLF001 - there is no other way
    kinds = {a.name: str(a.type).lower() for a in arguments}
    wide = {name for name, kind in kinds.items() if "int" not in kind and "bool" not in kind}
    return tuple(
        (position, argument.name, argument.name in wide)
        for position, argument in enumerate(arguments)
        if argument.name in wide or ("int" in kinds[argument.name] and argument.name not in _LAYOUT)
    )


def written_by(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that an op writes to."""
    given = [
        args[position] if position < len(args) else kwargs.get(name)
        for position, name, condition in _writes(op)
        if condition is None
        or (args[condition[0]] if condition[0] < len(args) else kwargs.get(condition[1]))
    ]
    return [one for one in tree_leaves(given) if isinstance(one, torch.Tensor)]


@cache
def _writes(op: Any) -> tuple[tuple[int, str, tuple[int, str] | None], ...]:
    """Position and name of the arguments that an op writes to, and of what has to be true."""
    arguments = op._schema.arguments  # noqa: SLF001 - there is no other way
    silent, condition = _STATISTICS.get(_name(op), ((), ""))
    positions = {argument.name: position for position, argument in enumerate(arguments)}
    only = (positions[condition], condition) if condition else None
    said = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return (
        *((positions[name], name, None) for name in said),
        *((positions[name], name, only) for name in silent),
    )


def _name(op: Any) -> str:
    name: str = op._schema.name  # noqa: SLF001 - there is no other way
    return name
