"""Models with random weights that the benchmark of recipes measures. Nothing is downloaded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.export import ExportedProgram

IMAGE = ((1, 3, 224, 224),)
TOKENS = ((1, 32),)


@dataclass(frozen=True)
class Model:
    """A model and its inputs.

    Attributes:
        make: Makes a module with new weights.
        shapes: Shapes of its inputs.
        tokens: Whether they are integers.
        aotinductor: Whether it is also compiled by AOTInductor, which takes a minute or more.
    """

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = IMAGE
    tokens: bool = False
    aotinductor: bool = False

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Example inputs."""
        if self.tokens:
            return tuple(torch.arange(torch.Size(s).numel()).reshape(s) % 99 for s in self.shapes)
        return tuple(torch.zeros(shape) for shape in self.shapes)

    def new(self, seed: int) -> nn.Module:
        """A module in eval mode, none of whose weights and statistics is all zeros or ones."""
        torch.manual_seed(seed)
        module = self.make().eval()
        with torch.no_grad():
            for name, value in module.named_buffers():
                if name.endswith("running_var"):
                    value.copy_(torch.rand_like(value) + 0.5)
                elif name.endswith("running_mean"):
                    value.copy_(torch.randn_like(value) * 0.1)
            for value in module.parameters():
                value.add_(torch.randn_like(value) * 0.02)
        return module

    def export(self, module: nn.Module) -> ExportedProgram:
        """The module as a program."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, self.inputs())


def torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision as library

        module: nn.Module = getattr(library.models, name)(weights=None)
        return module

    return make


class Tensors(nn.Module):
    """A model of transformers with plain tensors as results."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The named results."""
        more: dict[str, Any] = {"use_cache": False} if "logits" in self.names else {}
        found = self.model(tokens, **more)
        return tuple(getattr(found, name) for name in self.names)


def bert_base() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(attn_implementation="eager")
    return Tensors(BertModel(config), "last_hidden_state", "pooler_output")


def gpt2(layers: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(n_layer=layers, attn_implementation="eager")
        return Tensors(GPT2LMHeadModel(config), "logits")

    return make


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1376,
        use_cache=False,
        attn_implementation="eager",
    )
    return Tensors(LlamaForCausalLM(config), "logits")


class Recurrent(nn.Module):
    """An LSTM of two layers with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(512, 512, num_layers=2, batch_first=True)
        self.head = nn.Linear(512, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The head's results."""
        result: torch.Tensor = self.head(self.lstm(x)[0])
        return result


def perceptron(width: int, layers: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        each = [m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(*each)

    return make


MODELS = {
    "resnet18": Model(torchvision("resnet18"), aotinductor=True),
    "resnet50": Model(torchvision("resnet50")),
    "resnet101": Model(torchvision("resnet101")),
    "mobilenet_v2": Model(torchvision("mobilenet_v2")),
    "mobilenet_v3_small": Model(torchvision("mobilenet_v3_small"), aotinductor=True),
    "efficientnet_b0": Model(torchvision("efficientnet_b0")),
    "regnet_y_400mf": Model(torchvision("regnet_y_400mf")),
    "densenet121": Model(torchvision("densenet121")),
    "vgg11": Model(torchvision("vgg11"), aotinductor=True),
    "convnext_tiny": Model(torchvision("convnext_tiny")),
    "swin_t": Model(torchvision("swin_t")),
    "vit_b_16": Model(torchvision("vit_b_16"), aotinductor=True),
    "bert_base": Model(bert_base, TOKENS, tokens=True, aotinductor=True),
    "gpt2_4_layers": Model(gpt2(4), TOKENS, tokens=True),
    "gpt2": Model(gpt2(12), TOKENS, tokens=True),
    "llama_8_layers": Model(llama, TOKENS, tokens=True, aotinductor=True),
    "lstm": Model(Recurrent, ((1, 8, 512),)),
    "mlp": Model(perceptron(1024, 8), ((1, 1024),), aotinductor=True),
}
QUICK = ("resnet18", "mobilenet_v3_small", "swin_t", "vit_b_16")
TINY = Model(perceptron(8, 1), ((1, 8),))
"""Warms up what is imported and started on first use."""
HUGE = Model(perceptron(16384, 4), ((1, 16384),))
"""4.3 GB of weights in four layers; made without memory, see ``recipe_vs_reference.py``."""
