"""Arrays of NumPy on the memory of tensors: whether all that became of them is known.

Such an array can be read in ways that nobody sees: through the buffer protocol, by a library in C,
by an assignment into an array of NumPy's own. So it was only passed on if it came back, as a tensor
or as the weight of a layer. One that did not was read, and its value becomes a guard. The same is
true of all of them once an array of NumPy's own becomes a tensor that does not hold what NumPy had
made it of: it may hold their values.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refitkit.recipe.memories import Memory
    from refitkit.recipe.origins import Escape

_LARGEST = 1 << 20
"""Most bytes of an array of numbers that are remembered."""


@dataclass
class Loan:
    """An array on a tensor's memory that was given out.

    Attributes:
        escape: What it held, and where that came from.
        back: Whether it came back.
        read: Whether it may have been read before that.
    """

    escape: Escape
    back: bool = False
    read: bool = False


class Loans:
    """All of one recording."""

    def __init__(self) -> None:
        """Start with none."""
        self._all: list[Loan] = []
        self._made: dict[int, tuple[weakref.ref[np.ndarray], bytes]] = {}

    def lend(self, memory: Memory, escape: Escape) -> None:
        """Note that an array on a memory was given out."""
        loan = Loan(escape)
        self._all.append(loan)
        memory.loans.append(loan)

    @staticmethod
    def back(memory: Memory) -> None:
        """Note that arrays on a memory came back."""
        for loan in memory.loans:
            loan.back = True

    def escapes(self) -> Iterator[Escape]:
        """Values that were read, as far as anybody knows."""
        return (loan.escape for loan in self._all if loan.read or not loan.back)

    # -- arrays of NumPy's own --------------------------------------------------------------

    def made(self, array: np.ndarray) -> None:
        """Note that NumPy made an array of numbers."""
        if array.nbytes <= _LARGEST:
            self._made[array.ctypes.data] = weakref.ref(array), array.tobytes()

    def own(self, array: np.ndarray) -> None:
        """Note that an array of NumPy's own becomes a tensor: it may hold what was lent."""
        if not self._all:
            return
        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        reference, held = self._made.get(root.ctypes.data, (None, b""))
        if reference is None or reference() is not root or root.tobytes() != held:
            self.found()

    def at(self, address: int, held: np.ndarray) -> None:
        """Note that somebody reads memory that is no tensor's: it may hold what was lent.

        Args:
            address: Where it is.
            held: What it holds.
        """
        if self._all and self._made.get(address, (None, b""))[1] != held.tobytes():
            self.found()

    def found(self) -> None:
        """Note that a value turned up of which nobody knows who wrote it."""
        for loan in self._all:
            loan.read = True
