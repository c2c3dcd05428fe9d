"""From a recording to recipes: what each slot needs, in as few calls as possible.

A recording knows for every value which op made it of which others. Here that is followed back to
the leaves (:mod:`refitkit.recipe.lineage`) and written as calls (:mod:`refitkit.recipe.writer`).
Each slot gets a row, and what left the recording becomes guards.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from refitkit.model import Guard, LedgerRow, PinnedRef, SlotState, SourceRef
from refitkit.recipe.draft import Draft
from refitkit.recipe.lineage import Lineage, UnwritableError
from refitkit.recipe.lookalikes import Lookalikes
from refitkit.recipe.origins import Literal
from refitkit.recipe.recorded import Recorded, needed
from refitkit.recipe.trial import unlike
from refitkit.recipe.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from refitkit.model import Leaf, Slot, Value
    from refitkit.recipe.origins import Escape, Origin
    from refitkit.recipe.tape import Tape

_CHANGED = "what was recorded of it gives another value: it was changed where no op is seen"


def write(
    tape: Tape,
    slots: Iterable[tuple[Slot, Origin, torch.Tensor]],
    leaves: Sequence[Leaf],
    ties: Sequence[Sequence[str]],
    tensors: Mapping[str, torch.Tensor],
) -> Recorded:
    """Recipes for slots.

    Args:
        tape: The recording.
        slots: Slots, where their values come from, and the values.
        leaves: All leaves of the program.
        ties: Classes of leaves that are one tensor.
        tensors: Values of the leaves, by FQN: recipes have to give the slots' values of them.
    """
    slots = tuple(slots)
    rows = _Rows({leaf.fqn: leaf for leaf in leaves}, ties, Lookalikes(leaves, tensors))
    guards, fault = rows.guards(tape.escapes)
    found = rows.recorded(
        [rows.row(slot, origin, value, fault) for slot, origin, value in slots], guards
    )
    values = {slot.key: value for slot, _, value in slots}
    return needed(_tried(found, leaves, tensors, values))


class _Rows:
    """Says of each slot how its value is had, and of what left the recording how it is guarded."""

    def __init__(
        self,
        leaves: Mapping[str, Leaf],
        ties: Sequence[Sequence[str]],
        lookalikes: Lookalikes,
    ) -> None:
        self._leaves, self._lookalikes = leaves, lookalikes
        self._lineage = Lineage()
        self._draft = Draft(leaves, ties)
        self._writer = Writer(leaves, self._lineage, self._draft)
        self._guarded: set[str] = set()

    def row(self, slot: Slot, origin: Origin, value: torch.Tensor, fault: str) -> LedgerRow:
        """One slot."""
        if fault:
            return LedgerRow(slot=slot, state=SlotState.UNMAPPED, reason=fault)
        try:
            if not self._lineage.follows(origin):
                return self._frozen(slot, value, seen=not isinstance(origin.node, Literal))
            found = self._fitting(self._writer.value(origin), slot)
        except UnwritableError as exc:
            return LedgerRow(slot=slot, state=SlotState.UNMAPPED, reason=str(exc))
        return self._served(slot, found)

    def _fitting(self, value: Value, slot: Slot) -> Value:
        """The value of a slot; a reshape at its end is left to whoever reads it."""
        facts = self._draft.facts(value)
        count = torch.Size(facts.shape).numel()
        if (facts.dtype, count) != (slot.dtype, slot.count):
            found = f"{count} of {facts.dtype}"
            raise UnwritableError(f"the engine has {slot.count} of {slot.dtype} there, not {found}")
        return self._draft.before_reshapes(value)

    def _served(self, slot: Slot, found: Value) -> LedgerRow:
        sources = self._draft.sources(found)
        if isinstance(found, SourceRef) and not self._leaves[found.fqn].persistent:
            return LedgerRow(
                slot=slot,
                state=SlotState.PINNED,
                value=PinnedRef(name=found.fqn),
                sources=sources,
                reason="no state_dict holds it; the plan keeps its value",
            )
        return LedgerRow(slot=slot, state=SlotState.RECIPE, value=found, sources=sources)

    def _frozen(self, slot: Slot, value: torch.Tensor, *, seen: bool) -> LedgerRow:
        """A literal, unless its numbers are a weight's and nobody saw them being made."""
        fqn = "" if seen else self._lookalikes.of(value)
        if fqn and fqn not in self._guarded:
            raise UnwritableError(f"it holds the values of {fqn!r}, and no op is seen between them")
        kept = self._draft.keep(value if slot.shape is None else value.reshape(slot.shape))
        reason = "nothing that it is made of comes from a parameter or buffer"
        return LedgerRow(slot=slot, state=SlotState.FROZEN, value=kept, reason=reason)

    def guards(self, escapes: Iterable[Escape]) -> tuple[list[Guard], str]:
        """Guards for what left the recording; and why recipes say nothing, if one is lacking."""
        found: dict[Value, Guard] = {}
        for escape in escapes:
            try:
                if self._lineage.follows(escape.origin):
                    value = self._writer.value(escape.origin)
                    found.setdefault(value, _guard(value, escape))
                    self._guarded.update(self._draft.sources(value))
            except UnwritableError as exc:
                return [], f"a value decided what the engines are ({escape.how}), and {exc}"
        return list(found.values()), ""

    def recorded(self, rows: Iterable[LedgerRow], guards: Iterable[Guard]) -> Recorded:
        """These, with all calls and literals that were written for any."""
        draft = self._draft
        return Recorded(tuple(rows), tuple(draft.calls), tuple(guards), draft.literals)


def _guard(value: Value, escape: Escape) -> Guard:
    return Guard(
        value=value,
        sha256=escape.sha256,
        dtype=escape.facts.dtype,
        shape=escape.facts.shape,
        shown=escape.shown,
        reason=escape.how,
    )


def _tried(
    found: Recorded,
    leaves: Sequence[Leaf],
    tensors: Mapping[str, torch.Tensor],
    values: Mapping[tuple[str, str], torch.Tensor],
) -> Recorded:
    """The same; without recipes that do not give the value that the slot had."""
    kept = {leaf.fqn: tensors[leaf.fqn] for leaf in leaves if leaf.parts} | dict(found.literals)
    wrong = set(unlike(found.rows, found.calls, leaves, tensors, kept, values))
    rows = (
        LedgerRow(slot=row.slot, state=SlotState.UNMAPPED, reason=_CHANGED)
        if row.slot.key in wrong
        else row
        for row in found.rows
    )
    return replace(found, rows=tuple(rows))
