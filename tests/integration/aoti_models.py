"""The models that the integration tests compile, each with what it is good for.

``CASES`` names them. Weights depend on the seed alone, so every process can make the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable


class Small(nn.Module):
    """Two linear layers and a buffer: 16 features in, 8 out."""

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.a = nn.Linear(16, hidden)
        self.b = nn.Linear(hidden, 8)
        self.register_buffer("scale", torch.rand(8) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x))) * self.scale


class Convnet(nn.Module):
    """Convolutions with batch norm; the first weight is stored channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8, eps=1e-3)
        self.body = nn.Conv2d(8, 8, 3, stride=2, bias=False, groups=2)
        self.norm2 = nn.BatchNorm2d(8, affine=False)
        self.head = nn.Linear(8, 5)
        self.stem.weight.data = self.stem.weight.data.contiguous(memory_format=torch.channels_last)
        for norm in (self.norm, self.norm2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.norm2(self.body(x)))
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """An encoder whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(16, 32, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.encoder(self.embed(tokens)))


class Mixed(nn.Module):
    """Every kind of state: parameters, buffers of both kinds, a counter, a constant, a literal."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 10)
        self.b = nn.Linear(10, 4)
        self.register_buffer("kept", torch.randn(4))
        self.register_buffer("derived", torch.linspace(0.5, 1.5, 10), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.count.add_(1)
        y = torch.relu(self.a(x)) * self.derived
        y = self.b(y) + self.kept + torch.tensor([1.5, -2.0, 0.25, 3.0])
        return y * 0.5, self.count.clone()


class Batch(nn.Module):
    """For any number of rows; the names of ``Small``, in other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 40)
        self.b = nn.Linear(40, 8)
        self.register_buffer("scale", torch.rand(8) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.b(torch.relu(self.a(x))), -1) * self.scale


class Storage(nn.Module):
    """Weights in every awkward place: views of one flat tensor, expanded, transposed, empty."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(6 * 5 + 6)
        self.weight = nn.Parameter(flat[:30].view(6, 5))
        self.bias = nn.Parameter(flat[30:])
        self.turned = nn.Parameter(torch.randn(6, 3).t())
        self.gain = nn.Parameter(torch.randn(1).expand(6))
        self.sliced = nn.Parameter(torch.randn(6, 2)[:, 0])
        self.none = nn.Parameter(torch.empty(0, 6))
        self.one = nn.Parameter(torch.randn(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.weight, self.bias) * self.gain + self.sliced
        y = torch.cat([y, self.none.expand(0, 6)])
        return nn.functional.linear(y, self.turned) * self.one


class Nested(nn.Module):
    """Several inputs, some by keyword, and outputs inside outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(5, 4)
        self.right = nn.Linear(3, 4)

    def forward(
        self, x: torch.Tensor, *, other: torch.Tensor, parts: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        y = self.left(x) + self.right(other)
        more = parts["p"] * y, [y.argmax(-1), parts["q"] - 1, self.left.bias]
        return {"sum": y, "more": more}


class Foldable(nn.Module):
    """Weights of one element or of one value, in expressions that compilers like to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.ones = nn.Parameter(torch.ones(6))
        self.zeros = nn.Parameter(torch.zeros(6, 6))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("single", torch.tensor([2.0]))
        self.register_buffer("number", torch.tensor(3))
        self.register_buffer("mask", torch.ones(6, dtype=torch.bool))
        if torch.initial_seed():  # seed 0 is the model as it is made
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.normal_()
            self.single.uniform_(1.0, 2.0)
            self.number.fill_(torch.initial_seed() + 3)
            self.mask[::2] = False

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        chosen = torch.where(self.mask, self.ones, self.ones * 0 - 1.0)
        factor = (self.single**2 + self.scale.exp()) * self.number
        sign = torch.where(self.scale > 0, x, -x)
        places = torch.arange(6) * self.number % 6
        return (
            x @ torch.softmax(self.zeros, -1) * chosen / factor + self.scale,
            sign * self.ones.index_select(0, places),
            torch.eye(6) * self.scale * self.number,
            self.ones.softmax(0) * self.single,
        )


class Wide(nn.Module):
    """Weights of 16 MB, so that a leaked set of them shows, and a refit of them takes a while."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x) * 3)
        return x


@dataclass(frozen=True)
class Case:
    """One model: how to build it, and what to call it with."""

    build: Callable[[], nn.Module]
    args: Callable[[], tuple[Any, ...]]
    kwargs: Callable[[], dict[str, Any]] = field(default=dict)
    dynamic: Any = None

    def model(self, seed: int) -> nn.Module:
        """The model in eval mode with the weights of a seed."""
        torch.manual_seed(seed)
        return self.build().eval()

    def expected(self, model: nn.Module) -> Any:
        """What a model answers, as eager torch computes it. A model that counts calls counts it."""
        with torch.no_grad():
            return model(*self.args(), **self.kwargs())

    def inputs(self) -> Any:
        """The inputs as ``refit`` takes them."""
        return (self.args(), self.kwargs()) if self.kwargs() else self.args()

    def program(self, seed: int = 0) -> torch.export.ExportedProgram:
        """The model with the weights of a seed, exported."""
        return torch.export.export(
            self.model(seed), self.args(), self.kwargs(), dynamic_shapes=self.dynamic
        )


def _randn(*shape: int, seed: int = 99, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def _tokens() -> torch.Tensor:
    return torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(7))


CASES: dict[str, Case] = {
    "small": Case(Small, lambda: (_randn(3, 16),)),
    "convnet": Case(Convnet, lambda: (_randn(2, 4, 9, 9),)),
    "transformer": Case(Transformer, lambda: (_tokens(),)),
    "mixed": Case(Mixed, lambda: (_randn(3, 6),)),
    "batch": Case(
        Batch, lambda: (_randn(3, 16),), dynamic=({0: torch.export.Dim("rows", min=1, max=64)},)
    ),
    "float16": Case(lambda: Small().half(), lambda: (_randn(3, 16, dtype=torch.float16),)),
    "bfloat16": Case(lambda: Small().bfloat16(), lambda: (_randn(3, 16, dtype=torch.bfloat16),)),
    "storage": Case(Storage, lambda: (_randn(4, 5),)),
    "foldable": Case(Foldable, lambda: (_randn(3, 6),)),
    "wide": Case(Wide, lambda: (_randn(1, 512),)),
    "nested": Case(
        Nested,
        lambda: (_randn(2, 5),),
        lambda: {
            "other": _randn(2, 3, seed=98),
            "parts": {"p": _randn(4, seed=97), "q": _randn(2, 2, seed=96)},
        },
    ),
}
