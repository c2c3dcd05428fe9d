"""What the plan of a module says of the entries that adapters change."""

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

_FED = {SlotState.RECIPE, SlotState.PINNED, SlotState.UNMAPPED}


def problems(plan: PlanData, source: WeightSource) -> Iterator[Problem]:
    """Entries with adapters that would change nothing, or more than was meant.

    Args:
        plan: The plan, with names as the program has them.
        source: The weights as the program reads them; nothing is said of those without adapters.
    """
    touched = _touched(source)
    if not touched:
        return
    ties = {name: tie for tie in plan.ties for name in tie}
    read = (leaf.fqn for leaf in plan.leaves if leaf.used)
    used = {twin for name in read for twin in ties.get(name, (name,))}
    fed = _fed(plan, ties)
    for name in touched:
        if name in used and name not in fed:
            hint = "compile the model so that this weight is one of the engine's"
            yield Problem(name, "not refittable", "an adapter", "a slot that follows from it", hint)
        others = [twin for twin in ties.get(name, ()) if twin != name]
        if others and not any(twin in source.names() for twin in others):
            found = f"an adapter, and no {', '.join(map(repr, others))}"
            hint = (
                "the model has one weight of these names, and the adapter is for one of them: "
                "compile a model in which they are not tied"
            )
            yield Problem(name, "tie broken", found, hint=hint)


def _touched(source: WeightSource) -> list[str]:
    """Names of what adapters change, as the program has them."""
    if isinstance(source, LoraSource):
        return list(source.touched)
    if not isinstance(source, MadeOf):
        return []
    inner = set(_touched(source.given))
    return [name for name in source.names() if not inner.isdisjoint(source.made_from(name))]


def _fed(plan: PlanData, ties: dict[str, tuple[str, ...]]) -> set[str]:
    """Names that slots are filled from; all of them where nobody knows what a slot follows from."""
    if any(row.state is SlotState.UNMAPPED for row in plan.ledger):
        return {leaf.fqn for leaf in plan.leaves}
    rows = (row for row in plan.ledger if row.state in _FED)
    named = {name for row in rows for name in row.sources}
    return {twin for name in named for twin in ties.get(name, (name,))}
