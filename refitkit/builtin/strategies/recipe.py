"""The strategy ``recipe``: values as the plan says."""

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
    """Serves every slot whose sources are there, and those whose values the plan keeps."""

    @property
    def name(self) -> str:
        """``recipe``."""
        return STRATEGY

    @property
    def priority(self) -> int:
        """It is tried first: exact, and the fastest."""
        return 10

    def map(self, request: MapRequest) -> Mapped:
        """Values for the rows that the plan has a recipe or a value for.

        Where a guard is broken it serves nothing, and says so of every slot: of frozen ones, too,
        whose values may be other ones now.
        """
        plan = request.plan
        if not isinstance(plan, RefitPlan):
            return Mapped({}, {row.slot.key: "the plan has no recipes" for row in request.wanted})
        if _is_another(request):
            reason = "the source is a program of other ops than the one that was planned"
            return Mapped({}, {row.slot.key: reason for row in plan.data.ledger})
        broken = plan.broken_guards(request.source) if plan.data.guards else []
        if broken:
            return Mapped({}, {row.slot.key: _broken(broken) for row in plan.data.ledger})
        found = plan.values_of(request.wanted, request.source)
        return Mapped(
            {key: value for key, value in found.items() if isinstance(value, SlotValue)},
            {key: reason for key, reason in found.items() if isinstance(reason, str)},
        )


def _is_another(request: MapRequest) -> bool:
    """Whether the weights come in a program that may make other engines; an interpreter knows."""
    source = request.source
    if not isinstance(source, HoldsProgram) or not isinstance(request.module, Rebuilds):
        return False
    return facts_of(source.program).graph != request.plan.data.fingerprint.graph


def _broken(guards: Sequence[Problem]) -> str:
    more = f", and {len(guards) - 1} more" if len(guards) > 1 else ""
    return f"a value that decided what slots hold is another one now: {guards[0]}{more}"
