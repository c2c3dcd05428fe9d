"""Where an engine keeps one weight: a few integers.

The place of an element is an affine function of its index: a start, and a stride for each digit of
the index. A linear weight may lie transposed, a convolution's kernel with its channels last, two
weights side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_DIGITS = 8


@dataclass(frozen=True)
class Place:
    """Where the elements of one weight lie, in elements of its dtype from the start of the piece.

    Attributes:
        start: Where its first element lies.
        digits: Count and stride of each digit of an element's index, the fastest digit first.
    """

    start: int
    digits: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, where: torch.Tensor) -> Place | None:
        """Return the place of a weight whose elements were found; None if it is not affine.

        Args:
            where: Where each element lies, in the order of their indices; at least one.
        """
        digits: list[tuple[int, int]] = []
        rest = where
        while rest.numel() > 1:
            stride = rest[1] - rest[0]
            breaks = (rest.diff() != stride).nonzero()
            count = int(breaks[0]) + 1 if len(breaks) else rest.numel()
            if rest.numel() % count or len(digits) == MAX_DIGITS:
                return None
            rows = rest.view(-1, count)
            if not torch.equal(rows, rows[:, :1] + stride * torch.arange(count).to(rows)):
                return None
            digits.append((count, int(stride)))
            rest = rows[:, 0]
        found = cls(int(where[0]), tuple(digits))
        return found if found.is_injective() else None

    @property
    def count(self) -> int:
        """Number of elements."""
        count = 1
        for size, _ in self.digits:
            count *= size
        return count

    @property
    def end(self) -> int:
        """Where the last element ends."""
        return self.start + sum((size - 1) * stride for size, stride in self.digits) + 1

    @property
    def run(self) -> int:
        """How many elements are adjacent, in any order, before the first gap."""
        found = 1
        for size, stride in sorted(self.digits, key=lambda digit: digit[1]):
            if stride != found:
                break
            found *= size
        return found

    @property
    def is_dense(self) -> bool:
        """Whether no other elements lie between the first and the last one."""
        return self.end - self.start == self.count

    def is_injective(self) -> bool:
        """Return whether no two elements lie at one place. Strides have to be positive."""
        reach = 0  # of the digits with smaller strides
        for size, stride in sorted(self.digits, key=lambda digit: digit[1]):
            if stride <= reach or size <= 1:
                return False
            reach += (size - 1) * stride
        return True

    def indices(self, device: torch.device) -> torch.Tensor:
        """Return where each element lies, in the order of their indices.

        Args:
            device: Where to compute them.
        """
        found = torch.tensor([self.start], device=device)
        for size, stride in self.digits:
            steps = torch.arange(size, device=device) * stride
            found = (steps[:, None] + found).flatten()
        return found

    def of_piece(self, words: torch.Tensor) -> torch.Tensor:
        """Return the elements as a view of the piece, with the slowest digit first.

        Args:
            words: The whole piece as elements of the weight's dtype.
        """
        sizes = [size for size, _ in reversed(self.digits)]
        strides = [stride for _, stride in reversed(self.digits)]
        return words.as_strided(sizes, strides, words.storage_offset() + self.start)


def words_of(piece: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return memory as words of a dtype: an alias.

    Args:
        piece: The memory as ``uint8``. Bytes at its end that are no whole word are left out.
        dtype: The dtype.
    """
    size = dtype.itemsize
    return piece[: piece.numel() // size * size].view(dtype)
