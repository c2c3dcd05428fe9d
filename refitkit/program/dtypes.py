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
