"""The cached map, read. It comes out of other people's files: nothing in it is taken on trust."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

CONSTANTS = "constant_mapping"
"""Entry that holds old values by engine weight, not names; empty in 2.11 and 2.12."""
_DAMAGED = "its entry in the cached map is damaged"


@runtime_checkable
class HasNameMap(Protocol):
    """An engine that may have a cached map."""

    @property
    def name_map(self) -> Mapping[str, Any] | None:
        """The map as upstream stores it; None where there is none. Not to be changed."""


@dataclass(frozen=True)
class Entry:
    """What the map claims of one engine weight.

    Attributes:
        fqns: Names of its sources; four for a folded batch norm.
        dtype: torch's name of the engine weight's dtype, without the ``torch.``.
    """

    fqns: tuple[str, ...]
    dtype: str


def entry_of(name_map: Mapping[str, Any], slot: str) -> Entry | str:
    """The entry of one engine weight; or why there is none that could be used."""
    if slot not in name_map:
        constants = name_map.get(CONSTANTS)
        if isinstance(constants, Mapping) and slot in constants:
            return "the cached map has its old value, and not where that comes from"
        return "the cached map does not have it"
    found = name_map[slot]
    if not isinstance(found, list | tuple) or len(found) != 2:  # noqa: PLR2004 - name and dtype
        return _DAMAGED
    names, dtype = found
    return _entry((names,) if isinstance(names, str) else names, dtype)


def _entry(fqns: Any, dtype: Any) -> Entry | str:
    if fqns == ("",):
        return "upstream found nothing that it could come from"
    if isinstance(fqns, tuple) and len(fqns) == 3:  # noqa: PLR2004 - name, dimension, index
        return "the cached map takes it for a slice of a buffer, found by its value"
    if not isinstance(fqns, list | tuple) or not all(isinstance(fqn, str) for fqn in fqns):
        return _DAMAGED
    return Entry(tuple(fqns), _dtype_of(dtype))


def _dtype_of(dtype: Any) -> str:
    """Maps hold ``torch.float32``; as text where metadata was read without importing torch."""
    return str(dtype).removeprefix("torch.")
