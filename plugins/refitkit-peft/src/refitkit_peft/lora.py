"""What a user asks for: a base, and adapters with scales."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from refitkit.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

Alpha: TypeAlias = float | Literal["rank"]
"""An alpha that a user gives; ``"rank"`` is the rank of each layer, which makes its scale 1."""


@dataclass(frozen=True, eq=False)
class Lora:
    """Weights that are a base plus scaled adapters: ``refitkit.refit(compiled, Lora(base, ...))``.

    It is a description. Nothing is opened before a refit does.

    Attributes:
        base: A ``Base``, or anything that a user calls weights: those are opened for one refit, and
            nothing is kept.
        adapters: The scale of each adapter, by the name that it was added to the base with, or by
            its path: a folder of PEFT or diffusers, or a file. Their order does not matter. None
            at all: the base as it is.
        component: Which model of a pipeline this is, for adapter files that hold several: ``unet``,
            ``transformer``, ``text_encoder``, ...
        alphas: The alpha of adapters by the same names, in place of that of their files: a number,
            or ``"rank"`` for factors that are scaled already. Files that do not say their alpha
            are refused without it.

    Raises:
        ConfigError: A scale is no finite number, or an alpha no positive one; lists all of them.
    """

    base: Any
    adapters: Mapping[str, float] = field(default_factory=dict)
    component: str = ""
    alphas: Mapping[str, Alpha] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = list(_odd(self.adapters))
        problems += _odd_alphas(self.alphas, self.adapters)
        if problems:
            raise ConfigError("These adapters cannot be meant.", problems=problems)
        kept = {str(name): float(scale) for name, scale in self.adapters.items()}
        object.__setattr__(self, "adapters", MappingProxyType(kept))
        alphas = {str(name): checked_alpha(alpha) for name, alpha in self.alphas.items()}
        object.__setattr__(self, "alphas", MappingProxyType(alphas))


def checked_alpha(alpha: object) -> Alpha:
    """An alpha that a user gives.

    Raises:
        ConfigError: It is neither a positive finite number nor ``"rank"``.
    """
    if alpha == "rank":
        return "rank"
    if isinstance(alpha, int | float) and not isinstance(alpha, bool):
        try:
            number = float(alpha)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and number > 0:
            return number
    problem = Problem("alpha", "number", repr(alpha), "a number greater than 0, or 'rank'")
    raise ConfigError("This alpha cannot be meant.", problems=[problem])


def _odd_alphas(alphas: object, adapters: object) -> Iterator[Problem]:
    if not isinstance(alphas, Mapping):
        hint = 'alphas by name or path: Lora(base, {...}, alphas={"path/of/adapter": 16})'
        yield Problem("alphas", "no mapping", type(alphas).__name__, hint=hint)
        return
    names = {str(name) for name in adapters} if isinstance(adapters, Mapping) else set()
    for name, alpha in alphas.items():
        if str(name) not in names:
            hint = "it is none of the adapters"
            yield Problem(str(name), "alpha", wanted=", ".join(sorted(names)), hint=hint)
        try:
            checked_alpha(alpha)
        except ConfigError as exc:
            yield from (replace(problem, subject=str(name)) for problem in exc.problems)


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
