"""Check that new values are finite wherever the present ones are.

A mask may hold -inf by design, but a weight with a new NaN is from a broken checkpoint. If a slot
is computed from several entries, nothing shows which of its elements come from which entry. So an
entry of a computed slot may be non-finite if the slot is non-finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from refitkit.model import CallRef
from refitkit.program.bits import all_finite, finite, newly_nonfinite, not_finite
from refitkit.protocols import GivesPieces, RemembersWeights, SupportsReadback
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
    """Yield entries with a non-finite element at a place where the present one is finite.

    Entries that no row of the plan names as its source are not checked, because their present
    values are unknown. Engines check the slots that such entries fill.

    Args:
        plan: Plan that is bound to the module.
        module: Module with its present weights.
        source: New weights.
        names: Entries to check.
    """
    sources = reads_of(plan).sources
    for name in _non_finite(source, [name for name in names if name in sources]):
        rows = [row for row in plan.data.ledger if name in row.sources]
        present = _PresentValues(plan, module, name, rows)
        yield from _new_problems(name, source.get(name), present)


def _non_finite(source: WeightSource, names: Iterable[str]) -> list[str]:
    """Return names of entries with a non-finite element.

    Large entries are read piece by piece if the source can do that.
    """
    names, whole, bad = list(names), list[str](), set[str]()
    pieces = source.pieces if isinstance(source, GivesPieces) else _no_pieces
    for name in names:
        parts = pieces(name)
        if parts is None:
            whole.append(name)
        elif not all(map(all_finite, parts)):
            bad.add(name)
    # One call for all of them: each answer of a GPU has to be waited for.
    bad.update(not_finite((name, source.get(name)) for name in whole))
    return [name for name in names if name in bad]


def _no_pieces(_name: str) -> None:
    """Stand in for ``GivesPieces.pieces`` of a source without it."""


def _new_problems(name: str, value: torch.Tensor, present: _PresentValues) -> Iterator[Problem]:
    """Yield a problem if elements are non-finite that are finite now."""
    same_entry = present.comparable(value.shape)
    bad = ~finite(value)
    if same_entry is not None:
        bad &= finite(same_entry).to(bad.device)
    elif present.derived_is_non_finite():
        return  # the new elements may be those that are non-finite now
    if bad.any():
        yield newly_nonfinite(name, bad)


@dataclass(frozen=True)
class _PresentValues:
    """Values that a module holds now and that come from one entry of a source.

    Attributes:
        plan: Plan that is bound to the module.
        module: Module with its present weights.
        name: Name of the entry.
        rows: Rows of the plan that name the entry as a source.
    """

    plan: Plan
    module: OpenedModule
    name: str
    rows: list[LedgerRow]

    def comparable(self, shape: torch.Size) -> torch.Tensor | None:
        """Return a value to compare with element by element; None if there is none.

        It is the value of a slot that holds the entry unchanged. If no such slot can be read, it is
        the value that the plan keeps of a tensor that no state_dict holds.
        """
        # A computed slot (``CallRef``) has elements of other entries, too.
        for row in self.rows:
            present = None if isinstance(row.value, CallRef) else self._read(row)
            if present is not None and present.shape == shape:
                return present
        kept = self.plan.pinned(self.name) if self.name in self.plan.data.pinned else None
        return kept if kept is not None and kept.shape == shape else None

    def derived_is_non_finite(self) -> bool:
        """Return whether a slot that is computed from the entry holds a non-finite element."""
        derived = (self._read(row) for row in self.rows if isinstance(row.value, CallRef))
        return any(present is not None and not all_finite(present) for present in derived)

    def _read(self, row: LedgerRow) -> torch.Tensor | None:
        engine = self.module.engines[row.slot.engine]
        if isinstance(engine, SupportsReadback):
            return engine.read(row.slot.name)
        return engine.remembered(row.slot.name) if isinstance(engine, RemembersWeights) else None
