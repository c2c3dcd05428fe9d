"""Bits of tensors, found without the code under test, and values for slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refitkit.protocols import SlotValue

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from refitkit.model import Slot

Bits = tuple[str, bytes]
"""Dtype, and all elements in logical order."""

_LARGEST = 100  # integers stay below it, so that every integer type has them


def dtype_of(name: str) -> torch.dtype:
    """A dtype by torch's name, without the ``torch.``."""
    found: torch.dtype = getattr(torch, name)
    return found


def bits(tensor: torch.Tensor) -> Bits:
    """Dtype and elements of a tensor, whatever its layout and device.

    -0 is not 0, and a NaN is itself.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    raw = plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return str(plain.dtype).removeprefix("torch."), raw


def snapshot(held: Mapping[str, torch.Tensor]) -> dict[str, Bits]:
    """The bits of everything, by name: what later changes cannot touch."""
    return {name: bits(tensor) for name, tensor in held.items()}


def differing(found: Mapping[str, Bits], wanted: Mapping[str, Bits]) -> list[str]:
    """Names whose bits differ, or that only one of both has."""
    names = sorted(found.keys() | wanted.keys())
    return [name for name in names if found.get(name) != wanted.get(name)]


def random_values(slots: Iterable[Slot], seed: int) -> dict[str, torch.Tensor]:
    """A value for each slot: finite, contiguous, on the CPU, other ones for other seeds.

    Floats have a zero of either sign among them, so that what compares values instead of bits
    shows.
    """
    generator = torch.Generator().manual_seed(seed)
    return {slot.name: _random(slot, seed, generator) for slot in slots}


def _random(slot: Slot, seed: int, generator: torch.Generator) -> torch.Tensor:
    dtype, shape = dtype_of(slot.dtype), slot.shape if slot.shape is not None else (slot.count,)
    if dtype is torch.bool:
        ones = torch.arange(slot.count) + seed
        return (ones % 2 == 0).reshape(shape)
    if dtype.is_complex:
        parts = torch.randn((*shape, 2), generator=generator, dtype=torch.float64)
        return torch.view_as_complex(parts).to(dtype)
    if dtype.is_floating_point:
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64) / 4 + 1
        drawn *= 2.0 ** (seed % 5)  # so far apart that no type rounds two seeds to one value
        if slot.count > 1 and dtype is not torch.float8_e8m0fnu:  # which has no zero
            drawn.view(-1)[0] = -0.0 if seed % 2 else 0.0
        return drawn.to(dtype)
    drawn = torch.randint(_LARGEST // 2, shape, generator=generator)
    return ((drawn + seed) % _LARGEST).to(dtype)


def slot_values(slots: Mapping[str, Slot], values: Mapping[str, torch.Tensor]) -> list[SlotValue]:
    """Values as a strategy gives them: promises to load tensors."""
    return [given(slots[name], value) for name, value in values.items()]


def given(slot: Slot, value: torch.Tensor) -> SlotValue:
    """One value as a strategy gives it."""
    return SlotValue(slot, "conformance", (slot.name,), lambda: value)


def copies(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values in memory of their own."""
    return {name: value.detach().clone() for name, value in values.items()}


def shown(names: Sequence[str]) -> str:
    """Some names, for a message."""
    most = 3
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
