"""What two sets of weights differ in."""

from __future__ import annotations

from collections import Counter
from typing import Literal, TypeAlias

from refitkit.model.base import Frozen

DiffState: TypeAlias = Literal[
    "changed", "other dtype", "other shape", "only in A", "only in B", "not usable", "same"
]

STATES: tuple[DiffState, ...] = (
    "changed",
    "other dtype",
    "other shape",
    "only in A",
    "only in B",
    "not usable",
    "same",
)
"""In the order in which a summary tells them."""


class DiffRow(Frozen):
    """One tensor of two sets of weights, A and B.

    Attributes:
        name: Its name; of a module the slot's, after the engine's where there are several.
        state: ``same``: the same bits; ``changed``; ``only in A``, ``only in B``; ``other shape``,
            ``other dtype``: of the same name and not alike; ``not usable``: no plain tensor with
            data, in A or B.
        dtype: In A, or in B where only B has it.
        shape: Likewise.
        other_dtype: In B, where it is another one.
        other_shape: In B, where it is another one.
        relative: How far B is from A, as in :class:`~refitkit.model.ChangeRow`, from all elements.
            None where they cannot be subtracted.
        largest: Largest absolute difference of two elements; None likewise.
        share: Share of elements of which any bit differs; of other dtypes, after both are
            converted to a wider one. None likewise.
        note: Why it is not usable, or the name under which A or B has the same tied weight.
    """

    name: str
    state: DiffState
    dtype: str = ""
    shape: tuple[int, ...] = ()
    other_dtype: str = ""
    other_shape: tuple[int, ...] | None = None
    relative: float | None = None
    largest: float | None = None
    share: float | None = None
    note: str = ""


class DiffReport(Frozen):
    """What two sets of weights differ in.

    Attributes:
        a: What A is, in words.
        b: What B is, in words.
        rows: One for each name in either: first those that cannot be subtracted, then by relative
            change, the largest first, then those that are the same.
        notes: How the names of A and B were read, where that was not as they are.
    """

    a: str
    b: str
    rows: tuple[DiffRow, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether any row is not ``same``."""
        return any(row.state != "same" for row in self.rows)

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows by state; of states that occur."""
        found = Counter(row.state for row in self.rows)
        return {state: found[state] for state in STATES if state in found}

    @property
    def summary(self) -> str:
        """All of it in a line: ``2 changed, 5 same``."""
        counted = ", ".join(f"{number} {state}" for state, number in self.counts.items())
        if self.differs:
            return counted
        return f"nothing changed: {counted}" if counted else "nothing changed: both are empty"
