"""Recipes: how a slot's value follows from source tensors; kept, stored, replayed.

Knows torch, knows no engine.
"""

from refitkit.recipe.archive import Archive, ArchiveError, write_archive
from refitkit.recipe.plan import RefitPlan
from refitkit.recipe.sources import TensorMap, describe_tensor, unusable_reason

__all__ = [
    "Archive",
    "ArchiveError",
    "RefitPlan",
    "TensorMap",
    "describe_tensor",
    "unusable_reason",
    "write_archive",
]
