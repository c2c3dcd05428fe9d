"""Built-in mapping strategies: ``recipe``, which replays a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from refitkit.protocols import MappingStrategy


@hookimpl
def refitkit_mapping_strategies() -> list[MappingStrategy]:
    """Return the strategy ``recipe``."""
    # Imported here because every start of refitkit imports this module.
    from refitkit.builtin.strategies.recipe import RecipeStrategy

    return [RecipeStrategy()]
