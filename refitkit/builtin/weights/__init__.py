"""Built-in weight sources: state_dicts, live modules, programs, streams, files and folders.

``objects`` opens what is in memory. ``folders`` opens paths: it chooses between ``files``,
``torch_files``, shards with an index, and ``distributed`` checkpoints. All of them read bytes with
``reading``, which guarantees that these are of one version of a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from refitkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from refitkit.protocols import WeightSource


@hookimpl
def refitkit_load_weights(source: object) -> WeightSource | None:
    """Open weights of any built-in kind; see the guide to weights."""
    # Imported here because every start of refitkit imports this module.
    if isinstance(source, Path):
        from refitkit.builtin.weights import folders

        opener = folders.open_folder if source.is_dir() else folders.open_weights_file
        return opener(source) if source.exists() else None
    from refitkit.builtin.weights import objects

    if isinstance(source, Mapping):
        return objects.from_mapping(source)
    if isinstance(source, Iterator):
        return objects.from_pairs(source)
    return objects.from_object(source)
