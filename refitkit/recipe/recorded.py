"""Recipes of all slots, as a recording gives them: without what none of them needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from refitkit.model import CallRef, PinnedRef
from refitkit.recipe.operands import calls_below, operands_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from refitkit.model import Guard, LedgerRow, OpCall


@dataclass(frozen=True)
class Recorded:
    """Recipes of all slots.

    Attributes:
        rows: One for each slot that was asked for.
        calls: What they compute.
        guards: What must be as it was.
        literals: Tensors that the plan has to keep, beside leaves that no state_dict holds.
    """

    rows: tuple[LedgerRow, ...]
    calls: tuple[OpCall, ...] = ()
    guards: tuple[Guard, ...] = ()
    literals: Mapping[str, torch.Tensor] = field(default_factory=dict)


def needed(found: Recorded) -> Recorded:
    """All of it, without calls and literals that no row and no guard needs."""
    wanted = [row.value for row in found.rows if row.value]
    wanted += [guard.value for guard in found.guards]
    below = sorted(calls_below(wanted, lambda number: operands_of(found.calls[number])))
    numbers = {old: new for new, old in enumerate(below)}
    calls = tuple(_renumbered(found.calls[old], numbers) for old in below)
    kept = {v.name for call in calls for v in operands_of(call) if isinstance(v, PinnedRef)}
    kept |= {value.name for value in wanted if isinstance(value, PinnedRef)}
    return Recorded(
        rows=tuple(
            row.model_copy(update={"value": _renumber(row.value, numbers)}) for row in found.rows
        ),
        calls=calls,
        guards=tuple(
            guard.model_copy(update={"value": _renumber(guard.value, numbers)})
            for guard in found.guards
        ),
        literals={name: value for name, value in found.literals.items() if name in kept},
    )


def _renumber(argument: Any, numbers: Mapping[int, int]) -> Any:
    if isinstance(argument, tuple):
        return tuple(_renumber(one, numbers) for one in argument)
    if isinstance(argument, CallRef):
        return CallRef(call=numbers[argument.call], output=argument.output)
    return argument


def _renumbered(call: OpCall, numbers: Mapping[int, int]) -> OpCall:
    args = _renumber(call.args, numbers)
    kwargs = {name: _renumber(one, numbers) for name, one in call.kwargs.items()}
    return call.model_copy(update={"args": args, "kwargs": kwargs})
