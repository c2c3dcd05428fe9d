"""Small models for the tests of programs, each odd in one way, with inputs for them."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import nn

Inputs = tuple[Any, ...]


class Plain(nn.Module):
    """A parameter, both kinds of buffers, a lifted constant, and things that nobody reads."""

    inputs: Inputs = (torch.arange(2.0),)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.unused = nn.Parameter(torch.ones(4))
        self.register_buffer("kept", torch.tensor([1.0, -1.0]))
        self.register_buffer("lost", torch.tensor([0.5, 0.25]), persistent=False)
        self.register_buffer("unused_lost", torch.ones(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.kept + self.lost + torch.tensor([10.0, 20.0])


class Tied(nn.Module):
    """One weight under two names, as language models have it."""

    inputs: Inputs = (torch.tensor([0, 2, 1]),)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(x))


class TiedBuffers(nn.Module):
    """One buffer under two names, changed under one and read under the other."""

    inputs: Inputs = (torch.ones(2),)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.zeros(2))
        self.register_buffer("b", self.a)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.a.add_(x)
        return self.b * 2


class Views(nn.Module):
    """Two parameters in one memory that are not the same weight."""

    inputs: Inputs = (torch.ones(2),)

    def __init__(self) -> None:
        super().__init__()
        flat = torch.arange(4.0)
        self.first = nn.Parameter(flat[:2])
        self.second = nn.Parameter(flat[2:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.first + self.second


class InPlace(nn.Module):
    """Changes its buffer; how is for children to say."""

    inputs: Inputs = (torch.tensor([1.0, 2.0, 3.0, 4.0]),)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 3.0))
        self.register_buffer("state", torch.tensor([0.0, 1.0, 2.0, 3.0]))
        self.register_buffer("calm", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.change(x)
        return x * self.weight + self.state + self.calm

    def change(self, x: torch.Tensor) -> None:
        raise NotImplementedError


class Directly(InPlace):
    def change(self, x: torch.Tensor) -> None:
        self.state.mul_(0.5).add_(x)


class ByCopy(InPlace):
    def change(self, x: torch.Tensor) -> None:
        self.state.copy_(x)


class ByIndex(InPlace):
    def change(self, x: torch.Tensor) -> None:
        self.state[1:3] = x[:2]


class ByIndexPut(InPlace):
    def change(self, x: torch.Tensor) -> None:
        self.state[torch.tensor([0, 2])] = x[:2]


class ThroughViews(InPlace):
    def change(self, x: torch.Tensor) -> None:
        self.state.view(2, 2).t()[0].unsqueeze(0).squeeze().mul_(2.0)


class ThroughReshape(InPlace):
    def change(self, x: torch.Tensor) -> None:
        self.state.reshape(2, 2).flatten()[1:].add_(1.0)


class ThroughChunks(InPlace):
    def change(self, x: torch.Tensor) -> None:
        first, _ = self.state.chunk(2)
        first.add_(x[:2])


class ThroughUnbind(InPlace):
    def change(self, x: torch.Tensor) -> None:
        self.state.view(2, 2).unbind(0)[1].zero_()


class ThroughSplit(InPlace):
    def change(self, x: torch.Tensor) -> None:
        torch.split(self.state, [1, 3])[1].add_(1.0)


class ThroughAtLeast(InPlace):
    """This and the next return what they are given; their schemas do not say so."""

    def change(self, x: torch.Tensor) -> None:
        torch.atleast_2d(self.state)[0].add_(x)


class ThroughTypeAs(InPlace):
    def change(self, x: torch.Tensor) -> None:
        self.state.type_as(x).add_(x)


class ThroughDropout(InPlace):
    def change(self, x: torch.Tensor) -> None:
        nn.functional.dropout(self.state, training=False).add_(x)


class ThroughBroadcast(InPlace):
    def change(self, x: torch.Tensor) -> None:
        torch.broadcast_tensors(self.state, x)[0].add_(x)


class ThroughLists(InPlace):
    def change(self, x: torch.Tensor) -> None:
        torch._foreach_add_([self.state], 1.0)


class WithoutGradients(InPlace):
    """``torch.export`` puts the region into a submodule."""

    def change(self, x: torch.Tensor) -> None:
        with torch.no_grad():
            self.state.mul_(0.9)


class ViewInsideRegion(InPlace):
    def change(self, x: torch.Tensor) -> None:
        with torch.no_grad():
            view = self.state[:2]
        view.add_(1.0)


class WithAutocast(InPlace):
    def change(self, x: torch.Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            self.state.add_(x)


class Detached(InPlace):
    def change(self, x: torch.Tensor) -> None:
        self.state.detach().add_(x)


class OwnParameter(InPlace):
    """Changes a parameter, as power iterations do."""

    def change(self, x: torch.Tensor) -> None:
        with torch.no_grad():
            self.weight.mul_(2.0)


class ParameterThroughData(InPlace):
    def change(self, x: torch.Tensor) -> None:
        self.weight.detach().add_(1.0)


class OutArgument(InPlace):
    def change(self, x: torch.Tensor) -> None:
        torch.add(x, 1.0, out=self.state)


class OnlyReads(InPlace):
    """Works in place on what is its own."""

    def change(self, x: torch.Tensor) -> None:
        own = self.state.clone()
        own.add_(x)
        (x * 2).mul_(own)


class InPlaceActivations(nn.Module):
    """Works in place on results: no weight is changed."""

    inputs: Inputs = (torch.arange(24.0).reshape(1, 2, 3, 4) - 12,)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(),
            nn.Linear(18, 2), nn.SiLU(inplace=True), nn.Dropout(inplace=True),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).add_(1.0)


class Counter(nn.Module):
    """A number that counts calls, as batch norm does."""

    inputs: Inputs = (torch.ones(2),)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.calls


class Infinite(nn.Module):
    """Literals that JSON has no numbers for."""

    inputs: Inputs = (torch.tensor([-1.0, 0.5, 2.0]),)

    def forward(self, x: torch.Tensor) -> Any:
        return x.masked_fill(x > 1, float("-inf")), torch.where(x > 0, x, float("inf"))


class Nested(nn.Module):
    """Inputs and outputs of all shapes."""

    inputs: Inputs = ({"a": torch.ones(2), "b": [torch.zeros(2), None]},)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, tree: dict[str, Any]) -> Any:
        out = self.linear(tree["a"]) + tree["b"][0]
        return {"out": out, "more": [out * 2, None, 3]}


class Normalized(nn.Module):
    """A parametrization and layers of the usual kinds."""

    inputs: Inputs = (torch.arange(24.0).reshape(1, 2, 3, 4),)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 2))
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Training(nn.Module):
    """Batch norm that counts and averages: its op does not say that it writes."""

    inputs: Inputs = (torch.arange(12.0).reshape(2, 3, 2),)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.instance = nn.InstanceNorm1d(3, track_running_stats=True)

    def eval(self) -> Training:
        """It stays in training."""
        return self.train()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.instance(self.norm(x))


class Mixed(nn.Module):
    """Weights of several dtypes, some of them no floats."""

    inputs: Inputs = (torch.ones(2),)

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.table = nn.Parameter(torch.tensor([1, 0]), requires_grad=False)
        self.register_buffer("wide", torch.ones(2, dtype=torch.float64))
        self.register_buffer("turns", torch.tensor([1 + 2j, 3 - 1j]))
        self.register_buffer("none", torch.ones(0, 2))

    def forward(self, x: torch.Tensor) -> Any:
        wide = (x * self.short)[self.table] + self.wide
        return wide, self.turns * x, torch.cat([self.none, x.reshape(1, 2)])


class Strided(nn.Module):
    """Weights that do not lie in order."""

    inputs: Inputs = (torch.ones(3),)

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("wide", torch.ones(1).expand(2))
        self.register_buffer("part", torch.arange(9.0)[3:5])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.turned + self.wide * self.part


class Branches(nn.Module):
    """A condition on data."""

    inputs: Inputs = (torch.ones(2),)

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(
            x.sum() > 0, lambda x: x * self.weight * self.factor, lambda x: x - 1, (x,)
        )


class Region(nn.Module):
    """An op inside a region that export makes a submodule of."""

    inputs: Inputs = (torch.ones(2),)

    def __init__(self, *, sine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.sine = sine

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = self.weight.sin() if self.sine else self.weight.cos()
        return x * scale


class NestedRegions(nn.Module):
    """A region at the end of another one: export leaves an empty one behind."""

    inputs: Inputs = (torch.ones(2),)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scale = self.weight.sin()
            with torch.no_grad():
                shift = self.weight.cos()
        return x * scale + shift


class Attention(nn.Module):
    """A block with a causal mask, whose shapes are dynamic."""

    inputs: Inputs = (torch.arange(24.0).reshape(1, 3, 8) / 24,)

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("mask", torch.ones(16, 16).tril().bool(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        n = x.shape[1]
        scores = (q @ k.transpose(1, 2)).masked_fill(~self.mask[:n, :n], float("-inf"))
        return torch.softmax(scores, -1) @ v


CHANGING = [
    Directly, ByCopy, ByIndex, ByIndexPut, ThroughViews, ThroughReshape, ThroughChunks,
    ThroughUnbind, ThroughSplit, ThroughAtLeast, ThroughTypeAs, ThroughDropout, ThroughBroadcast,
    ThroughLists, WithoutGradients, ViewInsideRegion, WithAutocast, Detached,
    OutArgument,
]  # fmt: skip
"""Children of :class:`InPlace` that change the buffer ``state``."""

CHANGING_PARAMETERS = [OwnParameter, ParameterThroughData]
"""Those that change the parameter ``weight``."""

ALL = [
    Plain, Tied, TiedBuffers, Views, OnlyReads, InPlaceActivations, Counter, Infinite, Nested,
    Normalized, Mixed, Strided, Branches, Region, NestedRegions, Attention, Training, *CHANGING,
    *CHANGING_PARAMETERS,
]  # fmt: skip


DECOMPOSED = [
    Plain, Tied, OnlyReads, InPlaceActivations, Counter, Normalized, Strided, Branches, Region,
    Training, Directly, ThroughChunks, WithoutGradients, OwnParameter,
]  # fmt: skip
"""What is tested decomposed too: there, torch's signature says what is changed, however it is."""

FORMS = [(kind, False) for kind in ALL] + [(kind, True) for kind in DECOMPOSED]
"""All models with whether their program is decomposed."""


def form_name(value: object) -> str:
    """Name of a test's parameter."""
    return value.__name__ if isinstance(value, type) else "decomposed" if value else "plain"


@functools.cache
def exported(kind: type[nn.Module], *, decomposed: bool = False) -> torch.export.ExportedProgram:
    """A program of a fresh model; one for all tests, which must not change it."""
    if decomposed:
        return exported(kind).run_decompositions()
    torch.manual_seed(0)
    return export(kind().eval())


def export(model: nn.Module) -> torch.export.ExportedProgram:
    """The model's program for its own inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # export has much to say about odd models
        return torch.export.export(model, copied(model.inputs))


def copied(inputs: Any) -> Any:
    """Inputs that a model may change."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, inputs)
