"""Which slots are to blame for a proof by trial that failed: those that kept their old value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import Problem, RefitError
from refitkit.pipeline.changes import live_value
from refitkit.pipeline.tools import tools_for
from refitkit.program.bits import same_bits
from refitkit.protocols import Rebuilds
from refitkit.recipe import TensorMap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from refitkit.model import LedgerRow, SlotKey
    from refitkit.pipeline.compiled import CompiledModule
    from refitkit.pipeline.pipeline import Pipeline

KEPT = "kept its old value"
_UNREADABLE = "nobody can read which of its slots kept their old value"


def wrong_slots(
    pipeline: Pipeline, compiled: CompiledModule, weights: Mapping[str, torch.Tensor]
) -> Iterator[Problem]:
    """The slots that do not hold what they should once a module is refitted to other weights.

    The module is refitted, and keeps these weights. Where its backend can read slots off a program,
    each slot is compared with that. Otherwise slots are listed that hold the bits from before,
    unless they follow from integers alone: a proof does not change those.

    Args:
        pipeline: What refits it.
        compiled: The module, with the weights from before.
        weights: The other weights.
    """
    before = _held(compiled)
    try:
        pipeline.refit(compiled, weights, verify="none", delta=False, rollback=True)
        right = _right(pipeline, compiled, weights)
    except RefitError:
        return  # there is an error already, which says more
    after = _held(compiled)
    moved = frozenset(name for name, value in weights.items() if value.is_floating_point())
    for row in compiled.plan.ledger if compiled.plan else ():
        key = row.slot.key
        if key in before and key in after:
            wanted = right.get(key)
            yield from _judged(row, before[key], after[key], wanted, moved)
    known = {name for name, _ in before.keys() & after.keys()}
    for name, engine in compiled.engines.items():
        if engine.slots and name not in known:
            yield Problem(name, _UNREADABLE)


def _judged(
    row: LedgerRow,
    before: torch.Tensor,
    after: torch.Tensor,
    wanted: torch.Tensor | None,
    moved: frozenset[str],
) -> Iterator[Problem]:
    name, kept = f"{row.slot.engine}/{row.slot.name}", same_bits(before, after)
    if wanted is not None:
        if not same_bits(after, wanted):
            kind = KEPT if kept else "got another value than the program gives it"
            yield Problem(name, kind, str(row.state), hint=row.reason)
    elif kept and (not row.sources or not moved.isdisjoint(row.sources)):
        yield Problem(name, KEPT, str(row.state), hint=row.reason)


def _held(compiled: CompiledModule) -> dict[SlotKey, torch.Tensor]:
    """Copies of what slots hold, flat, as far as engines can be read or remember it."""
    found: dict[SlotKey, torch.Tensor] = {}
    for name, engine in compiled.engines.items():
        read = live_value(engine)
        for slot in engine.slots if read is not None else ():
            value = read(slot) if read is not None else None
            if value is not None:
                found[name, slot] = value.detach().cpu().reshape(-1).clone()
    return found


def _right(
    pipeline: Pipeline, compiled: CompiledModule, weights: Mapping[str, torch.Tensor]
) -> dict[SlotKey, torch.Tensor]:
    """What slots should hold, flat, where the backend can read that off a program."""
    opened, kept, plan = compiled.opened, compiled.program, compiled.plan
    if not isinstance(opened, Rebuilds) or kept is None or plan is None:
        return {}
    tools = tools_for(pipeline.host, pipeline.config, "compile", "prove")
    made = opened.rebuilt(kept.restore(TensorMap(weights), plan.pinned), tools)
    return {
        (engine, slot): value.detach().cpu().reshape(-1)
        for engine, slots in made.items()
        for slot, value in slots.items()
    }
