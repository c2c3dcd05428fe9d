"""Built-in mapping strategies: ``recipe``, which replays a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from refitkit.protocols import MappingStrategy


@hookimpl
def refitkit_mapping_strategies() -> list[MappingStrategy]:
    """Offer ``recipe``."""
    from refitkit.builtin.strategies.recipe import RecipeStrategy

    return [RecipeStrategy()]
