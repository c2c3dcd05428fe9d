"""Weights that are computed from parameters, or taken apart and put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from scripts.zoo.entry import F32, HALF, Entry
from scripts.zoo.shapes import IMAGE, ROWS, SEQUENCE

if TYPE_CHECKING:
    from collections.abc import Iterator


def entries() -> Iterator[Entry]:
    """All of them."""
    yield Entry("nn/folded weights", Folded, ROWS, HALF)
    yield Entry("nn/einsum", Einsum, SEQUENCE, HALF)
    yield Entry("nn/dense mixture of experts", Experts, ROWS, HALF)
    yield Entry("nn/stacked weights", Stacked, ROWS, HALF)
    yield Entry("nn/standardized conv", SqueezeExcite, IMAGE, HALF)
    yield Entry("nn/reparametrized conv", Reparametrized, IMAGE, HALF)
    yield Entry("nn/lora", Lora, ROWS, HALF)
    yield Entry("nn/fourier transform of a weight", Fourier, ROWS, F32)
    yield Entry("nn/chosen and sorted weights", Conditional, ROWS, F32)
    yield Entry("nn/weights written in place", InPlace, ROWS, F32)
    batch = ({0: torch.export.Dim("batch", min=1, max=8)},)
    yield Entry("nn/lora, dynamic batch", Lora, ROWS, HALF, dynamic=batch)


class Folded(nn.Module):
    """Weights that are computed from several parameters while lowering."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4, 8))
        self.gain = nn.Parameter(torch.randn(8))
        self.decay = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = functional.normalize(self.a @ self.b, dim=1) * self.gain[:, None]
        return functional.linear(x, weight, -torch.exp(self.decay).cumsum(0))


class Einsum(nn.Module):
    """Contractions with weights of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 4))
        self.out = nn.Parameter(torch.randn(2, 4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = torch.einsum("bsd,hde->bhse", x, self.weight)
        return torch.einsum("bhse,hed->bsd", heads, self.out)


class Experts(nn.Module):
    """All experts of a dense mixture, stacked and gated."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.up, self.down = (
            nn.Parameter(torch.randn(3, 8, 16)),
            nn.Parameter(torch.randn(3, 16, 8)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = torch.softmax(self.gate(x), -1)
        inner = torch.relu(torch.einsum("bd,edf->bef", x, self.up))
        return (torch.einsum("bef,efd->bed", inner, self.down) * share[..., None]).sum(1)


class Stacked(nn.Module):
    """Weights that are stacked, concatenated and picked while running."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("pick", torch.tensor([2, 0, 1, 0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.stack([layer.weight for layer in self.layers])[self.pick]
        bias = torch.cat([layer.bias for layer in self.layers[:2]])
        return torch.einsum("bd,ned->bne", x, weight).flatten(1) + bias.repeat(2)


class SqueezeExcite(nn.Module):
    """A convolution whose weight is standardized while running, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.gate = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(self.conv.weight, dim=(1, 2, 3), keepdim=True)
        weight = (self.conv.weight - mean) * torch.rsqrt(variance + 1e-5)
        y = functional.conv2d(x, weight, self.conv.bias, padding=1)
        return y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))


class Reparametrized(nn.Module):
    """Branches that add up to one kernel: a 1x1 is padded to 3x3."""

    def __init__(self) -> None:
        super().__init__()
        self.big, self.small = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.big.weight + functional.pad(self.small.weight, [1, 1, 1, 1])
        return functional.conv2d(x, weight, self.big.bias + self.small.bias, padding=1)


class Lora(nn.Module):
    """A linear layer with an adapter that is added to its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8)
        self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.base.weight + 0.5 * (self.up @ self.down), self.base.bias)


class Fourier(nn.Module):
    """Weights that go through a Fourier transform."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(8))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * torch.fft.irfft(torch.fft.rfft(self.filter), n=8)


class Conditional(nn.Module):
    """A weight that is chosen by comparing parameters, element by element."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.where(self.a > self.b, self.a, self.b.clamp(-0.5, 0.5))
        return functional.linear(x, weight.sort(dim=1).values)


class InPlace(nn.Module):
    """A weight that is made by writing into a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.zeros(8, 8, dtype=x.dtype)
        weight[:4, :4] = self.block
        weight[4:, 4:] = self.block.t()
        weight.diagonal().add_(1)
        return functional.linear(x, weight, self.bias)
