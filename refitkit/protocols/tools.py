"""What the pipeline lends to plugins' objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from refitkit.model import LayerType


@dataclass(frozen=True)
class Tools:
    """What the pipeline lends to backends, strategies and openers.

    Attributes:
        layer_types: Network layer types that hold weights, of all plugins, by name.
        progress: Called with one line of text for each long step, never per tensor.
        check_finite: Whether new values must be finite wherever the present ones are.
    """

    layer_types: Mapping[str, LayerType] = field(default_factory=dict)
    progress: Callable[[str], None] = field(default=lambda _: None)
    check_finite: bool = True
