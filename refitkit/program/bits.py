"""Comparing tensors bit by bit, hashing their bytes, and finding elements that are not finite.

A comparison of bits distinguishes -0 from 0, and a NaN equals a NaN of the same bits. The second
half of the module finds NaN and infinite elements. Integers and booleans are always finite.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from functools import cache
from typing import TYPE_CHECKING

import torch

from refitkit.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by size in bytes, to look at values of other dtypes as bits."""
_WIDEST = (torch.int64, torch.int32, torch.int16, torch.uint8)


# -- bits -------------------------------------------------------------------------------------


def same_bits(a: torch.Tensor, b: torch.Tensor, first: int | None = None) -> bool:
    """Return whether two tensors have equal dtypes, shapes and bits.

    Args:
        a: First tensor, with any strides.
        b: Second tensor. It is copied to the device of the first one if it is on another device.
        first: Number of elements to compare, from the start; None compares all.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = flat_pair(a, b.to(a.device))
    if first is not None:
        x, y = x[:first], y[:first]
    kind = _widest(x, y)
    return torch.equal(x.view(kind), y.view(kind))


_SAMPLE = 1 << 18
"""Bytes that are compared before all others."""


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two flat tensors have equal bits; fast if they differ in most places.

    Args:
        a: Memory as ``uint8``.
        b: Memory of the same size.
    """
    step = len(a) // 64
    if step > _SAMPLE // 64:
        runs = (64, _SAMPLE // 64), (step, 1)
        some = [memory.as_strided(*runs, memory.storage_offset()) for memory in (a, b)]
        if not same_bits(some[0], some[1]):
            return False
    return same_bits(a, b)


def flat_pair(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two tensors of one shape in one dimension, with elements in the same order.

    Nothing is copied if both have the same strides and no gaps. Each stays on its device.
    """
    a, b = _plain(a), _plain(b)
    if a.stride() == b.stride() and is_dense(a):
        return a.as_strided((a.numel(),), (1,)), b.as_strided((b.numel(),), (1,))
    return a.contiguous().reshape(-1), b.contiguous().reshape(-1)


def digest(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's bytes, C-contiguous, little endian, as hexadecimal text."""
    dense = _plain(tensor).cpu().contiguous()
    # view(torch.uint8) needs a last stride of 1; a tensor of one element may have any stride
    flat = dense.as_strided((dense.numel(),), (1,))
    raw = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return hashlib.sha256(raw).hexdigest()


def is_dense(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has neither gaps nor overlaps, for some order of its dimensions."""
    strides, shape = tensor.stride(), tensor.shape
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], -shape[d]))
    dense = dense_strides(shape, tuple(order))
    return all(
        s == w or n < 2  # noqa: PLR2004 - the stride of a dimension of size 1 means nothing
        for s, w, n in zip(strides, dense, shape, strict=True)
    )


def dense_strides(shape: torch.Size, order: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a tensor without gaps.

    Args:
        shape: Sizes of all dimensions.
        order: Dimensions in memory order, slowest first.
    """
    strides = [1] * len(shape)
    step = 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(int(shape[dim]), 1)
    return tuple(strides)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Detach a tensor and apply the conjugation and negation that torch has deferred."""
    return tensor.detach().resolve_conj().resolve_neg()


def _widest(*flat: torch.Tensor) -> torch.dtype:
    """Return the widest integer dtype that all tensors can be viewed as: ``equal`` is fastest."""
    sizes = [size for t in flat for size in (t.nbytes, t.storage_offset() * t.itemsize)]
    return next(kind for kind in _WIDEST if not any(size % kind.itemsize for size in sizes))


# -- elements that are not finite -------------------------------------------------------------

_SMALL = 1 << 16  # bytes: largest CPU tensor that is checked in a batch
_BATCH = 1 << 20  # bytes: size at which a batch of small CPU tensors is checked


def all_finite(value: torch.Tensor) -> bool:
    """Return whether no element is NaN or infinite."""
    if not has_floats(value):
        return True
    if value.is_complex():
        return all_finite(torch.view_as_real(value.resolve_conj()))
    if value.dtype.itemsize == 1:
        return _all_finite_bytes(value) if value.is_cpu else bool(finite(value).all())
    # A sum costs a third of aminmax, and a finite sum proves that all elements are finite. An
    # infinite sum may just be an overflow. isfinite would allocate a mask of the same shape.
    if has_finite_sum(value):
        return True
    low, high = torch.aminmax(value)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _all_finite_bytes(value: torch.Tensor) -> bool:
    """Return whether no element of an 8-bit float is NaN or infinite."""
    # A conversion to float32 takes 70 times as long.
    raw = value.detach().view(torch.uint8).numpy()
    return not any((raw == byte).any() for byte in _non_finite_bytes(value.dtype))


def sum_of_floats(values: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return a sum that is finite only if all elements are: one of float32. None of no elements.

    Args:
        values: Tensors of floating point dtypes of at least 16 bits, or without elements.
    """
    sums = [value.sum(dtype=torch.float32) for value in values if has_floats(value)]
    return torch.stack(sums).sum() if sums else None


@cache
def _non_finite_bytes(dtype: torch.dtype) -> tuple[int, ...]:
    """Return the bytes that stand for NaN or infinity in an 8-bit float."""
    every = torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype)
    return tuple(byte for byte, good in enumerate(finite(every).tolist()) if not good)


def has_finite_sum(value: torch.Tensor) -> bool:
    """Return whether the sum of all elements is finite. If so, each element is."""
    return math.isfinite(value.sum().item())


def has_floats(value: torch.Tensor) -> bool:
    """Return whether a tensor has elements, of a floating point or complex dtype."""
    return bool(value.numel()) and (value.is_floating_point() or value.is_complex())


def finite(value: torch.Tensor) -> torch.Tensor:
    """Return a mask of the finite elements: bool, in the shape and on the device of the value."""
    # torch 2.14 has neither isfinite nor aminmax for the 8-bit floats
    wide = value.is_floating_point() and value.dtype.itemsize == 1
    return torch.isfinite(value.float() if wide else value)


def not_finite(values: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Return the names of tensors with an element that is not finite, in their order.

    Args:
        values: Names and tensors. The iterator may read each tensor when it yields it: large CPU
            tensors are checked one by one and released.
    """
    names, bad, pending = list[str](), set[str](), 0
    elsewhere, small = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, value in values:
        names.append(name)
        if value.is_cpu and value.nbytes > _SMALL:
            bad |= set() if all_finite(value) else {name}
        elif has_floats(value):
            # all GPU tensors are checked at the end in one go: each answer waits for the device
            (small if value.is_cpu else elsewhere)[name] = value
            pending += value.nbytes if value.is_cpu else 0
        del value  # else two large tensors would be in memory while the iterator reads the next
        if pending > _BATCH:
            bad |= _nonfinite_in(small)
            small, pending = {}, 0
    bad |= _nonfinite_in(small) | _nonfinite_in(elsewhere)
    return [name for name in names if name in bad]


def _nonfinite_in(values: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the names of tensors with an element that is not finite."""
    return {name for name in _candidates(values) if not all_finite(values[name])}


def _candidates(values: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Yield the names of tensors that may have an element that is not finite.

    A sum is finite only if all of its terms are. It may also overflow, so some candidates are
    finite. For small CPU tensors, one concatenation costs less than a sum of each.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = defaultdict(list)
    for name, value in values.items():
        if value.is_complex() or value.dtype.itemsize == 1:
            yield name
        else:
            groups[value.device, value.dtype].append(name)
    for (device, dtype), names in groups.items():
        wide = dtype if dtype is torch.float64 else torch.float32
        if device.type == "cpu":
            whole = torch.cat([values[name].reshape(-1) for name in names])
            yield from [] if has_finite_sum(whole) else names
        else:
            yield from _device_candidates({name: values[name] for name in names}, wide)


def _device_candidates(values: Mapping[str, torch.Tensor], wide: torch.dtype) -> list[str]:
    """Return the candidates among tensors of one dtype on one GPU, with at most two waits for it.

    Args:
        values: Tensors by name.
        wide: Dtype of the sums of magnitudes, which one launch computes for many tensors.
    """
    sums = torch.stack(torch._foreach_norm(list(values.values()), 1, dtype=wide))  # noqa: SLF001
    if has_finite_sum(sums):
        return []
    flags = torch.isfinite(sums).tolist()
    return [name for name, good in zip(values, flags, strict=True) if not good]


def newly_nonfinite(subject: str, bad: torch.Tensor, why: str = "") -> Problem:
    """Return the problem of new elements that are not finite while the present ones are.

    Args:
        subject: Name of the weight or slot.
        bad: Mask of these elements; at least one is set.
        why: Text that the hint starts with.
    """
    wanted, hint = (
        "finite, as the present values are",
        "to allow it: check_finite=False in the config",
    )
    return Problem(subject, "non-finite", counted(bad), wanted, why + hint)


def counted(bad: torch.Tensor) -> str:
    """Return the number of bad elements and the index of the first one, for messages.

    Args:
        bad: Mask of the bad elements; at least one is set.
    """
    where = tuple(int(i) for i in bad.nonzero()[0])
    return f"{int(bad.sum())} of {bad.numel()} elements, the first at {where}"
