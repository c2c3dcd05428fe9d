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
        "nasty": (_nasty, (torch.arange(8).reshape(1, 8),)),
        "half": (_half, (torch.ones(1, 3, 8, 8, dtype=torch.float16),)),
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


def _nasty(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return _Nasty().eval()


def _half(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = (
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4, eps=1e-3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(144, 5),
        torch.nn.LayerNorm(5),
    )
    return torch.nn.Sequential(*layers).half().eval()


class _Standardized(torch.nn.Conv1d):
    """Its weight has the right name and size, and is not the kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        return torch.nn.functional.conv1d(x, weight, self.bias, padding=1)


class _Scaled(torch.nn.Linear):
    """The scale is 1 when it is compiled."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


class _Outer(torch.nn.Linear):
    """A layer with one of its own kind inside."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.inner = torch.nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.inner(x))


class _Crossed(torch.nn.Module):
    """Uses its two weights in the order that their names do not suggest."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size, size))
        self.bias = torch.nn.Parameter(torch.zeros(size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.nn.functional.linear(x, self.bias)
        return first + torch.nn.functional.linear(x, self.weight)


class _Nasty(torch.nn.Module):
    """Layers of which names, sizes or equal values tell something wrong."""

    def __init__(self) -> None:
        super().__init__()
        size = 8
        self.tokens = torch.nn.Embedding(size, size)
        self.standardized = _Standardized(size, size, 3, padding=1)
        self.norm = torch.nn.BatchNorm1d(size, eps=0.1)
        self.bare = torch.nn.BatchNorm1d(size, affine=False)
        self.zeros = torch.nn.Linear(size, size)
        self.twin = torch.nn.Linear(size, size)
        self.scaled = _Scaled(size)
        self.outer = _Outer(size)
        self.crossed = _Crossed(size)
        self.attention = torch.nn.MultiheadAttention(size, 2, batch_first=True)
        self.final = torch.nn.LayerNorm(size)
        self.head = torch.nn.Linear(size, size, bias=False)
        self.head.weight = self.tokens.weight
        for layer in (self.zeros, self.twin):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.standardized(self.tokens(tokens))
        x = self.zeros(self.twin(self.bare(self.norm(x)))) + self.scaled(self.outer(x))
        x = self.twin(x) + self.crossed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        hidden: torch.Tensor = self.head(self.final(x))
        return hidden
