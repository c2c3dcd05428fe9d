"""Built-in merges: weights made of several others, tensor by tensor, when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable

    from refitkit.protocols import WeightSource


@hookimpl
def refitkit_load_weights(
    source: object, open_weights: Callable[[object], WeightSource]
) -> WeightSource | None:
    """Open a description of a merge; its parts are whatever ``open_weights`` takes."""
    from refitkit.builtin.merges.descriptions import Merge

    return source.open(open_weights) if isinstance(source, Merge) else None
