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

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
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


class UNet(nn.Module):
    """A small U-Net with group norms, residual blocks, and attention in the middle."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList([Residual(width, width), Residual(width, 2 * width)])
        self.halve = nn.ModuleList(
            [nn.Conv2d(width, width, 3, 2, 1), nn.Conv2d(2 * width, 2 * width, 3, 2, 1)]
        )
        self.middle = nn.ModuleList([Residual(2 * width, 4 * width), Attention(4 * width)])
        self.up = nn.ModuleList([Residual(6 * width, 2 * width), Residual(3 * width, width)])
        self.leave = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """An image of the same size."""
        x, kept = self.enter(x), []
        for block, halve in zip(self.down, self.halve, strict=True):
            x = block(x)
            kept.append(x)
            x = halve(x)
        for block in self.middle:
            x = block(x)
        for block in self.up:
            x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, kept.pop()], 1))
        found: torch.Tensor = self.leave(x)
        return found


class Residual(nn.Module):
    """Two convolutions beside a third one."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, before), nn.GroupNorm(8, after)])
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)]
        )
        self.beside = nn.Conv2d(before, after, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """An image with other channels."""
        found = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            found = convolution(nn.functional.silu(norm(found)))
        return found + self.beside(x)


class Attention(nn.Module):
    """Each pixel attends to all others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """An image of the same size."""
        batch, width, height, length = x.shape
        pixels = self.norm(x).reshape(batch, width, height * length).transpose(1, 2)
        q, k, v = self.qkv(pixels).chunk(3, -1)
        mixed = torch.softmax(q @ k.transpose(1, 2) / width**0.5, -1) @ v
        return x + self.out(mixed).transpose(1, 2).reshape(x.shape)


@dataclass(frozen=True)
class Model:
    """A model and its inputs.

    Attributes:
        make: Makes a module with new weights.
        tokens: Whether its input is tokens, instead of an image.
        size: Height and width of the image.
    """

    make: Callable[[], nn.Module]
    tokens: bool = False
    size: int = 224

    def inputs(self, dtype: torch.dtype, device: str = "cuda") -> tuple[torch.Tensor, ...]:
        """Example inputs, batch 1."""
        torch.manual_seed(99)
        if self.tokens:
            return (torch.randint(0, 1000, (1, TOKENS), dtype=torch.int32, device=device),)
        return (torch.randn(1, 3, self.size, self.size, dtype=dtype, device=device),)

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
    "efficientnet_b0": Model(vision("efficientnet_b0")),
    "convnext_tiny": Model(vision("convnext_tiny")),
    "swin_t": Model(vision("swin_t")),
    "vit_b_16": Model(vision("vit_b_16")),
    "vit_l_16": Model(vision("vit_l_16")),
    "gpt2": Model(gpt2, tokens=True),
    "llama": Model(llama, tokens=True),
    "unet": Model(UNet, size=64),
}


def exported(module: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    """The module as a program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, inputs)


def state_on(module: nn.Module, device: str, *, pinned: bool = False) -> State:
    """A copy of a state_dict that shares no memory with the module. Tied weights stay tied."""
    found, copies = {}, dict[int, torch.Tensor]()
    for name, value in module.state_dict().items():
        if value.data_ptr() not in copies:
            copy = value.detach().to(device, copy=True)
            copies[value.data_ptr()] = copy.pin_memory() if pinned else copy
        found[name] = copies[value.data_ptr()]
    return found
