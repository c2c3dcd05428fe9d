"""What slots are given that was computed on the way has to be finite, too.

Whether the weights themselves are is a check of its own, made before anything is computed. But a
recipe can make NaN of finite numbers (the root of a variance below zero, a cast to float16 of what
is too large), and so can a plugin's strategy.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from refitkit.errors import EngineError, WeightMismatchError, raised_as
from refitkit.model import CallRef
from refitkit.program.finite import all_finite, finite, spoilt
from refitkit.protocols import ShowsStaged, SupportsReadback
from refitkit.recipe.values import STRATEGY

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from refitkit.errors import Problem
    from refitkit.model import SlotKey
    from refitkit.pipeline.stage import Staged
    from refitkit.protocols import OpenedModule, Plan, SlotValue


def require_finite(
    module: OpenedModule, staged: Staged, plan: Plan, values: Mapping[SlotKey, SlotValue]
) -> None:
    """Check staged values that are not a weight as it is, in engines that can be read.

    Engines that only remember what they were given look at their values themselves.

    Raises:
        WeightMismatchError: Elements are not finite where the present ones are; lists the slots.
        EngineError: An engine failed to show a value.
    """
    looked_at = [
        (name, engine, one)
        for name, one in staged.waiting()
        if isinstance(one, ShowsStaged)
        and isinstance(engine := module.engines[name], SupportsReadback)
    ]
    if not looked_at:
        return
    made = _made(plan, values)
    problems: list[Problem] = []
    with torch.no_grad(), raised_as(EngineError, "Staged values cannot be looked at"):
        for name, engine, one in looked_at:
            problems += _spoilt(engine, one, made[name])
    if problems:
        raise WeightMismatchError("What follows from the weights is not finite.", problems=problems)


def _made(plan: Plan, values: Mapping[SlotKey, SlotValue]) -> Mapping[str, list[SlotValue]]:
    """Values that are not a weight as it is, by engine."""
    found: defaultdict[str, list[SlotValue]] = defaultdict(list)
    for row in plan.data.ledger:
        value = values.get(row.slot.key)
        if value and (value.strategy != STRATEGY or isinstance(row.value, CallRef)):
            found[row.slot.engine].append(value)
    return found


def _spoilt(
    engine: SupportsReadback, staged: ShowsStaged, values: list[SlotValue]
) -> Iterator[Problem]:
    """A problem for each of these slots of an engine that would become worse."""
    for value in values:
        slot = value.slot.name
        new = staged.staged(slot)
        if all_finite(new):
            continue
        bad = ~finite(new) & finite(engine.read(slot)).to(new.device)
        if bad.any():
            names = ", ".join(map(repr, value.sources))
            yield spoilt(slot, bad, f"it follows from {names}; " if names else "")
