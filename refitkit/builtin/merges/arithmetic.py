"""Sums of tensors: in float32 or float64, in the order given, rounded once.

Products are rounded before they are added, so that results do not depend on whether a kernel fuses
the two: they are the same for every layout and on every kind of device. All is done piece by piece:
what is made on the way is small, however large a table of embeddings is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refitkit.program.dtypes import dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
_SUMMED = frozenset(dtype_name(dtype) for dtype in (*_FLOATS, *_COMPLEX))
_PIECE = 1 << 20  # elements


def is_summed(dtype: str) -> bool:
    """Whether values of a dtype, by its name, are numbers to calculate with.

    Integers count, choose or stand for something else, and so do the 8-bit floats: they are half of
    a quantized weight, whose other half is a scale.
    """
    return dtype in _SUMMED


def average(
    shares: Sequence[float], values: Iterator[torch.Tensor], *, keep_equal: bool
) -> torch.Tensor:
    """``sum(share x value)``.

    Args:
        shares: At least one.
        values: As many tensors of one dtype and shape; but for the first, each is let go before the
            next is taken.
        keep_equal: Whether an element that is equal in all of them becomes that of the first.

    Returns:
        A new tensor of their dtype, on the device of the first.
    """
    given = next(values)
    first = _as_real(given)
    total = torch.empty_like(first, dtype=_wide(first.dtype))
    equal = torch.full_like(first, keep_equal, dtype=torch.bool)
    for summed, value in _pieces(total, first):
        torch.mul(value.to(summed.dtype), shares[0], out=summed)
    for share in shares[1:]:  # no name for what is read, which would keep it
        _add(total, equal, first, share, _as_real(next(values)).to(first.device))
    made = total if total.dtype is first.dtype else torch.empty_like(first)
    for into, summed, value, same in _pieces(made, total, first, equal):
        into.copy_(torch.where(same, value.to(summed.dtype), summed))
    return narrowed(made, given.dtype)


def _add(
    total: torch.Tensor,
    equal: torch.Tensor,
    first: torch.Tensor,
    share: float,
    value: torch.Tensor,
) -> None:
    """Add a share to a sum, and note where the value is no longer what the first is."""
    for summed, same, one, other in _pieces(total, equal, first, value):
        same.logical_and_(other == one)
        summed.add_(other.to(summed.dtype) * share)


def task_sum(scales: Sequence[float], values: Iterator[torch.Tensor]) -> torch.Tensor:
    """``base + sum(scale x (value - base))``; an element that none changes keeps its bits.

    Args:
        scales: One for each value after the base.
        values: The base, then as many tensors of its dtype and shape.

    Returns:
        A new tensor of the base's dtype, on its device.
    """
    given = next(values)
    base = _as_real(given)
    total = torch.zeros_like(base, dtype=_wide(base.dtype))
    for scale in scales:
        _add_difference(total, base, scale, _as_real(next(values)).to(base.device))
    made = total if total.dtype is base.dtype else torch.empty_like(base)
    for into, change, value in _pieces(made, total, base):
        wide = value.to(change.dtype)
        into.copy_(torch.where(change == 0, wide, wide + change))
    return narrowed(made, given.dtype)


def _add_difference(
    total: torch.Tensor, base: torch.Tensor, scale: float, value: torch.Tensor
) -> None:
    """Add a scaled difference; nothing where there is none: infinity less itself would be NaN."""
    for change, one, other in _pieces(total, base, value):
        difference = other.to(change.dtype) - one.to(change.dtype)
        change.add_(difference.masked_fill_(other == one, 0).mul_(scale))


def widened(value: torch.Tensor) -> torch.Tensor:
    """In the dtype that sums are made in; complex numbers with a last dimension of two parts.

    It may be the tensor itself: not to be written to.
    """
    value = _as_real(value)
    return value.to(_wide(value.dtype))


def narrowed(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The other way round: rounded to nearest, ties to even, beyond the range to infinity."""
    value = value.to(dtype.to_real())
    return torch.view_as_complex(value) if dtype.is_complex else value


def _as_real(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _pieces(*tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Views of the same parts of tensors of one shape, cut in their longest dimension."""
    shape, count = tensors[0].shape, tensors[0].numel()
    if count <= _PIECE:
        return [tensors]
    dim = max(range(len(shape)), key=shape.__getitem__)
    step = max(_PIECE * shape[dim] // count, 1)
    return zip(*(torch.split(tensor, step, dim) for tensor in tensors), strict=True)
