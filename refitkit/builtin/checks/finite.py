"""New values must be finite wherever the present ones are.

A mask may hold -inf by design; a weight that suddenly holds NaN is a broken checkpoint. Where a
slot is computed from entries nobody can say which elements of them its own come from: an entry may
then be non-finite if the slot is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from refitkit.model import CallRef
from refitkit.program.bits import all_finite, finite, newly_nonfinite, not_finite
from refitkit.protocols import GivesPieces, SupportsReadback
from refitkit.recipe.reads import reads_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from refitkit.errors import Problem
    from refitkit.model import LedgerRow
    from refitkit.protocols import OpenedModule, Plan, WeightSource


def problems(
    plan: Plan, module: OpenedModule, source: WeightSource, names: Iterable[str]
) -> Iterator[Problem]:
    """Entries of the source with a non-finite element where the present one is finite.

    Of entries that no row names as its source nothing present is known; engines check their slots.
    """
    sources = reads_of(plan).sources
    for name in _not_finite(source, [name for name in names if name in sources]):
        rows = [row for row in plan.data.ledger if name in row.sources]
        yield from _spoilt(name, source.get(name), _Present(plan, module, name, rows))


def _not_finite(source: WeightSource, names: Iterable[str]) -> list[str]:
    """Entries with an element that is not finite; a large one comes in pieces, if it can."""
    names, whole, spoilt = list(names), list[str](), set[str]()
    pieces = source.pieces if isinstance(source, GivesPieces) else _no_pieces
    for name in names:
        parts = pieces(name)
        if parts is None:
            whole.append(name)
        elif not all(map(all_finite, parts)):
            spoilt.add(name)
    spoilt.update(not_finite((name, source.get(name)) for name in whole))
    return [name for name in names if name in spoilt]


def _no_pieces(_name: str) -> None:
    """What a source gives that has no pieces."""


def _spoilt(name: str, value: torch.Tensor, present: _Present) -> Iterator[Problem]:
    """A problem, unless the present values are not finite either."""
    alike = present.alike(value.shape)
    bad = ~finite(value)
    if alike is not None:
        bad &= finite(alike).to(bad.device)
    elif present.derived_not_finite():
        return
    if bad.any():
        yield newly_nonfinite(name, bad)


@dataclass(frozen=True)
class _Present:
    """What is known of the values that a module holds now of one entry of a source."""

    plan: Plan
    module: OpenedModule
    name: str
    rows: list[LedgerRow]

    def alike(self, shape: torch.Size) -> torch.Tensor | None:
        """A value to compare element by element: of a slot that holds the entry as it is.

        Where no such slot can be read, the one that the plan keeps of what no state_dict holds.
        """
        for row in self.rows:
            present = None if isinstance(row.value, CallRef) else self._read(row)
            if present is not None and present.shape == shape:
                return present
        kept = self.plan.pinned(self.name) if self.name in self.plan.data.pinned else None
        return kept if kept is not None and kept.shape == shape else None

    def derived_not_finite(self) -> bool:
        """Whether a slot that is computed from the entry, among others, is not finite itself."""
        derived = (self._read(row) for row in self.rows if isinstance(row.value, CallRef))
        return any(present is not None and not all_finite(present) for present in derived)

    def _read(self, row: LedgerRow) -> torch.Tensor | None:
        engine = self.module.engines[row.slot.engine]
        return engine.read(row.slot.name) if isinstance(engine, SupportsReadback) else None
