"""Models in which tensors without a name in the state_dict share memory with weights."""

from __future__ import annotations

import copy
import io
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "slice": lambda w: w[4:8],
    "first rows": lambda w: w[:4],
    "columns": lambda w: w[:, 1:3],
    "every other": lambda w: w[1::2, ::2],
    "transpose": lambda w: w.t(),
    "flat": lambda w: w.view(-1),
    "other shape": lambda w: w.view(2, 6, 4),
    "row": lambda w: w[3],
    "element": lambda w: w[2, 1],
    "expanded": lambda w: w[5].expand(3, 4),
    "windows": lambda w: w.view(-1).unfold(0, 6, 4),
    "diagonal": lambda w: w[:4].diagonal(),
    "transposed slice": lambda w: w[6:9].t(),
    "bits": lambda w: w.view(torch.int32),
    "halves": lambda w: w.view(torch.float64),
    "itself": lambda w: w,
}
"""Views of a contiguous float32 weight of 12 x 4, by kind."""


class Shared(nn.Module):
    """A weight with a view of each kind: as buffers, as attributes, and of a buffer."""

    inputs = (torch.linspace(-1.0, 1.0, 12).view(3, 4),)

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        weight = torch.randn(4, 12).t() if turned else torch.randn(12, 4)
        self.w = nn.Parameter(weight)
        self.register_buffer("table", torch.randn(12, 4))
        self.names: list[str] = []
        for number, view in enumerate(self._views()):
            self.register_buffer(f"buffer_{number}", view(self.w.data), persistent=False)
            setattr(self, f"attribute_{number}", view(self.w.data))
            setattr(self, f"of_buffer_{number}", view(self.table))
            self.names += [f"{kind}_{number}" for kind in ("buffer", "attribute", "of_buffer")]
        self.register_buffer("copied", self.w.data.clone()[4:8], persistent=False)

    def _views(self) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        return list(KINDS.values())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [_seen(getattr(self, name)) for name in self.names]
        return x @ self.w.t() + x @ self.table.t() + torch.stack(parts).sum() + self.copied.sum()


def _seen(part: torch.Tensor) -> torch.Tensor:
    """A number to which each element of a tensor contributes in another way."""
    flat = part.reshape(-1).float()
    if part.dtype is torch.int32:
        flat = flat * 2.0**-30
    if part.dtype is torch.float64:
        flat = flat.clamp(-1.0, 1.0)
    return (flat * torch.linspace(0.5, 1.5, flat.numel(), device=flat.device)).sum()


class SharedTurned(Shared):
    """The same with a weight whose columns lie one after another."""

    def __init__(self) -> None:
        super().__init__(turned=True)

    def _views(self) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        names = ("slice", "columns", "every other", "transpose", "row", "element", "expanded")
        return [KINDS[name] for name in names]


class Packed(nn.Module):
    """Weights that are parts of one buffer with gaps, and slices of that across their borders."""

    inputs = (torch.linspace(-1.0, 1.0, 12).view(3, 4),)

    def __init__(self) -> None:
        super().__init__()
        memory = torch.randn(10, 4)
        self.q, self.k = nn.Parameter(memory[:4]), nn.Parameter(memory[5:9])
        self.register_buffer("memory", memory, persistent=False)
        self.across = memory[2:7]
        self.columns = memory.t()[1:3]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = (x @ self.q.t()) + (x @ self.k.t())
        return attended.sum() + x @ self.memory.t() + (x @ self.across.t()).sum() + self.columns[0]


class ViewsOnly(nn.Module):
    """A weight that the graph reads through its views only."""

    inputs = (torch.linspace(-1.0, 1.0, 12).view(3, 4),)

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(12, 4))
        self.q, self.k, self.v = self.qkv.data.split(4)
        self.out = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended: torch.Tensor = self.out(((x @ self.q.t()) * (x @ self.k.t())) @ self.v)
        return attended


MODELS: dict[str, type[nn.Module]] = {
    "shared": Shared,
    "turned": SharedTurned,
    "packed": Packed,
    "views only": ViewsOnly,
}


def model_of(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model, model.inputs, strict=False)


def after_load(name: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the eager model of seed 0 answers after ``load_state_dict``."""
    model = model_of(name)
    model.load_state_dict(copy.deepcopy(state))
    with torch.no_grad():
        found: torch.Tensor = model(*model.inputs)
    return found


def through_a_file(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """What ``torch.export.load`` reads of a saved program."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch 2.14 warns of weights with views
        torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)
