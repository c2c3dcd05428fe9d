"""All values of one part in one file, which the user's process and its session both map."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from refitkit.errors import EngineError, resources
from refitkit.program.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from refitkit.model import Slot

_ALIGNMENT = 64


class Region:
    """A mapped file.

    Attributes:
        path: The file.
        views: Flat tensors in it, by slot name.
        whole: The whole file, as bytes.
    """

    def __init__(self, path: Path, whole: torch.Tensor, slots: Iterable[Slot]) -> None:
        """Use ``create`` or ``open``."""
        self.path, self.whole = path, whole
        self.views: dict[str, torch.Tensor] = {}
        start = 0
        for slot in slots:
            raw = whole[start : start + slot.nbytes]
            self.views[slot.name] = raw.view(dtype_of(slot.dtype))
            start += _padded(slot.nbytes)

    @classmethod
    def create(cls, path: Path, slots: Iterable[Slot]) -> Region:
        """A new file of zeros, as large as these slots need.

        Raises:
            ResourceError: There is no room for it: writing to a mapped file that gets no room later
                would end the process.
        """
        listed = list(slots)
        with resources(f"{str(path)!r} cannot be made"), path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, _size(listed))
        return cls.open(path, listed)

    @classmethod
    def open(cls, path: Path, slots: Iterable[Slot]) -> Region:
        """Map a file that ``create`` made for the same slots.

        Raises:
            EngineError: It has another size.
        """
        listed = list(slots)
        if path.stat().st_size != _size(listed):
            raise EngineError(f"{str(path)!r} holds the values of other slots.")
        whole = torch.from_file(str(path), shared=True, size=_size(listed), dtype=torch.uint8)
        return cls(path, whole, listed)


def _size(slots: list[Slot]) -> int:
    return max(_ALIGNMENT, sum(_padded(slot.nbytes) for slot in slots))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
