"""Recipes: record how slot values follow from source tensors, store it in plans, and replay it.

This package knows torch, and no engine. A recording (``Tape``, ``record``) becomes recipes
(``Draft``, ``write``), which a plan (``RefitPlan``) stores and replays. Sources of tensors in
memory are here, too, because replays read them.
"""

from refitkit.files.archive import Archive, ArchiveError, write_archive
from refitkit.recipe.plan import RefitPlan
from refitkit.recipe.record import Recorded, write
from refitkit.recipe.sources import (
    Overwriting,
    TensorMap,
    bits_known,
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
    "bits_known",
    "describe_tensor",
    "is_value",
    "pieces_of",
    "unusable_reason",
    "write",
    "write_archive",
    "write_value",
]
