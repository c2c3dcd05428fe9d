"""Comparing tensors as bits: -0 is not 0, and a NaN equals itself."""

from __future__ import annotations

import hashlib

import torch

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
