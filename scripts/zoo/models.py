"""All models of the zoo, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scripts.zoo import from_timm, from_torch_nn, from_torchvision, from_transformers
from scripts.zoo.by_hand import computed, memory, precision, tables

if TYPE_CHECKING:
    from scripts.zoo.entry import Entry

BY_HAND = (memory, tables, precision, computed)
FAMILIES = (from_torch_nn, *BY_HAND, from_torchvision, from_timm, from_transformers)


def zoo() -> dict[str, Entry]:
    """All entries.

    Raises:
        ValueError: Two have one name.
    """
    found: dict[str, Entry] = {}
    for family in FAMILIES:
        for entry in family.entries():
            if entry.name in found:
                raise ValueError(f"there are two models named {entry.name!r}")
            found[entry.name] = entry
    return found
