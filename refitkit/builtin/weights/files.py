"""Weights in one file, by its suffix."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from refitkit.builtin.weights.safetensors_files import SafetensorsFile
from refitkit.builtin.weights.torch_files import open_torch_file
from refitkit.file_state import stat_of

if TYPE_CHECKING:
    from pathlib import Path

    from refitkit.protocols import WeightSource

_TORCH_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt"}


def is_file(path: Path) -> bool:
    """Whether there is a file, or a link to one; also of a name that no file can have."""
    found = stat_of(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def open_file(path: Path) -> WeightSource | None:
    """Open a weights file by its suffix; None where the suffix is another plugin's.

    Raises:
        SourceError: It is missing, truncated or holds something else.
    """
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in _TORCH_SUFFIXES:
        return open_torch_file(path)
    return None
