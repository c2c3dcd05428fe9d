"""Recipes: how a slot's value follows from source tensors; kept, stored, replayed.

Knows torch, knows no engine.
"""

from refitkit.files.archive import Archive, ArchiveError, write_archive
from refitkit.recipe.plan import RefitPlan
from refitkit.recipe.record import Recorded, write
from refitkit.recipe.sources import (
    Overwriting,
    TensorMap,
    describe_tensor,
    is_value,
    pieces_of,
    unusable_reason,
    write_value,
)
from refitkit.recipe.tape import Tape
from refitkit.recipe.writer import Draft

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
