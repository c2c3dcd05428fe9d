"""Models with random weights, as programs, for networks of TensorRT-RTX. Nothing is downloaded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable


class WithTransposed(nn.Module):
    """An encoder and a decoder; the decoder's weights are transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8, eps=1e-3)
        self.up = nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up2(self.up(torch.relu(self.norm(self.down(x)))))


class Recurrent(nn.Module):
    """An LSTM of two layers with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


class Odd(nn.Module):
    """What name maps get wrong: equal weights, tied ones, transposed ones, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.a.weight
        self.norm = nn.BatchNorm1d(8, affine=False, eps=1e-2)
        self.scale = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("order", torch.tensor([3, 1, 2, 0, 7, 6, 5, 4]))
        self.register_buffer("shift", torch.arange(8) / 8, persistent=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.tied(torch.relu(self.a(x))) @ self.scale.t()
        z = self.norm(self.b(y))[:, self.order] + self.shift
        return {"y": y, "z": torch.cat([z, torch.ones(2, 1, dtype=z.dtype)], 1)}


class Scattered(nn.Module):
    """Weights whose memory is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.weight = nn.Parameter(torch.randn(8, 5).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.conv(x).mean((2, 3)), self.weight)


def torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision as library

        return getattr(library.models, name)(weights=None)

    return make


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        attn_implementation="eager",
    )
    return Outputs(BertModel(config), "last_hidden_state", "pooler_output")


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        use_cache=False,
        attn_implementation="eager",
    )
    return Outputs(LlamaForCausalLM(config), "logits")


class Outputs(nn.Module):
    """A model of transformers with plain tensors as results."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = (
            self.model(tokens, use_cache=False) if "logits" in self.names else self.model(tokens)
        )
        return tuple(getattr(found, name) for name in self.names)


IMAGE = ((1, 3, 64, 64),)


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and how it is compiled."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = IMAGE
    dtype: torch.dtype = torch.float32
    tokens: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    engines: int = 1

    def inputs(self) -> tuple[torch.Tensor, ...]:
        if self.tokens:
            return tuple(torch.arange(torch.Size(s).numel()).reshape(s) % 99 for s in self.shapes)
        return tuple(torch.randn(shape, dtype=self.dtype) for shape in self.shapes)

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = self.make().eval()
        for name, value in model.named_buffers():
            if name.endswith("running_var"):
                value.copy_(torch.rand_like(value) + 0.5)
            elif name.endswith("running_mean"):
                value.copy_(torch.randn_like(value) * 0.1)
        with torch.no_grad():
            for value in model.parameters():  # no zeros and ones: what folds shows
                value.add_(torch.randn_like(value) * 0.02)
        return model.to(self.dtype)

    def program(self, seed: int) -> torch.export.ExportedProgram:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(self.model(seed), self.inputs())

    @property
    def settings(self) -> dict[str, Any]:
        return {"min_block_size": 1, **self.options}


TOKENS: dict[str, Any] = {"shapes": ((2, 12),), "tokens": True}
HALF = torch.float16
RELU = {"torch_executed_ops": [torch.ops.aten.relu.default]}

CASES = {
    "resnet18": Case(torchvision("resnet18")),
    "mobilenet_v3_small": Case(torchvision("mobilenet_v3_small")),
    "efficientnet_b0": Case(torchvision("efficientnet_b0")),
    "vit_b_16": Case(torchvision("vit_b_16"), ((1, 3, 224, 224),)),
    "swin_t": Case(torchvision("swin_t")),
    "bert": Case(bert, **TOKENS),
    "llama": Case(llama, **TOKENS),
    "llama_half": Case(llama, dtype=HALF, **TOKENS),
    "lstm": Case(Recurrent, ((2, 5, 8),)),
    "transposed": Case(WithTransposed, ((1, 3, 16, 16),)),
    "odd": Case(Odd, ((2, 8),)),
    "scattered": Case(Scattered, ((1, 3, 8, 8),)),
    "several": Case(torchvision("resnet18"), options=RELU, engines=18),
}
