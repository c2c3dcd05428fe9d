"""How far a tensor is from what it was: the one measure of reports and of ``refitkit diff``.

The relative change is ||new - old|| / ||old|| in 2-norms, the normwise relative error of N. J.
Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition (SIAM, 2002), section 1.2: 0 is
the same, 2 is as far as the opposite sign, 10 is ten times farther than the old value is long.

Norms are taken over rows of at most ``ROW`` elements, in float32 or, of 64-bit types, in float64,
and put together in float64. Where that is no number, the elements are looked at again one by one.
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
"""Elements of which one norm is taken: in float32 it is then right to about 6 digits."""

CHUNK = 1 << 20
"""Elements that are looked at together: copies and masks of them take less than 64 MB."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Distance:
    """How far apart two tensors of one dtype and number of elements are; parts add up with ``+``.

    Attributes:
        apart: 2-norm of the difference, infinite where an element that is not finite changed.
            Elements that are not finite and did not change count as 0.
        length: 2-norm of the old tensor.
        largest: Largest absolute difference of two elements; infinite as above.
        differing: Number of elements of which any bit differs.
        count: Number of elements.
        whole: Whether the elements are integers or flags: those may be indices or packed values,
            which have no length.
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
        """``apart`` over ``length``; infinite from all zeros; of integers and flags the share."""
        if self.whole:
            return self.share
        if not self.apart:
            return 0.0
        return self.apart / self.length if self.length else math.inf

    @property
    def share(self) -> float:
        """Share of elements of which any bit differs; 0 of an empty tensor."""
        return self.differing / self.count if self.count else 0.0


def distance(old: torch.Tensor, new: torch.Tensor) -> Distance:
    """How far apart two tensors are, from all elements.

    Args:
        old: A tensor of any layout, on any device.
        new: Another one of the same dtype and shape.
    """
    found = Distance(whole=is_whole(old.dtype))
    for x, y in chunks(old, new):
        numbers = norms(x, y).squeeze(1).tolist()
        found += from_norms(numbers, x.dtype, x.numel()) or looked_through(x, y)
    return found


def chunks(old: torch.Tensor, new: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of flat pieces of at most ``CHUNK`` elements, both on the device of the old one."""
    x, y = flat_pair(old, new)
    for start in range(0, x.numel(), CHUNK):
        piece = slice(start, start + CHUNK)
        yield x[piece], y[piece].to(x.device)


@torch.no_grad()
def norms(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Norms of two flat tensors of one device; see ``norms_of_rows``: a matrix of one column."""
    body = x.numel() // ROW * ROW
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
    """Norms of each row of two matrices of one device. Nothing waits for the device.

    Args:
        x: The old values, of any dtype.
        y: The new ones, of the same.
        count: Whether to count the elements that differ; those of integers and flags always are.

    Returns:
        float64 of shape ``(4, rows)``: apart, length, largest, differing, as in
        :class:`Distance`; ``from_norms`` takes one column.
    """
    whole = is_whole(x.dtype)
    differing = _unlike(x, y).sum(dim=1, dtype=torch.float64) if count or whole else None
    wide = torch.float64 if whole else _wide(x.dtype)
    old = x.to(wide)
    gap = y.to(wide).sub(old)
    norm = torch.linalg.vector_norm
    largest = norm(gap, math.inf, dim=1)
    none = torch.zeros_like(largest)
    apart, length = (none, none) if whole else (norm(gap, dim=1), norm(old, dim=1))
    found = torch.stack([apart, length, largest, none]).double()
    if differing is not None:
        found[3] = differing
    return found


def from_norms(numbers: Sequence[float], dtype: torch.dtype, count: int) -> Distance | None:
    """What one column of norms says; None where it says nothing, and elements tell.

    Squares of float32 may be too large or too small for float32, and what is not finite has no
    difference.

    Args:
        numbers: The column.
        dtype: Of the two tensors.
        count: Number of their elements.
    """
    whole = is_whole(dtype)
    apart, length, largest, differing = numbers
    lost = not math.isfinite(apart + length + largest) or (not (apart and length) and largest > 0)
    if lost and not whole:
        return None
    return Distance(apart, length, largest, int(differing), count, whole)


def looked_through(x: torch.Tensor, y: torch.Tensor) -> Distance:
    """The distance of two small tensors of floats, without what is not finite, in float64."""
    x, y = flat_pair(x, y.to(x.device))
    return looked_through_rows(x[None], y[None])[0]


@torch.no_grad()
def looked_through_rows(x: torch.Tensor, y: torch.Tensor) -> list[Distance]:
    """The same of each row of two matrices of one device, which is asked once."""
    unlike = _unlike(x, y)
    wide = torch.complex128 if x.is_complex() else torch.float64
    old, new = x.to(wide), y.to(wide)
    finite = torch.isfinite(old) & torch.isfinite(new)
    lost = (unlike & ~finite).any(dim=1)
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
    """2-norms of rows whose squares are neither too large nor too small for float64."""
    scale = rows.abs().amax(dim=1, keepdim=True)
    scaled = torch.linalg.vector_norm(rows / scale, dim=1) * scale[:, 0]
    return torch.where((scale[:, 0] > 0) & torch.isfinite(scale[:, 0]), scaled, scale[:, 0])


def is_whole(dtype: torch.dtype) -> bool:
    """Whether a type has integers or flags."""
    return not (dtype.is_floating_point or dtype.is_complex)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What norms of a type of floats are computed in."""
    if dtype.is_complex:
        return torch.complex128 if dtype is torch.complex128 else torch.complex64
    return torch.float64 if dtype is torch.float64 else torch.float32


def _unlike(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Which elements differ in any bit."""
    if x.dtype is torch.complex128:
        a, b = (torch.view_as_real(t).view(torch.int64) for t in (x, y))
        return (a != b).any(dim=-1)
    kind = _BITS[x.dtype.itemsize]
    return x.view(kind) != y.view(kind)
