"""What slots are given that was computed on the way has to be finite, too.

Whether the weights themselves are is a check of its own, made before anything is computed. But a
recipe can make NaN of finite numbers (the root of a variance below zero, a cast to float16 of what
is too large), and so can a plugin's strategy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refitkit.errors import EngineError, Problem, WeightMismatchError, raised_as
from refitkit.model import CallRef
from refitkit.program.finite import all_finite, counted, finite
from refitkit.protocols import ShowsStaged, SupportsReadback

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from refitkit.model import SlotKey
    from refitkit.pipeline.stage import Staged
    from refitkit.protocols import Engine, OpenedModule, Plan, SlotValue

_RECIPE = "recipe"
_HINT = "to allow it: check_finite=False in the config"


def require_finite(
    module: OpenedModule, staged: Staged, plan: Plan, values: Mapping[SlotKey, SlotValue]
) -> None:
    """Check staged values that are not a weight as it is, in engines that can be read.

    Engines that only remember what they were given look at their values themselves.

    Raises:
        WeightMismatchError: Elements are not finite where the present ones are; lists the slots.
        EngineError: An engine failed to show a value.
    """
    computed = {row.slot.key for row in plan.data.ledger if isinstance(row.value, CallRef)}
    problems: list[Problem] = []
    with torch.no_grad(), raised_as(EngineError, "Staged values cannot be looked at"):
        for name, one in staged.waiting():
            engine = module.engines[name]
            if isinstance(one, ShowsStaged) and isinstance(engine, SupportsReadback):
                some = [
                    value
                    for key, value in values.items()
                    if key[0] == name and (key in computed or value.strategy != _RECIPE)
                ]
                problems += _spoilt(engine, one, some)
    if problems:
        raise WeightMismatchError("What follows from the weights is not finite.", problems=problems)


def _spoilt(engine: Engine, staged: ShowsStaged, values: list[SlotValue]) -> Iterator[Problem]:
    """A problem for each of these slots of an engine that would become worse."""
    for value in values:
        slot = value.slot.name
        new = staged.staged(slot)
        if all_finite(new) or not isinstance(engine, SupportsReadback):
            continue
        bad = ~finite(new) & finite(engine.read(slot)).to(new.device)
        if bad.any():
            of = f"it follows from {', '.join(map(repr, value.sources))}; " if value.sources else ""
            wanted = "finite, as the present values are"
            yield Problem(slot, "non-finite", counted(bad), wanted, of + _HINT)
