"""Weights of a round: every float moved, domains and ties kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


def fill(model: nn.Module, seed: int, *, outliers: bool = False) -> None:
    """Give a module other weights, in place, so that whatever shares memory goes on sharing it.

    Zeros and ones move, variances stay positive, indices stay in their range. Buffers that no
    state_dict holds stay what they are.

    Args:
        model: The module.
        seed: Of the round.
        outliers: Whether some values are huge, tiny, denormal or -0, and indices are permuted.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in _state(model):
            memory = _written_once(tensor.detach())
            new = _values(name, memory, generator, outliers=outliers)
            memory.copy_(new)


def _state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key not in seen:
            seen.add(key)
            yield name, tensor


def _written_once(tensor: torch.Tensor) -> torch.Tensor:
    """A view on which each element has memory of its own: not that of an expanded tensor."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _values(
    name: str, old: torch.Tensor, generator: torch.Generator, *, outliers: bool
) -> torch.Tensor:
    if old.is_complex():
        parts = [torch.randn(old.shape, generator=generator) for _ in range(2)]
        return torch.complex(*parts).to(old.dtype)
    if not old.is_floating_point():
        return _permuted(old, generator) if outliers else old
    if name.endswith("running_var"):
        spread = 2.0 if outliers else 0.5
        return torch.exp(torch.randn(old.shape, generator=generator) * spread).clamp(1e-4, 1e4)
    start = old.float()
    scale = max(0.02, 0.5 * float(start.std(correction=0)))
    new = start + torch.randn(old.shape, generator=generator) * scale
    return _with_outliers(new, generator) if outliers else new


def _permuted(old: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    order = torch.randperm(old.numel(), generator=generator)
    return old.reshape(-1)[order].reshape(old.shape)


def _with_outliers(new: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """About one value of twenty is scaled by up to 1000, one of fifty is -0 or denormal."""
    chance = torch.rand(new.shape, generator=generator)
    powers = torch.rand(new.shape, generator=generator) * 9 - 6
    new = torch.where(chance < 0.05, new * 10**powers, new)
    new = torch.where(chance > 0.98, torch.tensor(-0.0), new)
    return torch.where(chance > 0.99, torch.tensor(1e-41), new)
