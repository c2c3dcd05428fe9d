"""Rows of the ledger for slots whose way from the weights was not recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.model import LedgerRow, SlotState

if TYPE_CHECKING:
    from refitkit.model import Slot

NOT_RECORDED = (
    "how it follows from the weights was not recorded; the strategy 'rebuild' serves it from a "
    "program with the new weights"
)


def rebuilt_row(slot: Slot) -> LedgerRow:
    """A slot that only an interpreter's run can serve."""
    return LedgerRow(slot=slot, state=SlotState.UNMAPPED, reason=NOT_RECORDED)
