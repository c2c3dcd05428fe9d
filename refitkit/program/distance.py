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

from refitkit.program.bits import flat_pair

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROW = 4096
"""Maximum number of elements in one norm: in float32 it then has about 6 correct digits."""

CHUNK = 1 << 20
"""Number of elements that are compared at once: their copies and masks take less than 64 MB."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
        numbers = norms(x, y).squeeze(1).tolist()
        found += from_norms(numbers, x.dtype, x.numel()) or looked_through(x, y)
    return found


def chunks(old: torch.Tensor, new: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield pairs of flat pieces of at most ``CHUNK`` elements, both on the device of ``old``."""
    x, y = flat_pair(old, new)
    for start in range(0, x.numel(), CHUNK):
        piece = slice(start, start + CHUNK)
        yield x[piece], y[piece].to(x.device)


@torch.no_grad()
def norms(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the norms of two flat tensors on one device: float64 of shape ``(4, 1)``.

    The entries are those of ``norms_of_rows``, combined over all rows.
    """
    body = x.numel() // ROW * ROW  # the rest is a shorter row, so a matrix of its own
    rows = [
        norms_of_rows(a.view(-1, size), b.view(-1, size))
        for a, b, size in (
            (x[:body], y[:body], ROW),
            (x[body:], y[body:], x.numel() - body),
        )
        if a.numel()
    ]
    apart, length, largest, differing = torch.cat(rows, dim=1)
    norm = torch.linalg.vector_norm
    return torch.stack([norm(apart), norm(length), largest.amax(), differing.sum()])[:, None]


@torch.no_grad()
def norms_of_rows(x: torch.Tensor, y: torch.Tensor, *, count: bool = True) -> torch.Tensor:
    """Return the norms of each row of two matrices on one device, without waiting for the device.

    Args:
        x: Old values, of any dtype.
        y: New values, of the same dtype and shape.
        count: Whether to count the elements that differ. Integers and booleans are always counted.

    Returns:
        float64 of shape ``(4, rows)``: apart, length, largest, differing, as in :class:`Distance`.
        ``from_norms`` takes one column.
    """
    whole = is_whole(x.dtype)
    differing = _unlike(x, y).sum(dim=1, dtype=torch.float64) if count or whole else None
    wide = torch.float64 if whole else _wide(x.dtype)
    old = x.to(wide)
    gap = y.to(wide).sub(old)  # in the wide dtype: float16 would overflow and lose digits
    norm = torch.linalg.vector_norm
    largest = norm(gap, math.inf, dim=1)
    none = torch.zeros_like(largest)
    apart, length = (none, none) if whole else (norm(gap, dim=1), norm(old, dim=1))
    found = torch.stack([apart, length, largest, none]).double()
    if differing is not None:
        found[3] = differing
    return found


def from_norms(numbers: Sequence[float], dtype: torch.dtype, count: int) -> Distance | None:
    """Return the distance that a column of norms describes; None if the norms are not reliable.

    Args:
        numbers: Column of ``norms_of_rows``.
        dtype: Dtype of the two tensors.
        count: Number of elements of each.
    """
    whole = is_whole(dtype)
    apart, length, largest, differing = numbers
    # squares of float32 overflow and underflow in float32, and NaN spreads to the norms
    lost = not math.isfinite(apart + length + largest) or (not (apart and length) and largest > 0)
    if lost and not whole:
        return None
    return Distance(apart, length, largest, int(differing), count, whole)


def looked_through(x: torch.Tensor, y: torch.Tensor) -> Distance:
    """Return the distance of two small tensors of floats, computed in float64.

    Elements that are not finite are treated as :class:`Distance` says.
    """
    x, y = flat_pair(x, y.to(x.device))
    return looked_through_rows(x[None], y[None])[0]


@torch.no_grad()
def looked_through_rows(x: torch.Tensor, y: torch.Tensor) -> list[Distance]:
    """Return the same for each row of two matrices on one device, with one wait for the device."""
    unlike = _unlike(x, y)
    wide = torch.complex128 if x.is_complex() else torch.float64
    old, new = x.to(wide), y.to(wide)
    finite = torch.isfinite(old) & torch.isfinite(new)
    lost = (unlike & ~finite).any(dim=1)
    # infinity - infinity is NaN, so elements that are not finite must not enter the norms
    old, new = (torch.where(finite, t, 0) for t in (old, new))
    gap = (new - old).abs()
    columns = torch.stack([_norm(gap), _norm(old), gap.amax(dim=1), unlike.sum(dim=1), lost])
    return [
        Distance(
            math.inf if gone else apart,
            length,
            math.inf if gone else largest,
            int(differing),
            x.shape[1],
        )
        for apart, length, largest, differing, gone in columns.T.tolist()
    ]


def _norm(rows: torch.Tensor) -> torch.Tensor:
    """Return the 2-norm of each row, without overflow or underflow of squares in float64."""
    # the largest element becomes 1, so its square cannot overflow; scales of 0, inf and NaN cannot
    # divide, and are the norm themselves
    scale = rows.abs().amax(dim=1, keepdim=True)
    scaled = torch.linalg.vector_norm(rows / scale, dim=1) * scale[:, 0]
    return torch.where((scale[:, 0] > 0) & torch.isfinite(scale[:, 0]), scaled, scale[:, 0])


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
    kind = _BITS[x.dtype.itemsize]
    return x.view(kind) != y.view(kind)
