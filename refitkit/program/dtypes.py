"""torch's dtypes by their names without the ``torch.``; the names stand in plans and reports."""

from __future__ import annotations

import torch

from refitkit.model.slot import ITEM_BYTES

_BY_NAME = {name: getattr(torch, name) for name in ITEM_BYTES if hasattr(torch, name)}


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """``torch.float32`` for ``float32``.

    Raises:
        KeyError: This torch has no such dtype.
    """
    dtype: torch.dtype = _BY_NAME[name]
    return dtype


def unusable_dtype(name: str) -> str:
    """Why tensors of a dtype can be no weights; empty if they can.

    torch has dtypes with hardly an operation: they cannot even be copied into strides.
    """
    if name in _BY_NAME:
        return ""
    return f"a tensor of the dtype {name}, which refitkit cannot refit"


def are_alike(one: torch.dtype, other: torch.dtype) -> bool:
    """Whether both are floats, or both are integers: a cast from one to the other has a meaning."""
    floats = one.is_floating_point and other.is_floating_point
    return floats or (_is_integer(one) and _is_integer(other))


def is_lossless(before: torch.dtype, after: torch.dtype) -> bool:
    """Whether every value of one dtype is a value of the other.

    Of floats: the distance to the next number from 1, the largest and the smallest number, with
    those below the normal ones, must be within the other's.
    """
    if not are_alike(before, after):
        return False
    if not before.is_floating_point:
        a, b = torch.iinfo(before), torch.iinfo(after)
        return b.min <= a.min and b.max >= a.max
    x, y = torch.finfo(before), torch.finfo(after)
    return y.eps <= x.eps and y.max >= x.max and y.tiny * y.eps <= x.tiny * x.eps


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)
