"""The distance between two tensors: the measure of refit reports and of ``refitkit diff``.

The relative change is ||new - old|| / ||old|| in 2-norms. This is the normwise relative error of
N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition (SIAM, 2002), section 1.2.
0 means equal values, 2 means the opposite sign, 10 means a difference ten times as long as the old
value.

The fast path, ``norms_of_rows`` and ``from_norms``, computes norms of rows of at most ``ROW``
elements and combines them in float64. It uses float32, or float64 for 64-bit dtypes. If a norm
overflows or an element is not finite, ``looked_through_rows`` computes the distance in float64 from
the elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from refitkit.program.bits import INTEGERS, flat_pair

if TYPE_CHECKING:
    from collections.abc import Iterator

ROW = 4096
"""Maximum number of elements in one norm: in float32 it then has about 6 correct digits."""

CHUNK = 1 << 20
"""Number of elements that are compared at once: their copies and masks take less than 64 MB."""


@dataclass(frozen=True)
class Distance:
    """The distance of two tensors of equal dtype and size. Distances of parts add up with ``+``.

    Attributes:
        apart: 2-norm of the difference; infinite if an element changed that is or was not finite.
            Elements that are not finite and did not change count as 0.
        length: 2-norm of the old tensor.
        largest: Largest absolute difference of two elements; infinite in the same case.
        differing: Number of elements with at least one different bit.
        count: Number of elements.
        whole: Whether the elements are integers or booleans. Those may be indices or packed
            values, so norms of them mean nothing.
    """

    apart: float = 0.0
    length: float = 0.0
    largest: float = 0.0
    differing: int = 0
    count: int = 0
    whole: bool = False

    def __add__(self, other: Distance) -> Distance:
        return Distance(
            math.hypot(self.apart, other.apart),
            math.hypot(self.length, other.length),
            max(self.largest, other.largest),
            self.differing + other.differing,
            self.count + other.count,
            self.whole or other.whole,
        )

    @property
    def relative(self) -> float:
        """``apart / length``; infinite if only the old values are zeros; ``share`` if ``whole``."""
        if self.whole:
            return self.share
        if not self.apart:
            return 0.0
        return self.apart / self.length if self.length else math.inf

    @property
    def share(self) -> float:
        """Share of elements with at least one different bit; 0 for an empty tensor."""
        return self.differing / self.count if self.count else 0.0


def distance(old: torch.Tensor, new: torch.Tensor) -> Distance:
    """Return the distance of two tensors, from all elements.

    Args:
        old: Old tensor, with any strides, on any device.
        new: New tensor of the same dtype and shape.
    """
    found = Distance(whole=is_whole(old.dtype))
    for x, y in chunks(old, new):
        found += _from_norms(x, y) or _from_elements(x, y)
    return found


def chunks(old: torch.Tensor, new: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield pairs of flat pieces of at most ``CHUNK`` elements, both on the device of ``old``."""
    x, y = flat_pair(old, new)
    for start in range(0, x.numel(), CHUNK):
        piece = slice(start, start + CHUNK)
        yield x[piece], y[piece].to(x.device)


@torch.no_grad()
def _from_norms(x: torch.Tensor, y: torch.Tensor) -> Distance | None:
    """Return the distance of two flat tensors on one device; None if the norms are not reliable."""
    body = x.numel() // ROW * ROW  # the rest is a shorter row, so a matrix of its own
    rows = [
        _row_norms(a.view(-1, size), b.view(-1, size))
        for a, b, size in (
            (x[:body], y[:body], ROW),
            (x[body:], y[body:], x.numel() - body),
        )
        if a.numel()
    ]
    columns = torch.cat(rows, dim=1)
    norm, (most, sums) = torch.linalg.vector_norm, (columns[2].amax(), columns[3].sum())
    numbers = torch.stack([norm(columns[0]), norm(columns[1]), most, sums])
    apart, length, largest, differing = numbers.tolist()
    whole = is_whole(x.dtype)
    # squares of float32 overflow and underflow in float32, and NaN spreads to the norms
    lost = not math.isfinite(apart + length + largest) or (not (apart and length) and largest > 0)
    if lost and not whole:
        return None
    return Distance(apart, length, largest, int(differing), x.numel(), whole)


def _row_norms(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the norms of each row of two matrices on one device.

    Returns:
        float64 of shape ``(4, rows)``: apart, length, largest, differing, as in :class:`Distance`.
    """
    whole = is_whole(x.dtype)
    wide = torch.float64 if whole else _wide(x.dtype)
    old = x.to(wide)
    gap = y.to(wide).sub(old)  # in the wide dtype: float16 would overflow and lose digits
    norm = torch.linalg.vector_norm
    largest = norm(gap, math.inf, dim=1)
    none = torch.zeros_like(largest)
    apart, length = (none, none) if whole else (norm(gap, dim=1), norm(old, dim=1))
    differing = _unlike(x, y).sum(dim=1, dtype=torch.float64)
    return torch.stack([apart.double(), length.double(), largest.double(), differing])


@torch.no_grad()
def _from_elements(x: torch.Tensor, y: torch.Tensor) -> Distance:
    """Return the distance of two flat tensors of floats on one device, computed in float64.

    Elements that are not finite are treated as :class:`Distance` says.
    """
    unlike = _unlike(x, y)
    wide = torch.complex128 if x.is_complex() else torch.float64
    old, new = x.to(wide), y.to(wide)
    finite = torch.isfinite(old) & torch.isfinite(new)
    lost = bool((unlike & ~finite).any())
    # infinity - infinity is NaN, so elements that are not finite must not enter the norms
    old, new = (torch.where(finite, t, 0) for t in (old, new))
    gap = (new - old).abs()
    return Distance(
        math.inf if lost else _norm(gap),
        _norm(old),
        math.inf if lost else gap.amax().item(),
        int(unlike.sum()),
        x.numel(),
    )


def _norm(values: torch.Tensor) -> float:
    """Return the 2-norm of a tensor, without overflow or underflow of squares in float64."""
    # the largest element becomes 1, so its square cannot overflow
    scale = values.abs().amax().item()
    if not scale or not math.isfinite(scale):
        return scale
    return float(torch.linalg.vector_norm(values / scale).item() * scale)


def is_whole(dtype: torch.dtype) -> bool:
    """Return whether a dtype has integers or booleans."""
    return not (dtype.is_floating_point or dtype.is_complex)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which norms of a dtype of floats are computed."""
    if dtype.is_complex:
        return torch.complex128 if dtype is torch.complex128 else torch.complex64
    return torch.float64 if dtype is torch.float64 else torch.float32


def _unlike(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return a mask of the elements that differ in at least one bit."""
    # no integer dtype is as wide as complex128
    if x.dtype is torch.complex128:
        a, b = (torch.view_as_real(t).view(torch.int64) for t in (x, y))
        return (a != b).any(dim=-1)
    kind = INTEGERS[x.dtype.itemsize]
    return x.view(kind) != y.view(kind)
