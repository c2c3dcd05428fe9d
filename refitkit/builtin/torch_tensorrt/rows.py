"""Drafts of plans."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Protocol

from refitkit.model import LedgerRow, SlotState
from refitkit.program import facts_of
from refitkit.program.facts import tensors_of
from refitkit.protocols import PlanDraft
from refitkit.recipe import Recorded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from torch.export import ExportedProgram

    from refitkit.model import Slot
    from refitkit.protocols import OpenedModule

NOT_RECORDED = (
    "how it follows from the weights was not recorded; the strategy 'rebuild' serves it from a "
    "program with the new weights"
)


class Recording(Protocol):
    """What became of a program when it was planned, in this process or in another one."""

    @property
    def recorded(self) -> Recorded | None:
        """How slots follow from the program's weights; None where it was not recorded."""

    @property
    def constants(self) -> Mapping[str, torch.Tensor]:
        """What the program has and no state_dict holds, by FQN."""

    @property
    def settings(self) -> Mapping[str, str]:
        """Settings on which slots depend, as text."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of what made them."""

    @property
    def layer_types(self) -> tuple[str, ...]:
        """Names of the layer types that hold weights."""


def rebuilt_row(slot: Slot) -> LedgerRow:
    """A slot that only an interpreter's run can serve."""
    return LedgerRow(slot=slot, state=SlotState.UNMAPPED, reason=NOT_RECORDED)


def draft_of(found: Recording, slots: Iterable[Slot], device: str) -> PlanDraft:
    """A draft of what was recorded; other rows can only be served by an interpreter's run.

    Args:
        found: What the program became.
        slots: All slots of all engines.
        device: Kind of device that names and values of slots are for.
    """
    recorded = found.recorded or Recorded(())
    rows = {row.slot.key: row for row in recorded.rows}
    return PlanDraft(
        rows=tuple(_row(slot, rows.get(slot.key)) for slot in slots),
        calls=recorded.calls,
        guards=recorded.guards,
        pinned={**found.constants, **recorded.literals},
        settings=dict(found.settings),
        versions=dict(found.versions),
        platform=f"{platform.system()} {platform.machine()} {device}",
        layer_types=found.layer_types,
    )


def _row(slot: Slot, recorded: LedgerRow | None) -> LedgerRow:
    """A row for a slot as its engine describes it, of what the network's slot was recorded as."""
    if recorded is None:
        return rebuilt_row(slot)
    if (recorded.slot.dtype, recorded.slot.count) != (slot.dtype, slot.count):
        return rebuilt_row(slot)
    return recorded.model_copy(update={"slot": slot})


def slots_of(module: OpenedModule) -> list[Slot]:
    """All slots, as the engines list them."""
    return [slot for engine in module.engines.values() for slot in engine.slots.values()]


def constants_of(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Copies of what a program has and no state_dict holds: a plan keeps them."""
    tensors = tensors_of(program)
    return {
        leaf.fqn: tensors[leaf.fqn].detach().clone()
        for leaf in facts_of(program).leaves
        if leaf.kept
    }
