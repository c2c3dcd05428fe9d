"""Dtypes of torch by name, without the ``torch.`` prefix. Plans and reports contain the names."""

from __future__ import annotations

import torch

from refitkit.model.slot import ITEM_BYTES

# some of the dtypes that the model knows do not exist in older versions of torch
_BY_NAME = {name: getattr(torch, name) for name in ITEM_BYTES if hasattr(torch, name)}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype: ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of a name: ``torch.float32`` for ``float32``.

    Raises:
        KeyError: This version of torch has no such dtype, or refitkit does not support it.
    """
    dtype: torch.dtype = _BY_NAME[name]
    return dtype


def unusable_dtype(name: str) -> str:
    """Return why tensors of a dtype cannot be weights; empty if they can.

    Some dtypes of torch, such as ``bits8``, have almost no operations. Their tensors cannot even be
    copied into other strides.
    """
    if name in _BY_NAME:
        return ""
    return f"a tensor of the dtype {name}, which refitkit cannot refit"


def are_alike(one: torch.dtype, other: torch.dtype) -> bool:
    """Return whether a cast is meaningful: both are real floats, or both are integers."""
    floats = one.is_floating_point and other.is_floating_point
    return floats or (_is_integer(one) and _is_integer(other))


def is_lossless(before: torch.dtype, after: torch.dtype) -> bool:
    """Return whether a cast from one dtype to another preserves every value.

    For floats, the target needs at least the precision, the maximum and the smallest subnormal
    number of the source.
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
