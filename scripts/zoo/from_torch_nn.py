"""Modules of ``torch.nn``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from scripts.zoo.entry import F32, HALF, RELU, Entry
from scripts.zoo.shapes import IMAGE, LINE, ROWS, SEQUENCE, VOLUME

if TYPE_CHECKING:
    from collections.abc import Iterator


def entries() -> Iterator[Entry]:
    """All of them."""
    for name, make, inputs, dtypes in (*_layers(), *_networks(), *_parametrized()):
        yield Entry(f"nn/{name}", make, inputs, dtypes)
    whole = Entry("nn/conv and norm", _conv_and_norm, IMAGE, HALF)
    batch = ({0: torch.export.Dim("batch", min=1, max=8)},)
    yield whole.named(", dynamic batch", dynamic=batch)
    yield whole.named(", in two engines", options={"torch_executed_ops": [RELU]})


def _conv_and_norm() -> nn.Module:
    return Seq(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


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


def _parametrized() -> Iterator[tuple[str, Any, Any, tuple[str, ...]]]:
    """The same of weights that are products, reductions and decompositions of parameters."""
    yield "weight norm of a whole", lambda: _normed(nn.Linear(8, 8), dim=None), ROWS, HALF
    yield (
        "weight norm of a transposed conv",
        lambda: _normed(nn.ConvTranspose2d(4, 6, 3)),
        IMAGE,
        HALF,
    )
    yield "weight norm of a conv3d", lambda: _normed(nn.Conv3d(4, 6, 3)), VOLUME, HALF
    yield (
        "weight norm of a gru",
        lambda: First(_normed(nn.GRU(8, 5, batch_first=True), "weight_hh_l0")),
        SEQUENCE,
        HALF,
    )
    yield (
        "weight norm of a whole, the old one",
        lambda: _old_weight_norm(nn.Linear(8, 7), dim=None),
        ROWS,
        F32,
    )
    yield (
        "spectral norm of a conv, five steps",
        lambda: parametrizations.spectral_norm(nn.Conv1d(4, 7, 3), n_power_iterations=5),
        LINE,
        HALF,
    )
    yield "spectral norm of attention", _spectral_attention, SEQUENCE, F32
    for how in ("matrix_exp", "cayley", "householder"):
        yield f"orthogonal by {how}", lambda how=how: _orthogonal(how), ROWS, F32
        yield (
            f"orthogonal by {how}, plain, of a conv",
            lambda how=how: _orthogonal(how, use_trivialization=False),
            IMAGE,
            F32,
        )
    for name, function in PARAMETRIZATIONS.items():
        yield f"weights by {name}", lambda f=function: _beside(nn.Linear(8, 7), f), ROWS, F32
        yield f"conv by {name}", lambda f=function: _by(nn.Conv2d(4, 6, 3), f), IMAGE, F32
    yield "pruned", lambda: _pruned(nn.Conv2d(4, 6, 3)), IMAGE, HALF


def _matrix(function: Any) -> Any:
    """The same of a weight as a matrix, one row for each output."""
    return lambda w: function(w.reshape(w.shape[0], -1)).reshape(w.shape)


def _gram(function: Any) -> Any:
    """A weight times a function of the products of its rows."""
    return _matrix(lambda w: function(w @ w.t() / w.shape[1] + torch.eye(len(w))) @ w)


PARAMETRIZATIONS: dict[str, Any] = {
    "mv": _matrix(lambda w: w / torch.linalg.vector_norm(torch.mv(w, w.sum(0)))),
    "vdot": lambda w: w * torch.vdot(w.reshape(-1), w.reshape(-1)).rsqrt(),
    "variance": _matrix(lambda w: (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)),
    "softmax": _matrix(lambda w: w.t().softmax(0).t()),
    "sums": _matrix(lambda w: w.cumsum(0) - w.logsumexp(1, keepdim=True)),
    "einsum": _matrix(lambda w: torch.einsum("ij,kj,kl->il", w, w, w)),
    "qr": _matrix(lambda w: torch.linalg.qr(w.t()).Q.t()),
    "svd": _matrix(lambda w: w / torch.linalg.matrix_norm(w, 2)),
    "cholesky": _gram(torch.linalg.cholesky),
    "inverse": _gram(torch.linalg.inv),
    "matrix exponential": _gram(torch.matrix_exp),
    "softplus": nn.functional.softplus,
}


class Function(nn.Module):
    """A parametrization without parameters."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def _by(module: nn.Module, function: Any) -> nn.Module:
    parametrize.register_parametrization(module, "weight", Function(function))
    return module


def _beside(module: nn.Module, function: Any) -> nn.Module:
    """A weight by a function, beside layers that have ordinary ones."""
    return Seq(nn.Linear(8, 8), nn.LayerNorm(8), _by(module, function), nn.ReLU(), nn.Linear(7, 3))


def _normed(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    return parametrizations.weight_norm(module, name, dim)


def _orthogonal(how: str, *, use_trivialization: bool = True) -> nn.Module:
    layer = nn.Linear(8, 7) if use_trivialization else nn.Conv2d(4, 6, 3)
    return parametrizations.orthogonal(
        layer, orthogonal_map=how, use_trivialization=use_trivialization
    )


def _spectral_attention() -> nn.Module:
    whole = SelfAttention(8, 2)
    parametrizations.spectral_norm(whole.attention, "in_proj_weight")
    return whole


def _pruned(module: nn.Module) -> nn.Module:
    prune.ln_structured(module, "weight", 0.4, n=2, dim=0)
    return module


def _old_weight_norm(module: nn.Module, dim: int | None = 0) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(module, dim=dim)


def _symmetric_and_scaled() -> nn.Module:
    module = nn.Linear(8, 8)
    parametrize.register_parametrization(module, "weight", Symmetric())
    parametrize.register_parametrization(module, "weight", Scaled())
    return module


class Seq(nn.Sequential):
    """Modules one after another, the last of which gives one tensor."""


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
