"""``Lora``, the description of a base with scaled adapters. It needs no torch."""

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
"""A user's alpha. ``"rank"`` means the rank of each layer, so that its factor is 1."""


@dataclass(frozen=True, eq=False)
class Lora:
    """Weights that are a base plus scaled adapters: ``refitkit.refit(compiled, Lora(base, ...))``.

    It is only a description: the refit opens the files.

    Attributes:
        base: A ``Base``, or any other weights that refitkit can open. Other weights are opened for
            one refit, and nothing of them is kept.
        adapters: Scale of each adapter by its name in the base, or by its path: a folder of PEFT or
            diffusers, or a file. The order does not matter. Empty: the base alone.
        component: Model of a pipeline, for adapter files that contain several: ``unet``,
            ``transformer``, ``text_encoder``, ...
        alphas: Alphas of adapters by the same names, in place of those in their files: a number, or
            ``"rank"`` for factors that are already scaled. Adapters without any alpha need one.

    Raises:
        ConfigError: A scale is not a finite number, or an alpha is not positive; lists all of them.
    """

    base: Any
    adapters: Mapping[str, float] = field(default_factory=dict)
    component: str = ""
    alphas: Mapping[str, Alpha] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = list(_scale_problems(self.adapters))
        problems += _alpha_problems(self.alphas, self.adapters)
        if problems:
            raise ConfigError("The scales or alphas are invalid.", problems=problems)
        # The dataclass is frozen: normalize its fields once, here.
        kept = {str(name): float(scale) for name, scale in self.adapters.items()}
        object.__setattr__(self, "adapters", MappingProxyType(kept))
        alphas = {str(name): checked_alpha(alpha) for name, alpha in self.alphas.items()}
        object.__setattr__(self, "alphas", MappingProxyType(alphas))


def checked_alpha(alpha: object) -> Alpha:
    """A user's alpha as a float or ``"rank"``.

    Raises:
        ConfigError: The alpha is neither a positive finite number nor ``"rank"``.
    """
    if alpha == "rank":
        return "rank"
    if isinstance(alpha, int | float) and not isinstance(alpha, bool):
        try:
            number = float(alpha)
        # float() of a huge int raises instead of returning infinity.
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and number > 0:
            return number
    problem = Problem("alpha", "number", repr(alpha), "a number greater than 0, or 'rank'")
    raise ConfigError("This alpha is invalid.", problems=[problem])


def _alpha_problems(alphas: object, adapters: object) -> Iterator[Problem]:
    if not isinstance(alphas, Mapping):
        hint = 'alphas by name or path: Lora(base, {...}, alphas={"path/of/adapter": 16})'
        yield Problem("alphas", "not a mapping", type(alphas).__name__, hint=hint)
        return
    names = {str(name) for name in adapters} if isinstance(adapters, Mapping) else set()
    for name, alpha in alphas.items():
        if str(name) not in names:
            hint = "it is not one of the adapters"
            yield Problem(str(name), "alpha", wanted=", ".join(sorted(names)), hint=hint)
        try:
            checked_alpha(alpha)
        except ConfigError as exc:
            yield from (replace(problem, subject=str(name)) for problem in exc.problems)


def _scale_problems(adapters: object) -> Iterator[Problem]:
    if not isinstance(adapters, Mapping):
        hint = 'scales by name or path: Lora(base, {"path/of/adapter": 0.7})'
        yield Problem("adapters", "not a mapping", type(adapters).__name__, hint=hint)
        return
    for name, scale in adapters.items():
        if not isinstance(name, str | Path):
            yield Problem(repr(name), "adapter", type(name).__name__, "a name or a path")
        number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not number or not math.isfinite(scale):
            yield Problem(str(name), "scale", repr(scale), "a finite number")
