"""Tensors that no product takes as its weight: rotations, tables, indices, constants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from scripts.zoo.entry import F32, HALF, Entry
from scripts.zoo.shapes import ROWS, SEQUENCE, TOKENS, VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Iterator


def entries() -> Iterator[Entry]:
    """All of them."""
    yield Entry("nn/complex rope, persistent", lambda: ComplexRope(persistent=True), SEQUENCE, F32)
    yield Entry("nn/complex rope", lambda: ComplexRope(persistent=False), SEQUENCE, F32)
    yield Entry("nn/real rope", RealRope, SEQUENCE, HALF)
    yield Entry("nn/lifted constants", Lifted, ROWS, HALF)
    yield Entry("nn/relative position bias", WindowBias, SEQUENCE, HALF)
    yield Entry("nn/embeddings", Embeddings, TOKENS, HALF, tokens=VOCABULARY)
    yield Entry("nn/embedding bag", Bag, TOKENS, tokens=VOCABULARY)


class ComplexRope(nn.Module):
    """Rotations as complex buffers, one that is kept and one that is not."""

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        angles = torch.outer(torch.arange(5.0), 10 ** -(torch.arange(4) / 4))
        turns = torch.polar(torch.ones_like(angles), angles)
        self.register_buffer("turns", turns, persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (self._turned(one(x)) for one in (self.q, self.k))
        return q @ k.transpose(1, 2)

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns).flatten(-2)


class RealRope(nn.Module):
    """Rotations from an inverse frequency, folded while lowering."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.register_buffer("frequency", 10 ** -(torch.arange(4) / 4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(torch.arange(5, dtype=torch.float32), self.frequency.float())
        both = torch.cat([angles, angles], -1)
        y = self.q(x)
        turned = torch.cat([-y[..., 4:], y[..., :4]], -1)
        return y * both.cos().to(y.dtype) + turned * both.sin().to(y.dtype)


class Lifted(nn.Module):
    """Tensors that are no state: lifted constants and literals, and buffers that are not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.plain = torch.linspace(0, 1, 8)
        self.register_buffer("shift", torch.arange(8) / 8, persistent=False)
        self.register_buffer("order", torch.tensor([3, 1, 2, 0, 7, 6, 5, 4]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)[:, self.order] + self.shift.to(x.dtype)
        mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 2.0]).to(x.dtype)
        return y * mask + self.plain.to(x.dtype) + torch.arange(8, dtype=x.dtype)


class WindowBias(nn.Module):
    """A table that is read by an index which is a buffer: relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 2))
        self.register_buffer("index", torch.arange(25).reshape(5, 5) % 9)
        self.qk = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qk(x).unflatten(-1, (2, 4)).transpose(1, 2)
        bias = self.table[self.index.view(-1)].view(5, 5, 2).permute(2, 0, 1)
        return torch.softmax(heads @ heads.transpose(2, 3) + bias[None], -1)


class Embeddings(nn.Module):
    """Tables: one with a padding row, one that is sliced, one that is added whole."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 8, padding_idx=0)
        self.places = nn.Embedding(20, 8)
        self.kinds = nn.Parameter(torch.randn(1, 12, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = self.places(torch.arange(tokens.shape[1]))
        return self.norm(self.words(tokens) + places + self.kinds)


class Bag(nn.Module):
    """Sums of rows of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(16, 8, mode="sum")
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.bag(tokens))
