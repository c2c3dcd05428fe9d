"""Sums of tensors: in float32 or float64, in the order given, rounded once.

Products are rounded before they are added, so that results do not depend on whether a kernel fuses
the two: they are the same for every layout and on every kind of device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refitkit.program.dtypes import dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_COMPLEX = {
    torch.complex32: torch.complex64,
    torch.complex64: torch.complex64,
    torch.complex128: torch.complex128,
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SUMMED = frozenset(dtype_name(dtype) for dtype in (*_FLOATS, *_COMPLEX))


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
        values: As many tensors of one dtype and shape; each is let go before the next is taken.
        keep_equal: Whether an element that is equal in all of them becomes that of the first.

    Returns:
        A new tensor of their dtype, on the device of the first.
    """
    given = next(values)
    first = widened(given)
    total = first * shares[0]
    equal = torch.ones_like(first, dtype=torch.bool) if keep_equal else None
    for share in shares[1:]:  # no name for what is read: it is let go before the next is read
        _add(total, share, widened(next(values).to(first.device)), first, equal)
    if equal is not None:
        total = torch.where(equal, first, total)
    return narrowed(total, given.dtype)


def _add(
    total: torch.Tensor,
    share: float,
    value: torch.Tensor,
    first: torch.Tensor,
    equal: torch.Tensor | None,
) -> None:
    """Add a share to a sum, and note where the value is still what the first is."""
    if equal is not None:
        equal &= value == first
    total += value * share


def task_sum(scales: Sequence[float], values: Iterator[torch.Tensor]) -> torch.Tensor:
    """``base + sum(scale x (value - base))``; an element that none changes keeps its bits.

    Args:
        scales: One for each value after the base.
        values: The base, then as many tensors of its dtype and shape.

    Returns:
        A new tensor of the base's dtype, on its device.
    """
    given = next(values)
    base = widened(given)
    change = torch.zeros_like(base)
    for scale in scales:
        change += _difference(widened(next(values).to(base.device)), base).mul_(scale)
    return narrowed(torch.where(change == 0, base, base + change), given.dtype)


def _difference(value: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Nothing where both are equal: infinity less infinity would be NaN."""
    return (value - base).masked_fill_(value == base, 0)


def widened(value: torch.Tensor) -> torch.Tensor:
    """In the dtype that sums are made in; complex numbers with a last dimension of two parts.

    It may be the tensor itself: not to be written to.
    """
    value = value.detach().resolve_conj()
    if value.dtype in _COMPLEX:
        return torch.view_as_real(value.to(_COMPLEX[value.dtype]))
    return value if value.dtype is torch.float64 else value.to(torch.float32)


def narrowed(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The other way round: rounded to nearest, ties to even, beyond the range to infinity."""
    if dtype in _COMPLEX:
        value = torch.view_as_complex(value)
    return value.to(dtype)
