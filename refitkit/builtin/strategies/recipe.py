"""The strategy ``recipe``: it computes slot values with the recipes of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.program import facts_of
from refitkit.protocols import HoldsProgram, Mapped, Rebuilds, SlotValue
from refitkit.recipe.plan import STRATEGY, RefitPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from refitkit.errors import Problem
    from refitkit.protocols import MapRequest


class RecipeStrategy:
    """Gives values to slots whose sources are present, and to slots whose values the plan keeps."""

    @property
    def name(self) -> str:
        """Name that users write in ``Config.strategies``: ``recipe``."""
        return STRATEGY

    @property
    def priority(self) -> int:
        """Place in the order of strategies: first, because it is exact and the fastest."""
        return 10

    def map(self, request: MapRequest) -> Mapped:
        """Return values for the rows that the plan has a recipe or a value for.

        If a guard is broken, all slots are declined, frozen ones included: their values may have
        changed, too.
        """
        plan = request.plan
        if not isinstance(plan, RefitPlan):
            return Mapped({}, {row.slot.key: "the plan has no recipes" for row in request.wanted})
        if _is_other_program(request):
            reason = "the ops of the source program are not those of the planned program"
            return Mapped({}, {row.slot.key: reason for row in plan.data.ledger})
        broken = plan.broken_guards(request.source) if plan.data.guards else []
        if broken:
            return Mapped({}, {row.slot.key: _guard_reason(broken) for row in plan.data.ledger})
        found = plan.values_of(request.wanted, request.source)
        return Mapped(
            {key: value for key, value in found.items() if isinstance(value, SlotValue)},
            {key: reason for key, reason in found.items() if isinstance(reason, str)},
        )


def _is_other_program(request: MapRequest) -> bool:
    """Return whether the source is a program that may make other engines than the planned one."""
    # The strategy ``rebuild`` serves modules that can be rebuilt: it interprets the program, and so
    # finds out whether its engines are the same.
    source = request.source
    if not isinstance(source, HoldsProgram) or not isinstance(request.module, Rebuilds):
        return False
    return facts_of(source.program).graph != request.plan.data.fingerprint.graph


def _guard_reason(guards: Sequence[Problem]) -> str:
    """Return why slots are declined if guards are broken."""
    more = f", and {len(guards) - 1} more" if len(guards) > 1 else ""
    return f"a value on which the recipes depend has changed: {guards[0]}{more}"
