"""Built-in weight sources. Each module here opens one kind of thing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from refitkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from refitkit.protocols import WeightSource


@hookimpl
def refitkit_load_weights(source: object) -> WeightSource | None:
    """Open a state_dict, a module, a program, a ``.safetensors`` or a ``torch.save`` file."""
    if isinstance(source, Path):
        if not source.is_file():
            return None
        from refitkit.builtin.weights import files

        return files.open_file(source)
    from refitkit.builtin.weights import objects

    if isinstance(source, Mapping):
        return objects.from_mapping(source)
    return objects.from_object(source)
