"""Refits like the last one: its mapping is used again, with other tensors.

A service refits a module again and again, to weights of the same names, dtypes and shapes. Then
each slot takes its value from the same entry as before. So the mapping is made once, of a source
whose tensors are exchanged (``SteadyTensors``). What depends on the content of weights is not
repeated: guards, state, values that are computed, and strategies of plugins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from refitkit.pipeline.mapping import combined_with_weights
from refitkit.recipe.plan import STRATEGY
from refitkit.recipe.reads import state_slots

if TYPE_CHECKING:
    from refitkit.pipeline.context import Context
    from refitkit.pipeline.mapping import SlotMapping
    from refitkit.recipe import RefitPlan
    from refitkit.recipe.steady import SteadyTensors


@dataclass(frozen=True)
class LastMapping:
    """The mapping of the last full refit of a module, complete and checked.

    Attributes:
        context: Plugins and settings with which it was made.
        plan: Plan that was followed.
        source: The source that its values read.
        mapping: The mapping. Nobody changes it any more.
    """

    context: Context
    plan: RefitPlan
    source: SteadyTensors
    mapping: SlotMapping

    @classmethod
    def of(
        cls, context: Context, plan: RefitPlan, source: SteadyTensors, mapping: SlotMapping
    ) -> LastMapping | None:
        """A mapping for later refits; None if it depends on more than plan and headers.

        Args:
            context: Plugins and settings.
            plan: The plan.
            source: The source of the mapping.
            mapping: The mapping of a full refit, once it has passed all checks.
        """
        follows_from_headers = (
            mapping.asked == {STRATEGY}
            and not plan.data.guards
            and not state_slots(plan)
            and combined_with_weights(plan).isdisjoint(source.names())
            and all(value.identity or value.pinned for value in mapping.values.values())
        )
        return cls(context, plan, source, mapping) if follows_from_headers else None

    def serves(self, context: Context, plan: RefitPlan, source: SteadyTensors) -> bool:
        """Whether the mapping of a full refit to this source would be the same."""
        return self.context is context and self.plan is plan and self.source.is_like(source)
