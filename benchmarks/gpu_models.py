"""Models with random weights that the benchmarks on a GPU use. Nothing is downloaded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.export import ExportedProgram

DTYPES = {"float32": torch.float32, "float16": torch.float16}
TOKENS = 64
State = dict[str, torch.Tensor]


class Logits(nn.Module):
    """A causal language model of transformers that gives a plain tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of every token."""
        found: torch.Tensor = self.model(tokens, use_cache=False).logits
        return found


def vision(name: str) -> Callable[[], nn.Module]:
    """A model of torchvision."""

    def make() -> nn.Module:
        import torchvision as library

        module: nn.Module = getattr(library.models, name)(weights=None)
        return module

    return make


def gpt2() -> nn.Module:
    """GPT-2, small: 124 million parameters, embedding and head tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return Logits(GPT2LMHeadModel(GPT2Config(attn_implementation="eager")))


def llama() -> nn.Module:
    """A decoder with rotary embeddings: 12 layers of 768, 134 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        intermediate_size=2048,
        attn_implementation="eager",
    )
    return Logits(LlamaForCausalLM(config))


@dataclass(frozen=True)
class Model:
    """A model and its inputs.

    Attributes:
        make: Makes a module with new weights.
        tokens: Whether its input is tokens, instead of an image.
    """

    make: Callable[[], nn.Module]
    tokens: bool = False

    def inputs(self, dtype: torch.dtype, device: str = "cuda") -> tuple[torch.Tensor, ...]:
        """Example inputs, batch 1."""
        torch.manual_seed(99)
        if self.tokens:
            return (torch.randint(0, 1000, (1, TOKENS), dtype=torch.int32, device=device),)
        return (torch.randn(1, 3, 224, 224, dtype=dtype, device=device),)

    def new(self, seed: int, dtype: torch.dtype, device: str = "cuda") -> nn.Module:
        """A module in eval mode, none of whose weights and statistics is all zeros or ones."""
        torch.manual_seed(seed)
        module = self.make().eval()
        with torch.no_grad():
            for name, value in module.named_buffers():
                if name.endswith("running_var"):
                    value.uniform_(0.5, 1.5)
                elif name.endswith("running_mean"):
                    value.normal_(std=0.1)
            for value in module.parameters():
                value.mul_(1 + 0.1 * torch.randn_like(value)).add_(0.001 * torch.randn_like(value))
        return module.to(device, dtype)


MODELS = {
    "resnet18": Model(vision("resnet18")),
    "resnet50": Model(vision("resnet50")),
    "mobilenet_v3_small": Model(vision("mobilenet_v3_small")),
    "vit_b_16": Model(vision("vit_b_16")),
    "vit_l_16": Model(vision("vit_l_16")),
    "gpt2": Model(gpt2, tokens=True),
    "llama": Model(llama, tokens=True),
}


def exported(module: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    """The module as a program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, inputs)


def state_on(module: nn.Module, device: str, *, pinned: bool = False) -> State:
    """A copy of a state_dict that shares no memory with the module."""
    found = {}
    for name, value in module.state_dict().items():
        copy = value.detach().to(device, copy=True)
        found[name] = copy.pin_memory() if pinned else copy
    return found
