"""Refits like the last one: its mapping is used again, with other tensors.

A service refits a module again and again, to weights of the same names, dtypes and shapes. Then
each slot takes its value from the same entry as before. So the mapping is made once, of a source
whose tensors are exchanged (``SteadyTensors``). Nobody else sees that source: checks and verifiers
get the user's. Values that are computed are computed anew. What else depends on the content of
weights is not repeated: guards, state, and strategies of plugins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from refitkit.pipeline.mapping import SlotMapping, combined_with_weights
from refitkit.pipeline.needs import is_built_in
from refitkit.protocols import SlotValue
from refitkit.recipe.plan import STRATEGY
from refitkit.recipe.reads import state_slots
from refitkit.recipe.steady import SteadyTensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from refitkit.pipeline.context import Context
    from refitkit.protocols import WeightSource
    from refitkit.recipe import RefitPlan


@dataclass(frozen=True)
class LastMapping:
    """The mapping of the last full refit of a module, complete and checked.

    Attributes:
        context: Plugins and settings with which it was made.
        plan: Plan that was followed.
        source: The source that its values read; between refits it has no tensors.
        mapping: The mapping. Nobody changes it any more.
        restart: Drops the results that were computed from the tensors.
    """

    context: Context
    plan: RefitPlan
    source: SteadyTensors
    mapping: SlotMapping
    restart: Callable[[], None]

    @classmethod
    def of(
        cls, context: Context, plan: RefitPlan, source: WeightSource, mapping: SlotMapping
    ) -> LastMapping | None:
        """A mapping for later refits; None if it depends on more than plan and headers.

        Args:
            context: Plugins and settings.
            plan: The plan.
            source: The source of the mapping.
            mapping: The mapping of a full refit, once it has passed all checks.
        """
        if (
            plan.data.guards
            or state_slots(plan)
            or not combined_with_weights(plan).isdisjoint(source.names())
            or not _is_by_recipes(context, mapping)
        ):
            return None
        steady = SteadyTensors.of(source)
        if steady is None:
            return None
        found, restart = plan.repeatable_values(steady)
        values = {
            key: _quick(value, steady)
            for key, value in found.items()
            if isinstance(value, SlotValue)
        }
        steady.drop()
        again = SlotMapping(plan, values, mapping.reasons)
        if again.summary != mapping.summary:
            return None
        return cls(context, plan, steady, again, restart)

    def serves(self, context: Context, plan: RefitPlan, source: WeightSource) -> bool:
        """Take the tensors of a source, if its mapping for a full refit is this one.

        Args:
            context: Plugins and settings.
            plan: The plan.
            source: The source.

        Returns:
            Whether it is.
        """
        return self.context is context and self.plan is plan and self.source.take(source)

    def end(self) -> None:
        """Drop the tensors of this refit, and all results that were computed from them."""
        self.source.drop()
        self.restart()


def _is_by_recipes(context: Context, mapping: SlotMapping) -> bool:
    """Whether only the built-in recipes were asked."""
    return all(
        name == STRATEGY and is_built_in(context.host, plugin) for plugin, name in mapping.asked
    )


def _quick(value: SlotValue, source: SteadyTensors) -> SlotValue:
    """A value that loads faster, if it is an entry of the source as it is."""
    if value.identity and len(value.sources) == 1:
        load = source.loader(value.sources[0])
        if value.load() is load():  # not in another shape
            return value._replace(load=load)
    return value
