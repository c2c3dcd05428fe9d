"""Checks of the entries that adapters change against the plan of a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import Problem
from refitkit.model import SlotState
from refitkit.protocols import MadeOf

from refitkit_peft.source import LoraSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refitkit.model import PlanData
    from refitkit.protocols import WeightSource

_FILLED = {SlotState.RECIPE, SlotState.PINNED, SlotState.UNMAPPED}


def problems(plan: PlanData, source: WeightSource) -> Iterator[Problem]:
    """Problems with adapters that would change nothing, or only one of several tied names.

    Args:
        plan: Plan of the module.
        source: Weights by the program's names. Weights without adapters have no problems.
    """
    touched = _touched(source)
    if not touched:
        return
    ties = {name: tie for tie in plan.ties for name in tie}
    # An adapter on an unused weight changes no output, so it is allowed.
    read = (leaf.fqn for leaf in plan.leaves if leaf.used)
    used = {twin for name in read for twin in ties.get(name, (name,))}
    filling = _filling(plan, ties)
    for name in touched:
        if name in used and name not in filling:
            hint = "compile the model so that the engine has a slot for this weight"
            yield Problem(name, "not refittable", "an adapter", "a slot that depends on it", hint)
        # A source that also has the other names gives them values of its own.
        others = [twin for twin in ties.get(name, ()) if twin != name]
        if others and not any(twin in source.names() for twin in others):
            found = f"an adapter, but no {', '.join(map(repr, others))}"
            hint = (
                "the names are tied in the model, but the adapter changes only one of them: "
                "compile a model in which they are not tied"
            )
            yield Problem(name, "tie broken", found, hint=hint)


def _touched(source: WeightSource) -> list[str]:
    """The program's names of the entries that adapters change."""
    if isinstance(source, LoraSource):
        return list(source.touched)
    if not isinstance(source, MadeOf):
        return []
    # Name rules and transforms wrap the source: follow them to the LoraSource inside.
    inner = set(_touched(source.given))
    return [name for name in source.names() if not inner.isdisjoint(source.made_from(name))]


def _filling(plan: PlanData, ties: dict[str, tuple[str, ...]]) -> set[str]:
    """Names of weights that slots depend on; all names if a slot's dependencies are unknown."""
    if any(row.state is SlotState.UNMAPPED for row in plan.ledger):
        return {leaf.fqn for leaf in plan.leaves}
    rows = (row for row in plan.ledger if row.state in _FILLED)
    named = {name for row in rows for name in row.sources}
    return {twin for name in named for twin in ties.get(name, (name,))}
