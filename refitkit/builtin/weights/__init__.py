"""Built-in weight sources. Each module here opens one kind of thing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from refitkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from refitkit.protocols import WeightSource


@hookimpl
def refitkit_load_weights(source: object) -> WeightSource | None:
    """Open what is in memory, comes in a stream, or lies in files; see the guide to weights."""
    if isinstance(source, Path):
        from refitkit.builtin.weights import folders

        opener = folders.open_folder if source.is_dir() else folders.open_weights_file
        return opener(source) if source.exists() else None
    from refitkit.builtin.weights import objects
    from refitkit.builtin.weights import objects as streams

    if isinstance(source, Mapping):
        return objects.from_mapping(source)
    if isinstance(source, Iterator):
        return streams.from_pairs(source)
    return objects.from_object(source)
