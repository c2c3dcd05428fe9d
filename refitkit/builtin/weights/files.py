"""Open one file of weights: by its suffix, as safetensors or as a file of ``torch.save``."""

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
    """Return whether a path is a regular file or a link to one; False for an invalid name.

    Raises:
        ResourceError: The system refused to report the state of the path.
    """
    found = stat_of(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def open_file(path: Path) -> WeightSource | None:
    """Open a file of weights; return None if the suffix is not one of these formats.

    Raises:
        SourceError: The file is missing or truncated, or is not of the format of its suffix.
    """
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in _TORCH_SUFFIXES:
        return open_torch_file(path)
    return None


class SafetensorsFile:
    """A source of the tensors in a ``.safetensors`` file. Tensors are read on demand.

    The safetensors package maps the file, which ``reading`` avoids, so refitkit reads it itself.
    """

    def __init__(self, path: Path) -> None:
        """Open a file and read its header.

        Raises:
            SourceError: The file is missing, truncated or not of this format.
        """
        self.description = f"{str(path)!r}"
        try:
            self._file = OpenFile(path, self.description)
            self._entries = read_entries(self._file.size, self._bytes)
        # Nested JSON in a damaged header may exhaust the stack.
        except (OSError, ValueError, RecursionError) as exc:
            raise_if_resource(exc, f"{self.description} cannot be read")
            raise SourceError(
                f"{self.description} cannot be read as safetensors: {exc}.",
                hint="Check that it was written or downloaded completely.",
            ) from exc

    def _bytes(self, start: int, count: int) -> bytes:
        return self._file.read(start, count).numpy().tobytes()

    def names(self) -> Collection[str]:
        """Return all names in the file."""
        return self._entries.keys()

    def info(self, fqn: str) -> TensorInfo:
        """Return dtype and shape, from the header."""
        return self._entries[fqn].info

    def get(self, fqn: str) -> torch.Tensor:
        """Return the tensor, contiguous and on the CPU. Do not write to it.

        Raises:
            KeyError: The file has no such name.
            SourceError: The dtype is not supported, or the file was changed or cannot be read.
        """
        info, start, nbytes = self._entries[fqn]
        if info.unusable:  # a dtype that torch or refitkit lacks
            raise SourceError(f"{self.description}: {fqn!r} cannot be read: {info.unusable}.")
        raw = self._file.read(start, nbytes)
        return raw.view(dtype_of(info.dtype)).reshape(info.shape)

    def pieces(self, fqn: str, into: torch.Tensor | None = None) -> Iterator[torch.Tensor] | None:
        """Return pieces of an entry; see ``refitkit.protocols.GivesPieces``."""
        info, start, nbytes = self._entries[fqn]
        # ``get`` reads it, or raises
        if info.unusable or (into is None and nbytes < LARGE):
            return None
        return self._file.pieces(start, nbytes, dtype_of(info.dtype), into)

    def has_bits(self, fqn: str, tensor: torch.Tensor) -> bool | None:
        """Compare digests; see ``refitkit.protocols.KnowsBits``."""
        info, start, nbytes = self._entries[fqn]
        if info.unusable or tensor.dtype != dtype_of(info.dtype) or tensor.nbytes != nbytes:
            return None
        return self._file.has_bits(start, tensor)

    def require_unchanged(self) -> None:
        """Check that the file was not changed; see ``refitkit.protocols.MayChange``."""
        self._file.require_unchanged()

    def reread(self) -> None:
        """Compare digests with a second read; see ``refitkit.protocols.SupportsReread``."""
        self._file.reread()
