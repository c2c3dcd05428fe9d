"""Small models, adapters that peft makes and saves, and the models that peft merges."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import refitkit
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class Net(torch.nn.Module):
    """Linear layers, one without a bias, convolutions of all dimensions, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(11, 12)
        self.one = torch.nn.Conv1d(12, 8, 3, padding=1)
        self.two = torch.nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.small = torch.nn.Conv2d(6, 5, 1)
        self.three = torch.nn.Conv3d(1, 4, (1, 2, 2))
        self.lin = torch.nn.Linear(12, 20)
        self.flat = torch.nn.Linear(20, 7, bias=False)
        self.head = torch.nn.Linear(7, 3)
        self.norm = torch.nn.LayerNorm(12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.emb(ids))  # (n, length, 12)
        y = self.head(self.flat(torch.relu(self.lin(x)))).flatten(1).sum(1)
        z = self.one(x.transpose(1, 2)).flatten(1).sum(1)
        images = x[:, None]
        w = self.small(self.two(images)).flatten(1).sum(1)
        v = self.three(images[:, :, None]).flatten(1).sum(1)
        return torch.stack([y, z, w, v], 1)


IDS = torch.tensor([[1, 7, 3, 5], [0, 9, 2, 10]])


def make_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net().eval().to(dtype)


@dataclass(frozen=True)
class Made:
    """An adapter that peft made.

    Attributes:
        path: Folder that peft saved it to.
        model: peft's model with the adapter, over a copy of the base.
    """

    path: Path
    model: Any

    def merged(self, scale: float = 1.0) -> dict[str, torch.Tensor]:
        """Weights of the model that peft merged, by the base's names."""
        model = copy.deepcopy(self.model)
        for module in model.modules():
            if hasattr(module, "set_scale") and scale != 1:
                module.set_scale("default", scale)
        return {n: v.clone() for n, v in model.merge_and_unload().state_dict().items()}


def make_adapter(model: torch.nn.Module, path: Path, seed: int = 1, **config: Any) -> Made:
    """An adapter with random values that peft made for a copy of the model, and saved."""
    import peft

    fields = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **config}
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about unusual settings, which these are
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**fields)).eval()
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                drawn = torch.randn_like(parameter) * 0.2
                magnitude = "magnitude" in name
                parameter.data = (parameter.data + drawn).abs() + 0.1 if magnitude else drawn
        wrapped.save_pretrained(path)
    return Made(path, wrapped)


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Whether all bits are equal."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and torch.equal(bits(a[n]), bits(b[n]))
        for n in a
    )


def assert_close(found: torch.Tensor, wanted: torch.Tensor, name: str = "") -> None:
    """Check equality within the rounding of a sum of twelve numbers in the dtype."""
    if not wanted.is_floating_point():
        assert torch.equal(found, wanted), name
        return
    scale = float(wanted.detach().float().abs().max()) if wanted.numel() else 0.0
    error = float((found.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
    limit = 16 * torch.finfo(wanted.dtype).eps * scale
    assert error <= limit, f"{name}: {error} over {limit}"


def weights_of(source: Any) -> dict[str, torch.Tensor]:
    return {name: source.get(name).clone() for name in source.names()}


def open_weights(thing: Any) -> Any:
    """The source of some weights, through the hooks of installed plugins."""
    return refitkit.Pipeline().open_weights(thing)


def slots_of(compiled: Any) -> dict[str, torch.Tensor]:
    return {
        f"{engine.name} {name}": engine.read(name).clone()
        for engine in compiled.opened.engines.values()
        for name in engine.slots
    }
