"""The factor of each module's product: from alpha and rank, or the problem that it is unknown.

Nothing is assumed. Loaders do: without any alpha, diffusers (``get_peft_kwargs`` in
``utils/peft_utils.py``, 0.42.1) and kohya's scripts (``create_network_from_weights`` in
``networks/lora.py``: "support old LoRA without alpha") take the rank. That is wrong, without a
word, for every file whose alpha was left behind: in ``adapter_config.json``, or in a header that a
conversion dropped. A user who knows better gives alpha, or ``"rank"``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from refitkit.errors import Problem

from refitkit_peft.config import AdapterConfig
from refitkit_peft.declarations import DENOISERS, is_component
from refitkit_peft.keys import PEFT_PREFIX, Part

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from refitkit_peft.adapter import ModuleParts
    from refitkit_peft.declarations import Declaration
    from refitkit_peft.lora import Alpha

UNKNOWN = "alpha unknown"
"""The kind of problem of modules whose scale is nowhere."""

_COMPARED = ("r", "rank_pattern", "use_rslora", "use_dora", "fan_in_fan_out")
_COMPARED_ALPHAS = ("lora_alpha", "alpha_pattern")
_SAY = "give the adapter an alpha of your own to say which is right"


@dataclass(frozen=True)
class _Known:
    """Everything that is declared for one module.

    Attributes:
        config: The declared fields together; None if nothing is declared.
        where: Where alpha is declared, for messages.
        for_all: Whether that is for all layers of the component.
        by_layer: The setting by which layers have alphas of their own; then ``config`` has none.
        of_rank: Whether alpha is the rank by definition.
        problems: Declarations that contradict one another.
    """

    config: AdapterConfig | None
    where: str = ""
    for_all: bool = False
    by_layer: str = ""
    of_rank: bool = False
    problems: tuple[Problem, ...] = ()


class Scales:
    """Alpha and rank of each module of one adapter."""

    def __init__(
        self,
        declarations: Sequence[Declaration],
        alpha: Alpha | None,
        modules: Collection[ModuleParts],
    ) -> None:
        """Find the declarations for each module.

        Args:
            declarations: All declarations of its files.
            alpha: The user's own alpha, in place of every other one; None: there is none.
            modules: The adapter's modules.
        """
        self._alpha = alpha
        self._declarations = declarations
        bare = [parts for parts in modules if Part.ALPHA not in parts.parts]
        ranks = {parts.rank for parts in bare if parts.rank}
        self._mixed = len(ranks) > 1
        self._by_scope: dict[str, list[int]] = {}
        for number, one in enumerate(declarations):
            self._by_scope.setdefault(one.scope, []).append(number)
        self._components = {one.scope for one in declarations if one.scope and one.of_component}
        self._merged: dict[tuple[int, ...], _Known] = {}
        self._known = {parts.module: self._find(parts) for parts in modules}

    @property
    def problems(self) -> Iterator[Problem]:
        """Declarations that contradict one another, each once."""
        found = {p: None for known in self._merged.values() for p in known.problems}
        return iter(found)

    def config(self, parts: ModuleParts) -> AdapterConfig:
        """The fields that are declared for a module."""
        return self._known[parts.module].config or AdapterConfig()

    def rank_problem(self, parts: ModuleParts, rank: int) -> Problem | None:
        """Whether the rank of a module's factors is another one than declared."""
        config = self.config(parts)
        wanted = {config.rank(*parts.names)}
        if parts.flat and config.rank_pattern:  # patterns are for names with dots
            wanted = {config.r, *config.rank_pattern.values()}
        if rank in wanted or None in wanted:
            return None
        shown = " or ".join(str(one) for one in sorted(one for one in wanted if one is not None))
        hint = "the tensors are not those that the config is of"
        return Problem(parts.key, "rank", str(rank), f"{shown}, as the config says", hint)

    def scaling(self, parts: ModuleParts, rank: int) -> tuple[float, Problem | None]:
        """The factor of a module's product, before the user's scale; or why it is unknown."""
        config = self.config(parts)
        found: float | Problem
        if self._alpha == "rank":
            found = 1.0
        elif self._alpha is not None:
            found = config.scaling_of(self._alpha, rank)
        else:
            patterns = parts.flat and bool(config.alpha_pattern)  # those are for names with dots
            declared = None if patterns else config.scaling(rank, *parts.names)
            tensor = parts.parts.get(Part.ALPHA)
            if tensor is not None:
                found = self._of_tensor(parts, tensor, rank, declared)
            elif declared is not None:
                found = self._of_declared(parts, declared)
            else:
                found = self._of_nothing(parts)
        if isinstance(found, Problem):
            return 1.0, found
        return found * (2 if parts.twice else 1), None

    def _of_nothing(self, parts: ModuleParts) -> float | Problem:
        """The scale of a module whose alpha is neither a tensor nor declared."""
        known = self._known[parts.module]
        if known.of_rank and any(".lora_A" in key for key in parts.keys.values()):
            return 1.0
        if self.config(parts).alpha_pattern:
            hint = f"alpha_pattern is for names with dots; {_SAY}"
            return Problem(parts.module, "unclear", "names with underscores", hint=hint)
        found = f"{known.by_layer}, and no tensor for it" if known.by_layer else ""
        return Problem(parts.module, UNKNOWN, found)

    def _of_declared(self, parts: ModuleParts, declared: float) -> float | Problem:
        known = self._known[parts.module]
        if known.of_rank and not math.isclose(declared, 1.0, rel_tol=1e-6):
            found = f"{known.where}, and files of ai-toolkit have a scale of 1"
            return Problem(parts.module, "contradiction", found, hint=_SAY)
        if self._mixed and known.for_all and self.config(parts).r is None:
            hint = f"one alpha without a rank, and layers of several ranks; {_SAY}"
            return Problem(parts.module, "unclear", known.where, hint=hint)
        return declared

    def _of_tensor(
        self,
        parts: ModuleParts,
        tensor: torch.Tensor,
        rank: int,
        declared: float | None,
    ) -> float | Problem:
        """``alpha / rank``, as kohya's scripts and all that read their files have it."""
        key, known = parts.keys[Part.ALPHA], self._known[parts.module]
        if tensor.numel() != 1 or tensor.is_complex():
            return 1.0  # the adapter itself has that among its problems
        alpha = float(tensor)
        if not math.isfinite(alpha) or alpha <= 0:
            kind = "number" if math.isfinite(alpha) else "non-finite"
            return Problem(key, kind, f"{alpha:g}", "a number greater than 0", _SAY)
        found = alpha / rank
        if declared is None:
            if self.config(parts).use_rslora and not known.by_layer:
                hint = f"is it divided by the rank, or by its square root? {_SAY}"
                return Problem(key, "unclear", "an alpha, and use_rslora", hint=hint)
            return found
        floating = tensor.dtype.is_floating_point
        tolerance = 1e-6 + (2 * torch.finfo(tensor.dtype).eps if floating else 0.0)
        if not math.isclose(found, declared, rel_tol=tolerance):
            shown = f"a scale of {found:g} = {alpha:g} / {rank}"
            wanted = f"{declared:g}, as {known.where} says"
            return Problem(key, "contradiction", shown, wanted, _SAY)
        return found

    # -- which declarations are for a module ----------------------------------------------------

    def _find(self, parts: ModuleParts) -> _Known:
        scopes = {"", *self._scopes_of(parts)}
        found = sorted(number for scope in scopes for number in self._by_scope.get(scope, ()))
        key = (*found, -1) if parts.has_kernel else tuple(found)
        if key not in self._merged:
            self._merged[key] = self._merge([self._declarations[n] for n in found], parts)
        return self._merged[key]

    def _scopes_of(self, parts: ModuleParts) -> Iterator[str]:
        """Scopes that a module is in: all beginnings of its path, and its component."""
        path = parts.key.removeprefix(PEFT_PREFIX).split(".")
        yield from itertools.accumulate(path, lambda before, part: f"{before}.{part}")
        own = parts.component or path[0]
        yield own
        others = self._components & DENOISERS if own in DENOISERS else self._components
        named = own in self._components if own in DENOISERS else is_component(own)
        if not named and len(others) == 1:  # one model by several names, or by none
            yield from others

    def _merge(self, declarations: Sequence[Declaration], parts: ModuleParts) -> _Known:
        fields: dict[str, object] = {}
        places: dict[str, Declaration] = {}
        problems: list[Problem] = []
        names = _COMPARED if self._alpha is not None else (*_COMPARED, *_COMPARED_ALPHAS)
        # those for single layers come last, and are meant to differ
        ordered = sorted(declarations, key=lambda one: not one.of_component and len(one.scope))
        for one in ordered:
            config = one.conv if one.conv is not None and parts.has_kernel else one.config
            given = config.model_dump(exclude_unset=True)
            if one.by_layer:
                given = {k: v for k, v in given.items() if k not in {"r", "lora_alpha"}}
            for name, value in given.items():
                first = places.get(name, one)
                comparable = one.of_component or one.scope == first.scope
                if comparable and name in names and fields.get(name, value) != value:
                    found = f"{fields[name]} in {first.where}, {value} in {one.where}"
                    problems.append(Problem(name, "contradiction", found, "one value", _SAY))
                fields[name] = value
                places[name] = one
        alpha = places.get("lora_alpha", places.get("alpha_pattern"))
        return _Known(
            AdapterConfig.model_validate(fields) if fields else None,
            "" if alpha is None else alpha.where,
            alpha is not None and alpha.of_component,
            next((one.by_layer for one in ordered if one.by_layer), ""),
            any(one.of_rank for one in ordered),
            tuple(problems),
        )
