"""Large entries of sources looked at piece by piece, where the source can give them so.

A whole tensor that is read from a file is new memory. Its pieces are not, and they are still in the
cache of the processor when they are looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import SourceError
from refitkit.program.bits import same_bits
from refitkit.protocols import GivesPieces

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from refitkit.protocols import SlotValue, WeightSource

LARGE = 1 << 22
"""Bytes from which on pieces are asked for: smaller tensors are no matter."""


def pieces_of(source: WeightSource, fqn: str) -> Iterator[torch.Tensor] | None:
    """An entry in pieces; None where the source gives it as a whole only."""
    return source.pieces(fqn) if isinstance(source, GivesPieces) else None


def write_value(into: torch.Tensor, value: SlotValue) -> bool:
    """Write a value piece by piece, if it comes so and there is a place for it in one run.

    Args:
        into: A tensor of the slot's dtype and shape.
        value: The value.

    Returns:
        Whether it was written.

    Raises:
        SourceError: The pieces are not what the slot takes, or cannot be read.
    """
    pieces = _pieces_for(into, value)
    if pieces is None:
        return False
    for place, piece in _side_by_side(into, pieces, value.slot.name):
        place.copy_(piece)
    return True


def is_value(found: torch.Tensor, value: SlotValue) -> bool:
    """Whether a tensor is known to have the bits of a value that comes in pieces.

    Raises:
        SourceError: The pieces are not what the slot takes, or cannot be read.
    """
    pieces = _pieces_for(found, value)
    return pieces is not None and all(
        same_bits(place, piece) for place, piece in _side_by_side(found, pieces, value.slot.name)
    )


def _pieces_for(tensor: torch.Tensor, value: SlotValue) -> Iterator[torch.Tensor] | None:
    if value.pieces is None or tensor.nbytes < LARGE or not tensor.is_contiguous():
        return None
    return value.pieces()


def _side_by_side(
    tensor: torch.Tensor, pieces: Iterable[torch.Tensor], name: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    flat, done = tensor.view(-1), 0
    for piece in pieces:
        end = done + piece.numel()
        if piece.dtype != flat.dtype or end > flat.numel():
            raise SourceError(f"{name!r} takes {flat.numel()} of {flat.dtype}, not what was read.")
        yield flat[done:end], piece
        done = end
    if done != flat.numel():
        raise SourceError(f"{name!r} takes {flat.numel()} elements, and {done} were read.")
