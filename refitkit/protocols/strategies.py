"""Ways to get values for slots."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

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
    """What a strategy is asked.

    Attributes:
        plan: The plan, bound to the module.
        module: The opened target.
        source: Where the new weights come from.
        wanted: Rows that still need a value.
        program: The program that was kept, without weights; None where there is none.
        tools: What the pipeline lends.
    """

    plan: Plan
    module: OpenedModule
    source: WeightSource
    wanted: tuple[LedgerRow, ...]
    program: BindableProgram | None = None
    tools: Tools = field(default_factory=Tools)


@dataclass(frozen=True)
class Mapped:
    """What a strategy answers.

    Attributes:
        values: Values by ``(engine, slot)``.
        declined: Why it does not serve the others, by ``(engine, slot)``.
    """

    values: Mapping[tuple[str, str], SlotValue]
    declined: Mapping[tuple[str, str], str] = field(default_factory=dict)


@runtime_checkable
class MappingStrategy(Protocol):
    """One way to get values for slots."""

    @property
    def name(self) -> str:
        """Its name, as users write it in ``Config.strategies``."""

    @property
    def priority(self) -> int:
        """Strategies are tried from the lowest to the highest."""

    def map(self, request: MapRequest) -> Mapped:
        """Values for as many of the wanted rows as it can prove right; never a guess."""
