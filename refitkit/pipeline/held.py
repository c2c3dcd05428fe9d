"""What a compiled module is known to hold, and what it held before, in one value that is replaced.

One assignment makes it true of new weights, and one takes it back: an interrupt comes before or
after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from refitkit.pipeline.history import FIRST, History

if TYPE_CHECKING:
    from refitkit.pipeline.delta import Live


@dataclass(frozen=True)
class WeightState:
    """What is known of the weights of a module.

    Attributes:
        version: Their number: 0 as compiled or loaded, one more with every committed refit.
        source: What they were, in words.
        live: What its slots were computed from, where the last refit was one with ``delta``.
        overridden: What no state_dict holds and refits gave other values for than the plan keeps.
        history: What it held before, as far as that is kept.
    """

    version: int = 0
    source: str = FIRST
    live: Live | None = None
    overridden: frozenset[str] = frozenset()
    history: History = field(default_factory=History)

    @classmethod
    def first(cls, overridden: frozenset[str]) -> WeightState:
        """What a module holds at first of which others have overridden values that plans keep."""
        return cls(overridden=overridden, history=History(overridden=overridden))
