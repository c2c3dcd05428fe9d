"""State: the slots that calls of a module write, such as KV caches and counters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.model import PinnedRef, SourceRef
from refitkit.recipe.once import once_for_each

if TYPE_CHECKING:
    from refitkit.model import LedgerRow, SlotKey
    from refitkit.protocols import Plan


@once_for_each
def state_slots(plan: Plan) -> tuple[SlotKey, ...]:
    """Keys of all slots that calls write, in the ledger's order.

    The engine says so of its slot, or the program writes the leaf that the slot holds. An engine
    that somebody else compiled may not know.
    """
    written = frozenset(leaf.fqn for leaf in plan.data.leaves if leaf.mutated)
    return tuple(row.slot.key for row in plan.data.ledger if _is_state(row, written))


def _is_state(row: LedgerRow, written: frozenset[str]) -> bool:
    match row.value:
        case SourceRef(fqn=name) | PinnedRef(name=name):
            return row.slot.mutable or name in written
    return row.slot.mutable
