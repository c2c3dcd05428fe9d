"""Plans for engines that nobody compiled from a program."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from refitkit.model import (
    Fingerprint,
    Guard,
    Leaf,
    LeafKind,
    LedgerRow,
    OpCall,
    PlanData,
    Slot,
    SlotState,
    SourceRef,
    fingerprint_of_slots,
)
from refitkit.recipe import RefitPlan
from refitkit.recipe.store import index_of
from refitkit.testing.fakes import BACKEND

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from refitkit.protocols import OpenedModule


def make_slot(
    name: str, shape: tuple[int, ...] = (2,), dtype: str = "float32", engine: str = "model"
) -> Slot:
    """A slot without a tensor."""
    return Slot(engine=engine, name=name, dtype=dtype, shape=shape, count=prod(shape))


def recipe_row(slot: Slot, *sources: str) -> LedgerRow:
    """A row that takes its value from a source's tensor; by default of the slot's own name."""
    names = sources or (slot.name,)
    return LedgerRow(
        slot=slot, state=SlotState.RECIPE, value=SourceRef(fqn=names[0]), sources=names
    )


def leaf_for(slot: Slot, kind: LeafKind = LeafKind.PARAMETER, fqn: str | None = None) -> Leaf:
    """The leaf that a slot comes from."""
    shape = slot.shape if slot.shape is not None else (slot.count,)
    return Leaf(fqn=fqn or slot.name, kind=kind, dtype=slot.dtype, shape=shape)


def make_plan(
    rows: Sequence[LedgerRow],
    *,
    leaves: Sequence[Leaf] | None = None,
    ties: Sequence[tuple[str, ...]] = (),
    calls: Sequence[OpCall] = (),
    guards: Sequence[Guard] = (),
    pinned: Mapping[str, torch.Tensor] | None = None,
    backend: str = BACKEND,
    graph: str = "0" * 64,
) -> RefitPlan:
    """A plan around rows; by default with a parameter for each source that a row names."""
    if leaves is None:
        named = {name: leaf_for(row.slot, fqn=name) for row in rows for name in row.sources}
        leaves = tuple(named.values())
    pinned = dict(pinned or {})
    data = PlanData(
        backend=backend,
        leaves=tuple(leaves),
        ties=tuple(ties),
        ledger=tuple(rows),
        calls=tuple(calls),
        guards=tuple(guards),
        pinned=index_of(pinned),
        fingerprint=Fingerprint(graph=graph, slots=fingerprint_of_slots(row.slot for row in rows)),
    )
    return RefitPlan(data, pinned)


def plan_for(module: OpenedModule, **more: Any) -> RefitPlan:
    """A plan that takes every slot from the parameter of its name."""
    slots = [slot for engine in module.engines.values() for slot in engine.slots.values()]
    return make_plan([recipe_row(slot) for slot in slots], **more)
