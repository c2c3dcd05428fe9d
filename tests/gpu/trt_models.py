"""Small models with random weights, one for each thing that has gone wrong somewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

Inputs = tuple[torch.Tensor, ...]


class Convolutions(nn.Module):
    """Convolutions, BatchNorm with an eps of its own and without affine, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12, eps=0.05)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.plain = nn.BatchNorm2d(12, affine=False)
        self.fc = nn.Linear(12 * 8 * 8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = functional.max_pool2d(self.norm(self.conv1(x).relu()), 2)
        h = functional.max_pool2d(self.plain(self.conv2(h)).relu(), 2)
        out: torch.Tensor = self.fc(h.flatten(1))
        return out


class Words(nn.Module):
    """A transformer's encoder on tokens, with the embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(32, eps=1e-3), nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embed(tokens)
        n = self.norm1(h)
        scores = (self.q(n) @ self.k(n).transpose(-1, -2)) / 32**0.5
        h = h + self.o(scores.softmax(-1) @ self.v(n))
        h = h + self.down(functional.gelu(self.up(self.norm2(h))))
        out: torch.Tensor = self.head(h)
        return out


class Several(nn.Module):
    """Several outputs, one of them from a part of the weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        a = self.a(x).relu()
        b = self.b(a)
        return a, b, b.sum(-1)


class Twins(nn.Module):
    """Two layers that are tied, and two that hold equal values without being tied."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.c, self.d = nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.d.weight.copy_(self.c.weight)
            self.d.bias.copy_(self.c.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.d(self.c(self.b(self.a(x).relu()).relu()).sin())
        return out


class Fallback(nn.Module):
    """A cumulative sum, which a refittable engine leaves to torch, between two engines."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.fc = nn.Linear(6 * 8 * 8, 10)
        self.scale = nn.Parameter(torch.ones(10))
        self.last = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(self.conv(x).relu().flatten(1))
        out: torch.Tensor = self.last(torch.cumsum(h * self.scale, 1) ** 2)
        return out


def randomized(kind: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model in evaluation mode on the GPU, all of whose state is random."""
    torch.manual_seed(seed)
    model = kind().eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if "norm" in name or name == "scale":
                parameter.uniform_(0.5, 1.5)
    return model.cuda()


def inputs_of(kind: Callable[[], nn.Module]) -> Inputs:
    """Inputs for a model of this kind."""
    torch.manual_seed(99)
    if kind is Words:
        return (torch.randint(0, 64, (1, 14), device="cuda", dtype=torch.int32),)
    if kind is Convolutions:
        return (torch.randn(1, 3, 32, 32, device="cuda"),)
    if kind is Fallback:
        return (torch.randn(1, 3, 8, 8, device="cuda"),)
    return (torch.randn(4, 16, device="cuda"),)
