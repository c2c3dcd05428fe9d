"""The strategy ``recipe``: values as the plan says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.protocols import Mapped, SlotValue
from refitkit.recipe.plan import STRATEGY, RefitPlan

if TYPE_CHECKING:
    from refitkit.protocols import MapRequest


class RecipeStrategy:
    """Serves every slot whose sources are there, and those that are pinned."""

    @property
    def name(self) -> str:
        """``recipe``."""
        return STRATEGY

    @property
    def priority(self) -> int:
        """It is tried first: exact, and the fastest."""
        return 10

    def map(self, request: MapRequest) -> Mapped:
        """Values for the rows that the plan has a recipe or a pinned value for."""
        values: dict[tuple[str, str], SlotValue] = {}
        declined: dict[tuple[str, str], str] = {}
        if not isinstance(request.plan, RefitPlan):
            return Mapped({}, {row.slot.key: "the plan has no recipes" for row in request.wanted})
        for row in request.wanted:
            found = request.plan.value_of(row, request.source)
            if isinstance(found, SlotValue):
                values[row.slot.key] = found
            else:
                declined[row.slot.key] = found
        return Mapped(values, declined)
