"""The same elements in layouts that raw copies of memory get wrong, and values that do not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from refitkit.model import Slot

_NEGATABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64}


def _offset(value: torch.Tensor) -> torch.Tensor:
    room = torch.zeros(value.numel() + 3, dtype=value.dtype, device=value.device)
    return room[3:].view(value.shape).copy_(value)


def _strided(value: torch.Tensor) -> torch.Tensor:
    room = torch.zeros((*value.shape, 2), dtype=value.dtype, device=value.device)
    return room[..., 0].copy_(value)


def _transposed(value: torch.Tensor) -> torch.Tensor | None:
    return value.mT.contiguous().mT if value.dim() > 1 else None


def _expanded(value: torch.Tensor) -> torch.Tensor | None:
    return value.reshape(-1)[-1:].clone()[0].expand(value.shape) if value.numel() else None


def _with_gradients(value: torch.Tensor) -> torch.Tensor | None:
    if not (value.is_floating_point() or value.is_complex()):
        return None
    return value.detach().clone().requires_grad_()


def _conjugate(value: torch.Tensor) -> torch.Tensor | None:
    return value.conj().resolve_conj().conj() if value.is_complex() else None


def _negative(value: torch.Tensor) -> torch.Tensor | None:
    return torch._neg_view(-value) if value.dtype in _NEGATABLE else None  # noqa: SLF001


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "views with an offset": _offset,
    "every second element of other tensors": _strided,
    "transposed views": _transposed,
    "one element each, expanded": _expanded,
    "leaves that require grad": _with_gradients,
    "conjugates that were put off": _conjugate,
    "negations that were put off": _negative,
}
"""A value in another layout, by words for it; None where the value has no such layout.

All but the expanded one, whose elements are equal, have the elements of the value.
"""


def of_other_dtypes(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """A value cast to dtypes that are not its own: wider, narrower and of another kind."""
    for dtype in (torch.float32, torch.float16, torch.float64, torch.int32, torch.uint8):
        if dtype is not value.dtype:
            yield (value.real if value.is_complex() else value).to(dtype)


def of_other_shapes(slot: Slot, value: torch.Tensor) -> Iterator[torch.Tensor]:
    """A value with other numbers of elements, and with its own in another shape.

    Where the engine knows no shape of the slot, only the number of elements counts.
    """
    flat = value.reshape(-1)
    yield torch.cat([flat, flat, flat.new_zeros(1)])
    if slot.count > 1:
        yield flat[:1].clone()  # which copy_ would broadcast
        yield flat[:-1].clone()
    if slot.shape is not None and value.dim() > 1 and value.mT.shape != value.shape:
        yield value.mT.contiguous()
    if slot.shape is not None and value.dim() > 0:
        yield value.unsqueeze(0).clone()
