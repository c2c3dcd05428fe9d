"""Weights in one file, by its suffix."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from refitkit.builtin.weights.reading import OpenFile
from refitkit.builtin.weights.torch_files import open_torch_file
from refitkit.errors import SourceError, raise_if_resource
from refitkit.files.file_state import stat_of
from refitkit.files.safetensors_format import read_entries
from refitkit.program.dtypes import dtype_of
from refitkit.recipe.sources import LARGE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    import torch

    from refitkit.model import TensorInfo
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


# MERGED safetensors_files: Weights in a ``.safetensors`` file.
#
# It is read here because safetensors itself maps the file: see ``reading``.


class SafetensorsFile:
    """One ``.safetensors`` file: its header is read now, tensors on demand."""

    def __init__(self, path: Path) -> None:
        """Open and check it.

        Raises:
            SourceError: It is missing, truncated or not of this format.
        """
        self.description = f"{str(path)!r}"
        try:
            self._file = OpenFile(path, self.description)
            self._entries = read_entries(self._file.size, self._bytes)
        except (OSError, ValueError, RecursionError) as exc:
            raise_if_resource(exc, f"{self.description} cannot be read")
            raise SourceError(
                f"{self.description} cannot be read as safetensors: {exc}.",
                hint="Check that it was written or downloaded completely.",
            ) from exc

    def _bytes(self, start: int, count: int) -> bytes:
        return self._file.read(start, count).numpy().tobytes()

    def names(self) -> Collection[str]:
        """All names in the file."""
        return self._entries.keys()

    def info(self, fqn: str) -> TensorInfo:
        """Dtype and shape, from the header."""
        return self._entries[fqn].info

    def get(self, fqn: str) -> torch.Tensor:
        """The tensor, on the CPU, in memory of its own."""
        info, start, nbytes = self._entries[fqn]
        if info.unusable:
            raise SourceError(f"{self.description}: {fqn!r} cannot be read: {info.unusable}.")
        raw = self._file.read(start, nbytes)
        return raw.view(dtype_of(info.dtype)).reshape(info.shape)

    def pieces(self, fqn: str) -> Iterator[torch.Tensor] | None:
        """See ``refitkit.protocols.GivesPieces``."""
        info, start, nbytes = self._entries[fqn]
        if nbytes < LARGE or info.unusable:
            return None
        return self._file.pieces(start, nbytes, dtype_of(info.dtype))

    def require_unchanged(self) -> None:
        """See ``refitkit.protocols.MayChange``."""
        self._file.require_unchanged()

    def reread(self) -> None:
        """See ``refitkit.protocols.SupportsReread``."""
        self._file.reread()
