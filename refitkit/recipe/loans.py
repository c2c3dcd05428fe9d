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
        elements: The fractions in it, where somebody got it who may do more than pass it on.
    """

    escape: Escape
    back: bool = False
    read: bool = False
    elements: frozenset[float] = frozenset()

    @property
    def only_passed_on(self) -> bool:
        """Whether it counts as passed on and not as read: no guard is made of it."""
        return self.back and not self.read


class Loans:
    """All of one recording."""

    def __init__(self) -> None:
        """Start with none."""
        self._all: list[Loan] = []
        self._made: dict[int, tuple[weakref.ref[np.ndarray], bytes]] = {}
        self._doubtful: set[int] = set()

    def lend(self, memory: Memory, escape: Escape, array: np.ndarray | None = None) -> None:
        """Note that an array on a memory was given out.

        Args:
            memory: The memory.
            escape: What it holds.
            array: It, where somebody got it who may do more than pass it on.
        """
        elements = frozenset[float]() if array is None else frozenset(_fractions(array))
        loan = Loan(escape, elements=elements)
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

    def made(self, array: np.ndarray, *, doubtful: bool = False) -> None:
        """Note that NumPy made an array of numbers.

        Args:
            array: It.
            doubtful: Whether those numbers may hold a weight.
        """
        if array.nbytes <= _LARGEST:
            address = array.ctypes.data
            self._made[address] = weakref.ref(array), array.tobytes()
            (self._doubtful.add if doubtful else self._doubtful.discard)(address)

    def own(self, array: np.ndarray) -> None:
        """Note that an array of NumPy's own becomes a tensor: it may hold what was lent."""
        if self._all and not self._is_as_made(_root(array)):
            self.found()

    def knows(self, array: np.ndarray) -> bool:
        """Whether an array holds what NumPy was seen to make it of, and nobody doubts that."""
        root = _root(array)
        return self._is_as_made(root) and root.ctypes.data not in self._doubtful

    def _is_as_made(self, root: np.ndarray) -> bool:
        reference, held = self._made.get(root.ctypes.data, (None, b""))
        return reference is not None and reference() is root and root.tobytes() == held

    def at(self, address: int, held: np.ndarray) -> bool:
        """Note that somebody reads memory that is no tensor's: it may hold what was lent.

        Args:
            address: Where it is.
            held: What it holds.

        Returns:
            Whether that is what NumPy was seen to make there, and nobody doubts that.
        """
        known = self._made.get(address, (None, b""))[1] == held.tobytes()
        if self._all and not known:
            self.found()
        return known and address not in self._doubtful

    def found(self) -> None:
        """Note that a value turned up of which nobody knows who wrote it."""
        for loan in self._all:
            loan.read = True

    def among(self, numbers: np.ndarray | complex) -> tuple[Loan, ...]:
        """The arrays that numbers may have been read from: all of their fractions are in one."""
        if not any(loan.elements for loan in self._all):
            return ()
        found = set(_fractions(np.asarray(numbers)))
        return tuple(loan for loan in self._all if found and found <= loan.elements)


def _root(array: np.ndarray) -> np.ndarray:
    """The array that has the memory."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _fractions(array: np.ndarray) -> Iterator[float]:
    """The numbers in an array that are not whole: others are in too many arrays to tell anything.

    Nothing of an array that is large: it has every number.
    """
    if array.nbytes <= _LARGEST and array.dtype.kind == "f":
        wide = array.astype(np.float64).reshape(-1)
        yield from wide[np.isfinite(wide) & (wide != np.round(wide))].tolist()
