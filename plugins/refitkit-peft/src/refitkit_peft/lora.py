"""What a user asks for: a base, and adapters with scales."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from refitkit.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, eq=False)
class Lora:
    """Weights that are a base plus scaled adapters: ``refitkit.refit(compiled, Lora(base, ...))``.

    It is a description. Nothing is opened before a refit does.

    Attributes:
        base: A ``Base``, or anything that a user calls weights: those are opened for one refit, and
            nothing is kept.
        adapters: The scale of each adapter, by the name that it was added to the base with, or by
            its path: a PEFT folder, or a file. Their order does not matter. None at all: the base
            as it is.
        component: Which model of a pipeline this is, for adapter files that hold several: ``unet``,
            ``transformer``, ``text_encoder``, ...

    Raises:
        ConfigError: A scale is no finite number; lists all of them.
    """

    base: Any
    adapters: Mapping[str, float] = field(default_factory=dict)
    component: str = ""

    def __post_init__(self) -> None:
        problems = list(_odd(self.adapters))
        if problems:
            raise ConfigError("These adapters cannot be meant.", problems=problems)
        kept = {str(name): float(scale) for name, scale in self.adapters.items()}
        object.__setattr__(self, "adapters", MappingProxyType(kept))


def _odd(adapters: object) -> Iterator[Problem]:
    if not isinstance(adapters, Mapping):
        hint = 'scales by name or path: Lora(base, {"path/of/adapter": 0.7})'
        yield Problem("adapters", "no mapping", type(adapters).__name__, hint=hint)
        return
    for name, scale in adapters.items():
        if not isinstance(name, str | Path):
            yield Problem(repr(name), "adapter", type(name).__name__, "a name or a path")
        number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not number or not math.isfinite(scale):
            yield Problem(str(name), "scale", repr(scale), "a finite number")
