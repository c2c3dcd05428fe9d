"""Rows of the ledger for slots whose way from the weights was not recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.model import LedgerRow, SlotState
from refitkit.program import facts_of
from refitkit.program.facts import tensors_of

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from refitkit.model import Slot

NOT_RECORDED = (
    "how it follows from the weights was not recorded; the strategy 'rebuild' serves it from a "
    "program with the new weights"
)


def rebuilt_row(slot: Slot) -> LedgerRow:
    """A slot that only an interpreter's run can serve."""
    return LedgerRow(slot=slot, state=SlotState.UNMAPPED, reason=NOT_RECORDED)


def constants_of(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Copies of what a program has and no state_dict holds: a plan keeps them."""
    tensors = tensors_of(program)
    return {
        leaf.fqn: tensors[leaf.fqn].detach().clone()
        for leaf in facts_of(program).leaves
        if not leaf.persistent
    }
