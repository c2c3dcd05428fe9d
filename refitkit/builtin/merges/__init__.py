"""Built-in merges: weights computed from other weights, tensor by tensor, as they are read.

Read ``descriptions`` first: the classes that users call. ``sources`` computes the tensors.
"""

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
    """Open the description of a merge. ``open_weights`` opens each of its parts."""
    # Imported here because every start of refitkit imports this module.
    from refitkit.builtin.merges.descriptions import Merge

    return source.open(open_weights) if isinstance(source, Merge) else None
