"""Comparing tensors as bits: -0 is not 0, and a NaN equals itself."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from refitkit.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


_WIDEST = (torch.int64, torch.int32, torch.int16, torch.uint8)


def same_bits(a: torch.Tensor, b: torch.Tensor, first: int | None = None) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits.

    Args:
        a: One tensor, of any layout of strides.
        b: The other; where it is on another device, it is copied to the first one's.
        first: Compare only so many elements of each; None: all.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = flat_pair(a, b.to(a.device))
    if first is not None:
        x, y = x[:first], y[:first]
    kind = _widest(x, y)
    return torch.equal(x.view(kind), y.view(kind))


def flat_pair(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of one shape, each in one dimension and both in one order of elements.

    Without a copy where they lie alike and without gaps; each on its own device.
    """
    a, b = _plain(a), _plain(b)
    if a.stride() == b.stride() and is_dense(a):
        return a.as_strided((a.numel(),), (1,)), b.as_strided((b.numel(),), (1,))
    return a.contiguous().reshape(-1), b.contiguous().reshape(-1)


def digest(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's bytes, C-contiguous, little endian, as hexadecimal text."""
    dense = _plain(tensor).cpu().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # one element may keep any stride
    raw = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return hashlib.sha256(raw).hexdigest()


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements lie without gaps or overlaps, in any order of dimensions."""
    strides, shape = tensor.stride(), tensor.shape
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], -shape[d]))
    dense = dense_strides(shape, tuple(order))
    return all(
        s == w or n < 2  # noqa: PLR2004 - the stride of a dimension of size 1 means nothing
        for s, w, n in zip(strides, dense, shape, strict=True)
    )


def dense_strides(shape: torch.Size, order: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor without gaps whose dimensions lie in this order, slowest first."""
    strides = [1] * len(shape)
    step = 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(int(shape[dim]), 1)
    return tuple(strides)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Without gradient history, and with conjugations and signs that torch put off carried out."""
    return tensor.detach().resolve_conj().resolve_neg()


def _widest(*flat: torch.Tensor) -> torch.dtype:
    """The widest integers that the memory of all can be viewed as: ``equal`` is then fastest."""
    sizes = [size for t in flat for size in (t.nbytes, t.storage_offset() * t.itemsize)]
    return next(kind for kind in _WIDEST if not any(size % kind.itemsize for size in sizes))


# MERGED finite: Whether elements of tensors are finite. Integers and flags always are.

_SMALL = 1 << 16  # bytes; tensors of the host up to this size are looked at together
_TOGETHER = 1 << 20  # bytes of such tensors that are looked at at once


def all_finite(value: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite.

    Mostly the sum tells, which costs a third of ``aminmax``; where that is not finite, it may only
    be too large. Neither allocates anything; ``isfinite`` would write a mask of the same size.
    """
    if not has_floats(value):
        return True
    if value.is_complex() or value.dtype.itemsize == 1:
        return bool(finite(value).all())
    if has_finite_sum(value):
        return True
    low, high = torch.aminmax(value)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def has_finite_sum(value: torch.Tensor) -> bool:
    """Whether the sum of all elements is finite: then each of them is."""
    return math.isfinite(value.sum().item())


def has_floats(value: torch.Tensor) -> bool:
    """Whether there are elements, and of a type that can be other than finite."""
    return bool(value.numel()) and (value.is_floating_point() or value.is_complex())


def finite(value: torch.Tensor) -> torch.Tensor:
    """Where elements are finite; the 8-bit floats have neither ``isfinite`` nor ``aminmax``."""
    wide = value.is_floating_point() and value.dtype.itemsize == 1
    return torch.isfinite(value.float() if wide else value)


def not_finite(values: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of tensors with an element that is not finite.

    Those on a GPU are asked all at once, as each answer waits for the device, and small ones in
    groups. A large one of the host is looked at on its own and forgotten: who iterates may read it.

    Args:
        values: Names and tensors, each asked for when it is looked at.
    """
    names, bad, held = list[str](), set[str](), 0
    elsewhere, small = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, value in values:
        names.append(name)
        if value.is_cpu and value.nbytes > _SMALL:
            bad |= set() if all_finite(value) else {name}
        elif has_floats(value):
            (small if value.is_cpu else elsewhere)[name] = value
            held += value.nbytes if value.is_cpu else 0
        del value  # so that two large ones are not in memory
        if held > _TOGETHER:
            bad |= _spoilt_of(small)
            small, held = {}, 0
    bad |= _spoilt_of(small) | _spoilt_of(elsewhere)
    return [name for name in names if name in bad]


def _spoilt_of(values: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of tensors with an element that is not finite; asks few questions if there is none."""
    return {name for name in _suspects(values) if not all_finite(values[name])}


def _suspects(values: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Names of tensors that may have an element that is not finite: few, or a whole group.

    A sum is finite only if all of its terms are; it may also be too large, so it accuses some
    wrongly. On a GPU the magnitudes of many tensors are summed by a single launch, on the host they
    are laid end to end, which for small ones costs less than a sum of each.
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
            yield from _suspects_there({name: values[name] for name in names}, wide)


def _suspects_there(values: Mapping[str, torch.Tensor], wide: torch.dtype) -> list[str]:
    """The same for tensors of one dtype on a GPU, where each answer waits for the device.

    Args:
        values: The tensors.
        wide: What sums are computed in.
    """
    sums = torch.stack(torch._foreach_norm(list(values.values()), 1, dtype=wide))  # noqa: SLF001
    if has_finite_sum(sums):
        return []
    told = torch.isfinite(sums).tolist()
    return [name for name, good in zip(values, told, strict=True) if not good]


def spoilt(subject: str, bad: torch.Tensor, why: str = "") -> Problem:
    """The problem of elements that are not finite where the present ones are.

    Args:
        subject: What they are of.
        bad: Where they are; at least one.
        why: What the hint begins with.
    """
    wanted, hint = (
        "finite, as the present values are",
        "to allow it: check_finite=False in the config",
    )
    return Problem(subject, "non-finite", counted(bad), wanted, why + hint)


def counted(bad: torch.Tensor) -> str:
    """How many elements are bad and where the first one is, for messages.

    Args:
        bad: Where they are; at least one.
    """
    where = tuple(int(i) for i in bad.nonzero()[0])
    return f"{int(bad.sum())} of {bad.numel()} elements, the first at {where}"
