"""Recipes: how a slot's value follows from source tensors; kept, stored, replayed.

Knows torch, knows no engine.
"""

from refitkit.recipe.archive import Archive, ArchiveError, write_archive
from refitkit.recipe.draft import Draft
from refitkit.recipe.overwriting import Overwriting
from refitkit.recipe.pieces import is_value, pieces_of, write_value
from refitkit.recipe.plan import RefitPlan
from refitkit.recipe.record import write
from refitkit.recipe.recorded import Recorded
from refitkit.recipe.sources import TensorMap, describe_tensor, unusable_reason
from refitkit.recipe.tape import Tape

__all__ = [
    "Archive",
    "ArchiveError",
    "Draft",
    "Overwriting",
    "Recorded",
    "RefitPlan",
    "Tape",
    "TensorMap",
    "describe_tensor",
    "is_value",
    "pieces_of",
    "unusable_reason",
    "write",
    "write_archive",
    "write_value",
]
