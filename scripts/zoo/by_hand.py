"""Modules written to be hard for recipes, and those of ``torch.nn``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

from scripts.zoo.entry import F32, HALF, RELU, Entry

if TYPE_CHECKING:
    from collections.abc import Iterator

LINE, IMAGE, VOLUME, ROWS = ((2, 4, 16),), ((2, 4, 8, 8),), ((1, 4, 4, 8, 8),), ((2, 8),)
SEQUENCE = ((2, 5, 8),)


class Seq(nn.Sequential):
    """Modules one after another, the last of which gives one tensor."""


def _layers() -> Iterator[tuple[str, Any, Any, tuple[str, ...]]]:
    """Name, maker, inputs, dtypes of what is one or two modules of ``torch.nn``."""
    yield "conv1d", lambda: Seq(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8)), LINE, HALF
    yield "conv2d", lambda: Seq(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)), IMAGE, HALF
    yield "conv3d", lambda: Seq(nn.Conv3d(4, 8, 3), nn.BatchNorm3d(8)), VOLUME, F32
    yield "grouped conv", lambda: Seq(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU()), IMAGE, HALF
    yield (
        "depthwise conv",
        lambda: Seq(nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8)),
        IMAGE,
        HALF,
    )
    yield "dilated conv", lambda: Seq(nn.Conv2d(4, 8, 3, dilation=2), nn.ReLU()), IMAGE, HALF
    yield (
        "conv, reflected padding",
        lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
        IMAGE,
        HALF,
    )
    yield "transposed conv1d", lambda: nn.ConvTranspose1d(4, 8, 4, stride=2), LINE, HALF
    yield (
        "transposed conv2d",
        lambda: Seq(nn.ConvTranspose2d(4, 8, 4, stride=2), nn.BatchNorm2d(8)),
        IMAGE,
        HALF,
    )
    yield (
        "transposed conv2d, grouped",
        lambda: nn.ConvTranspose2d(4, 8, 3, groups=2, bias=False),
        IMAGE,
        F32,
    )
    yield "transposed conv3d", lambda: nn.ConvTranspose3d(4, 8, 3), VOLUME, F32
    yield (
        "batch norm with its own eps",
        lambda: Seq(nn.Linear(8, 8), nn.BatchNorm1d(8, eps=0.3)),
        ROWS,
        HALF,
    )
    yield (
        "batch norm without weights",
        lambda: Seq(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False)),
        ROWS,
        F32,
    )
    yield (
        "batch norm with momentum",
        lambda: Seq(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=0.5)),
        IMAGE,
        F32,
    )
    yield "batch norm alone", lambda: nn.BatchNorm2d(4), IMAGE, F32
    yield "group norm", lambda: nn.GroupNorm(2, 4), IMAGE, HALF
    yield "instance norm", lambda: nn.InstanceNorm2d(4, affine=True), IMAGE, HALF
    yield (
        "instance norm with statistics",
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        IMAGE,
        F32,
    )
    yield "layer norm", lambda: Seq(nn.Linear(8, 8), nn.LayerNorm(8)), ROWS, HALF
    yield (
        "layer norm without weights",
        lambda: Seq(nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=False)),
        ROWS,
        F32,
    )
    yield "rms norm", lambda: Seq(nn.Linear(8, 8), nn.RMSNorm(8)), ROWS, HALF
    yield (
        "local response norm",
        lambda: Seq(nn.Conv2d(4, 4, 1), nn.LocalResponseNorm(2)),
        IMAGE,
        F32,
    )
    yield "prelu", lambda: Seq(nn.Linear(8, 8), nn.PReLU(8)), ROWS, HALF
    yield "bilinear", lambda: Two(nn.Bilinear(8, 8, 4)), ROWS, F32


def _networks() -> Iterator[tuple[str, Any, Any, tuple[str, ...]]]:
    """The same of what is more than a layer, and of what changes weights."""
    yield "lstm", lambda: First(nn.LSTM(8, 8, num_layers=2, batch_first=True)), SEQUENCE, HALF
    yield (
        "lstm, both directions",
        lambda: First(nn.LSTM(8, 8, bidirectional=True, proj_size=4)),
        SEQUENCE,
        HALF,
    )
    yield "gru", lambda: First(nn.GRU(8, 8, num_layers=2, batch_first=True)), SEQUENCE, HALF
    yield "rnn", lambda: First(nn.RNN(8, 8)), SEQUENCE, HALF
    yield "gru cell", lambda: nn.GRUCell(8, 8), ROWS, HALF
    yield "multihead attention", lambda: SelfAttention(8, 2), SEQUENCE, HALF
    yield (
        "multihead attention, other keys",
        lambda: SelfAttention(8, 2, kdim=8, vdim=8, add_bias_kv=True),
        SEQUENCE,
        F32,
    )
    yield (
        "transformer encoder",
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        SEQUENCE,
        HALF,
    )
    yield (
        "transformer decoder",
        lambda: Two(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)),
        SEQUENCE,
        HALF,
    )
    yield (
        "transformer",
        lambda: Two(nn.Transformer(8, 2, 1, 1, 16, batch_first=True)),
        SEQUENCE,
        F32,
    )
    yield "weight norm", lambda: parametrizations.weight_norm(nn.Linear(8, 8)), ROWS, HALF
    yield (
        "weight norm of a conv",
        lambda: parametrizations.weight_norm(nn.Conv2d(4, 8, 3), dim=1),
        IMAGE,
        HALF,
    )
    yield "weight norm, the old one", lambda: _old_weight_norm(nn.Conv1d(4, 8, 3)), LINE, F32
    yield "spectral norm", lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), ROWS, HALF
    yield (
        "spectral norm, the old one",
        lambda: nn.utils.spectral_norm(nn.Conv2d(4, 8, 3)),
        IMAGE,
        F32,
    )
    yield "orthogonal", lambda: parametrizations.orthogonal(nn.Linear(8, 8)), ROWS, F32
    yield "two parametrizations", _symmetric_and_scaled, ROWS, HALF
    yield (
        "pixel shuffle",
        lambda: Seq(nn.Conv2d(4, 16, 3), nn.PixelShuffle(2), nn.Conv2d(4, 2, 1)),
        IMAGE,
        HALF,
    )


def _old_weight_norm(module: nn.Module) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(module)


class First(nn.Module):
    """A module's first result."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)[0]


class Two(nn.Module):
    """A module that takes two inputs, given one twice."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x, torch.tanh(x))


class SelfAttention(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(*sizes, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


class Symmetric(nn.Module):
    """A weight that is made symmetric."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


class Scaled(nn.Module):
    """A weight times a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale.exp()


def _symmetric_and_scaled() -> nn.Module:
    module = nn.Linear(8, 8)
    parametrize.register_parametrization(module, "weight", Symmetric())
    parametrize.register_parametrization(module, "weight", Scaled())
    return module


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


class Offload(nn.Module):
    """Equal weights, and one that is used in two engines."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.load_state_dict(self.a.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(torch.relu(self.b(torch.relu(self.a(x)))))


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


class Autocast(nn.Module):
    """A part that runs under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.relu(self.a(x))
        return self.b(y.float())


class Unused(nn.Module):
    """Parameters that nothing reads, or only their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.idle = nn.Linear(8, 8), nn.Linear(4, 4)
        self.shape_only = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + torch.ones_like(self.shape_only).sum()


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


def _special() -> Iterator[tuple[str, Any, Any, tuple[str, ...]]]:
    yield "channels last", ChannelsLast, IMAGE, HALF
    yield "complex rope, persistent", lambda: ComplexRope(persistent=True), SEQUENCE, F32
    yield "complex rope", lambda: ComplexRope(persistent=False), SEQUENCE, F32
    yield "real rope", RealRope, SEQUENCE, HALF
    yield "expanded parameters", Expanded, ROWS, HALF
    yield "flat parameter", Flat, ROWS, HALF
    yield "modules on one storage", FlatModules, ROWS, HALF
    yield "a parameter inside another", Overlapping, ROWS, HALF
    yield "chunked qkv", ChunkedQkv, SEQUENCE, HALF
    yield "scalars and nothing", Scalars, ROWS, HALF
    yield "lifted constants", Lifted, ROWS, HALF
    yield "folded weights", Folded, ROWS, HALF
    yield "einsum", Einsum, SEQUENCE, HALF
    yield "mixed precision", Mixed, ROWS, F32
    yield "casts", Cast, ROWS, F32
    yield "autocast", Autocast, ROWS, F32
    yield "dense mixture of experts", Experts, ROWS, HALF
    yield "stacked weights", Stacked, ROWS, HALF
    yield "relative position bias", WindowBias, SEQUENCE, HALF
    yield "standardized conv", SqueezeExcite, IMAGE, HALF
    yield "reparametrized conv", Reparametrized, IMAGE, HALF
    yield "lora", Lora, ROWS, HALF
    yield "unused parameters", Unused, ROWS, F32
    yield "fourier transform of a weight", Fourier, ROWS, F32
    yield "chosen and sorted weights", Conditional, ROWS, F32
    yield "weights written in place", InPlace, ROWS, F32


def entries() -> Iterator[Entry]:
    """All of them."""
    for name, make, inputs, dtypes in (*_layers(), *_networks(), *_special()):
        yield Entry(f"nn/{name}", make, inputs, dtypes)
    tokens = ((2, 12),)
    yield Entry("nn/tied weights", Tied, tokens, HALF, tokens=16)
    yield Entry("nn/embeddings", Embeddings, tokens, HALF, tokens=16)
    yield Entry("nn/embedding bag", Bag, tokens, tokens=16)
    two = {"torch_executed_ops": [RELU]}
    yield Entry("nn/one weight in three engines", Offload, ROWS, HALF, options=two)
    yield Entry("nn/tied weights in two engines", Tied, tokens, HALF, options=two, tokens=16)
    batch = ({0: torch.export.Dim("batch", min=1, max=8)},)
    yield Entry("nn/flat parameter, dynamic batch", Flat, ROWS, HALF, dynamic=batch)
    yield Entry("nn/lora, dynamic batch", Lora, ROWS, HALF, dynamic=batch)
    whole = lambda: Seq(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))  # noqa: E731
    yield Entry("nn/conv and norm, dynamic batch", whole, IMAGE, HALF, dynamic=batch)
    yield Entry("nn/conv and norm, in two engines", whole, IMAGE, HALF, options=two)
