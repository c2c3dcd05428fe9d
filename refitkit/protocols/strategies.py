"""Mapping strategies: objects that find a new value for each slot.

A plugin offers strategies with the hook ``refitkit_mapping_strategies``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from refitkit.protocols.ability import Ability
from refitkit.protocols.tools import Tools

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.model import LedgerRow
    from refitkit.protocols.engines import SlotValue
    from refitkit.protocols.modules import OpenedModule
    from refitkit.protocols.plans import BindableProgram, Plan
    from refitkit.protocols.sources import WeightSource


@dataclass(frozen=True)
class MapRequest:
    """The input of ``MappingStrategy.map``.

    Attributes:
        plan: Plan that was checked against the module.
        module: Opened target, with its present weights.
        source: New weights, under the names that the program reads.
        wanted: Ledger rows of the slots that still need a value.
        program: Stored program without weights; None if the module was saved without one.
        tools: Services of the pipeline.
    """

    plan: Plan
    module: OpenedModule
    source: WeightSource
    wanted: tuple[LedgerRow, ...]
    program: BindableProgram | None = None
    tools: Tools = field(default_factory=Tools)


@dataclass(frozen=True)
class Mapped:
    """The result of ``MappingStrategy.map``.

    Attributes:
        values: New values by ``(engine, slot)``, for some of the wanted slots.
        declined: Reasons by ``(engine, slot)`` why the strategy has no value for a slot. Errors and
            the report show them.
    """

    values: Mapping[tuple[str, str], SlotValue]
    declined: Mapping[tuple[str, str], str] = field(default_factory=dict)


@runtime_checkable
class MappingStrategy(Protocol, metaclass=Ability):
    """A method to find new values for slots."""

    @property
    def name(self) -> str:
        """Name of the strategy, as users write it in ``Config.strategies``."""

    @property
    def priority(self) -> int:
        """Rank of the strategy: lower ones are called first. ``recipe`` has 10.

        If strategies of two plugins have equal rank and values for the same slot, refitkit raises
        ``PluginError``. The order of ``Config.strategies``, if set, replaces the ranks.
        """

    def map(self, request: MapRequest) -> Mapped:
        """Return values for those wanted rows that the strategy can prove correct; never guess.

        Called in each refit before the checks, while calls of the module run, if slots still need a
        value. Proofs by trial call it too. It reads names and infos of the source; it should leave
        data to ``SlotValue.load``, which runs when an engine stages the value.

        Raises:
            RefitError: The refit is refused. Any other exception becomes a ``PluginError`` that
                names the strategy.
        """
