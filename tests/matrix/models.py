"""Models of the version matrix, small, by name; every seed gives other weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

Model = tuple[Callable[[int], torch.nn.Module], tuple[torch.Tensor, ...]]
"""What makes the model from a seed, and inputs for its export."""


def zoo() -> dict[str, Model]:
    """All models."""
    image = torch.ones(1, 3, 64, 64)
    return {
        "resnet18": (lambda seed: _vision("resnet18", seed), (image,)),
        "mobilenet_v3_small": (lambda seed: _vision("mobilenet_v3_small", seed), (image,)),
        "swin_t": (lambda seed: _vision("swin_t", seed), (torch.ones(1, 3, 224, 224),)),
        "gpt2": (_gpt2, (torch.arange(16).reshape(1, 16),)),
    }


def trained(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model with every parameter moved, so that no two of them are equal any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def _vision(name: str, seed: int) -> torch.nn.Module:
    import torchvision

    torch.manual_seed(seed)
    model: torch.nn.Module = getattr(torchvision.models, name)(weights=None).eval()
    for fqn, buffer in model.named_buffers():
        if fqn.endswith("running_var"):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
        elif fqn.endswith("running_mean"):
            buffer.copy_(torch.randn_like(buffer) * 0.1)
    return model


def _gpt2(seed: int) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=2,
        n_embd=96,
        n_head=4,
        vocab_size=199,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        attn_implementation="eager",
    )
    return _HiddenStates(GPT2Model(config)).eval()


class _HiddenStates(torch.nn.Module):
    """GPT2 without the outputs that are no tensors."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.m = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.m(tokens).last_hidden_state
        return hidden
