"""Modules that compute in several dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from scripts.zoo.entry import F32, Entry
from scripts.zoo.shapes import ROWS

if TYPE_CHECKING:
    from collections.abc import Iterator


def entries() -> Iterator[Entry]:
    """All of them."""
    yield Entry("nn/mixed precision", Mixed, ROWS, F32)
    yield Entry("nn/casts", Cast, ROWS, F32)
    yield Entry("nn/autocast", Autocast, ROWS, F32)


class Mixed(nn.Module):
    """A half of it computes in a lower precision."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8).to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(self.b(torch.relu(self.a(x)).to(torch.bfloat16)).to(x.dtype))


class Cast(nn.Module):
    """Weights that are cast while running."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x.half(), self.weight.half())
        return functional.linear(y.to(x.dtype), self.weight)


class Autocast(nn.Module):
    """A part that runs under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.relu(self.a(x))
        return self.b(y.float())
