"""One model of the zoo."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from scripts.zoo.weights import fill

if TYPE_CHECKING:
    from collections.abc import Callable

F32, HALF = ("float32",), ("float32", "float16", "bfloat16")
RELU = "torch.ops.aten.relu.default"


@dataclass(frozen=True)
class Entry:
    """A model with random weights, its inputs, and how it is compiled.

    Attributes:
        name: Its name in the table.
        make: Makes the module.
        inputs: Shapes of its inputs; those in ``tokens`` are indices.
        dtypes: Dtypes in which it is tried.
        options: Options of the backend beside ``min_block_size=1``.
        dynamic: What ``torch.export.export`` takes as ``dynamic_shapes``.
        tokens: Largest index plus one, where inputs are indices.
        values: Makes the inputs where shapes do not say enough.
        keywords: Makes the keyword inputs.
        others: Makes the positional inputs of further calls: other sizes, or the next steps of a
            model that keeps a state.
        stateful: Whether calls change buffers.
        strict: Whether ``torch.export.export`` traces in its strict mode.
    """

    name: str
    make: Callable[[], torch.nn.Module]
    inputs: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...] = F32
    options: dict[str, Any] = field(default_factory=dict)
    dynamic: Any = None
    tokens: int = 0
    values: Callable[[torch.dtype], tuple[Any, ...]] | None = None
    keywords: Callable[[torch.dtype], dict[str, Any]] | None = None
    others: Callable[[torch.dtype], list[tuple[Any, ...]]] | None = None
    stateful: bool = False
    strict: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Options of the backend."""
        return {"min_block_size": 1, **self.options}

    def named(self, suffix: str, **changes: Any) -> Entry:
        """A variant of it."""
        return replace(self, name=f"{self.name}{suffix}", **changes)

    def model(self, dtype: str, seed: int, *, outliers: bool = False) -> torch.nn.Module:
        """The module with the weights of one round."""
        torch.manual_seed(0)
        kind: torch.dtype = getattr(torch, dtype)
        made = self.make().eval().requires_grad_(requires_grad=False)
        if kind is not torch.float32:
            made = made.to(kind)
        fill(made, seed, outliers=outliers)
        return made

    def program(self, model: torch.nn.Module, dtype: str) -> torch.export.ExportedProgram:
        """The module exported."""
        args, kwargs = self.calls(dtype)[0]
        logging.getLogger("torch.export").setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(
                model, args, kwargs, dynamic_shapes=self.dynamic, strict=self.strict
            )

    def calls(self, dtype: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Inputs of all calls, new tensors each time; the first ones are those of the export."""
        kind: torch.dtype = getattr(torch, dtype)
        torch.manual_seed(0)
        args = self._given(kind)
        kwargs = self.keywords(kind) if self.keywords else {}
        further = self.others(kind) if self.others else []
        return [(args, kwargs), *((one, {}) for one in further)]

    def _given(self, dtype: torch.dtype) -> tuple[Any, ...]:
        if self.values is not None:
            return self.values(dtype)
        if self.tokens:
            return tuple(torch.randint(1, self.tokens, shape) for shape in self.inputs)
        return tuple(torch.randn(shape).to(dtype) for shape in self.inputs)
