"""The models that tests compile, each with two sets of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.export import ExportedProgram


class Cnn(nn.Module):
    """Convolutions with batch norms whose statistics are not those of a new module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        for norm in (self.norm, self.last):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.last(self.second(x))).mean((2, 3)))


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


class Block(nn.Module):
    """An embedding that is tied to the output, a transformer layer, and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight
        places = torch.linspace(-1, 1, 16 * 5).reshape(5, 16)
        self.places = nn.Buffer(places, persistent=False)

    def forward(self, ids: torch.Tensor, *, scale: torch.Tensor) -> dict[str, Any]:
        hidden = self.layer(self.embed(ids) + self.places) * scale
        return {"logits": self.head(hidden), "rest": (hidden, [torch.tensor([1.0, 2.0]) * scale])}


def _images() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8),), {}


def _rows() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.linspace(-1, 1, 3 * 8).reshape(3, 8),), {}


def _ids() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.tensor([[1, 7, 3, 0, 19]]),), {"scale": torch.tensor(0.5)}


class Case:
    """A model that is exported with the weights of a seed."""

    def __init__(self, model: Callable[[], nn.Module], inputs: Callable[[], Any]) -> None:
        self.model, (self.args, self.kwargs) = model, inputs()

    def program(self, seed: int) -> ExportedProgram:
        torch.manual_seed(seed)
        return torch.export.export(self.model().eval(), self.args, self.kwargs)

    def answers(self, called: Callable[..., Any]) -> list[torch.Tensor]:
        """The outputs of a module, flattened."""
        with torch.no_grad():
            found = called(*self.args, **self.kwargs)
        return torch.utils._pytree.tree_leaves(found)


CASES = {"cnn": Case(Cnn, _images), "mlp": Case(Mlp, _rows), "block": Case(Block, _ids)}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def mlp() -> Case:
    return CASES["mlp"]
