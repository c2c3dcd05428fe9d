"""Whether elements of tensors are finite. Integers and flags always are."""

from __future__ import annotations

import math

import torch

from refitkit.errors import Problem


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
