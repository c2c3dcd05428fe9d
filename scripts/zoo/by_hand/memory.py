"""Parameters that share memory, or lie in it in other ways than usual."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from scripts.zoo.entry import F32, HALF, RELU, Entry
from scripts.zoo.shapes import IMAGE, ROWS, SEQUENCE, TOKENS, VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Iterator


def entries() -> Iterator[Entry]:
    """All of them."""
    yield Entry("nn/channels last", ChannelsLast, IMAGE, HALF)
    yield Entry("nn/expanded parameters", Expanded, ROWS, HALF)
    yield Entry("nn/flat parameter", Flat, ROWS, HALF)
    yield Entry("nn/modules on one storage", FlatModules, ROWS, HALF)
    yield Entry("nn/a parameter inside another", Overlapping, ROWS, HALF)
    yield Entry("nn/chunked qkv", ChunkedQkv, SEQUENCE, HALF)
    yield Entry("nn/scalars and nothing", Scalars, ROWS, HALF)
    yield Entry("nn/unused parameters", Unused, ROWS, F32)
    batch = ({0: torch.export.Dim("batch", min=1, max=8)},)
    yield Entry("nn/flat parameter, dynamic batch", Flat, ROWS, HALF, dynamic=batch)
    yield Entry("nn/tied weights", Tied, TOKENS, HALF, tokens=VOCABULARY)
    two = {"torch_executed_ops": [RELU]}
    yield Entry(
        "nn/tied weights in two engines", Tied, TOKENS, HALF, options=two, tokens=VOCABULARY
    )
    yield Entry("nn/one weight in three engines", Offload, ROWS, HALF, options=two)


class Tied(nn.Module):
    """One weight under three names, once transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.inner = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.inner.weight
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.again(torch.relu(self.inner(self.embed(tokens))))
        return self.head(x @ self.inner.weight.t())


class Offload(nn.Module):
    """Equal weights, and one that is used in two engines."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.load_state_dict(self.a.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(torch.relu(self.b(torch.relu(self.a(x)))))


class ChannelsLast(nn.Module):
    """Weights whose memory lies in another order."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Sequential(
            nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        )
        self.layers = layers.to(memory_format=torch.channels_last)
        self.weight = nn.Parameter(torch.randn(4, 8).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.layers(x).mean((2, 3)), self.weight)


class Expanded(nn.Module):
    """Parameters whose elements share memory, and some that are expanded while running."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.rows = nn.Parameter(torch.randn(1, 8).expand(2, 8))
        self.one = nn.Parameter(torch.randn(1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.rows * self.one.expand(2, -1)


class Flat(nn.Module):
    """All weights are views of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(8 * 8 + 8 + 4 * 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.linear(x, self.flat[:64].view(8, 8), self.flat[64:72])
        return functional.linear(torch.relu(x), self.flat[72:].view(4, 8))


class FlatModules(nn.Module):
    """Parameters of modules that are views of one storage, and each other's neighbours."""

    def __init__(self) -> None:
        super().__init__()
        storage = torch.randn(2 * 64)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.a.weight = nn.Parameter(storage[:64].view(8, 8))
        self.b.weight = nn.Parameter(storage[64:].view(8, 8).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


class Overlapping(nn.Module):
    """A parameter that is a part of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Linear(8, 12)
        self.part = nn.Parameter(self.whole.weight.detach()[4:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.whole(x)[:, :8] + functional.linear(x, self.part)


class ChunkedQkv(nn.Module):
    """One weight that is cut into three before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 8))
        self.bias = nn.Parameter(torch.randn(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.weight.chunk(3)
        q, k, v = (
            functional.linear(x, w, b) for w, b in zip(weights, self.bias.split(8), strict=True)
        )
        heads = (one.unflatten(-1, (2, 4)).transpose(1, 2) for one in (q, k, v))
        return functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class Scalars(nn.Module):
    """Parameters without dimensions and without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(0.5))
        self.nothing = nn.Parameter(torch.zeros(2, 0))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([self.linear(x) * self.scale, self.nothing], 1)
        return y + self.shift * torch.sigmoid(self.scale)


class Unused(nn.Module):
    """Parameters that nothing reads, or only their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.idle = nn.Linear(8, 8), nn.Linear(4, 4)
        self.shape_only = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + torch.ones_like(self.shape_only).sum()
