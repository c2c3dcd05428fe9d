"""Settings of a pipeline."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator

from refitkit.errors import ConfigError, Problem
from refitkit.model.base import Frozen
from refitkit.model.rules import Pack, Rename, Rules
from refitkit.model.slot import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic_core import ErrorDetails

Bound = Annotated[float, Field(ge=0, allow_inf_nan=False)]
NO_PLUGIN_VARIABLE = "REFITKIT_NO_PLUGIN"
"""Environment variable: names of plugins to switch off, separated by commas."""

PLAN_CACHE_VARIABLE = "REFITKIT_PLAN_CACHE"
"""Environment variable: folder in which plans are kept, where ``Config.plan_cache`` names none."""

TOLERANCES: dict[str, tuple[float, float]] = {
    "float64": (1e-9, 1e-9),
    "float32": (1e-5, 1e-4),
    "float16": (1e-3, 1e-2),
    "bfloat16": (1e-2, 5e-2),
    "complex64": (1e-5, 1e-4),
    "complex128": (1e-9, 1e-9),
}
"""``(absolute, relative)`` by dtype of an output. Every other dtype has to be equal."""


class Config(Frozen):
    """Settings of a pipeline; all have a default.

    Attributes:
        no_plugins: Names of plugins to switch off, built-in ones included. Names in the
            environment variable ``REFITKIT_NO_PLUGIN`` are added.
        strategies: Names of the mapping strategies to try, in this order; empty: all, by priority.
        check_finite: Whether new values must be finite wherever the present ones are.
        reread: Whether all that a refit read from files is read a second time, once everything is
            staged, and held against digests of the first reading. For writers that leave no trace
            in the file's times: see the guide to weights.
        rollback_limit: Most bytes that one refit may hold for the way back; None: no limit.
        rollback: Whether the weights from before are held until the new ones are verified, where
            ``rollback=`` is not given. Without, engines that can write over them, and what fails
            then loses the module.
        keep_base: Whether what slots hold as compiled is copied to memory of the host when they are
            first written, so that ``CompiledModule.restore`` can bring it back. Of a module that
            was loaded from a file no copies are made: that is opened again.
        keep_versions: How many refits can be undone. The last one costs nothing where engines have
            the values from before anyway; more are copied to memory of the host.
        keep_limit: Most bytes that all those copies of one module may take; older ones go first.
            And most bytes of what a merge makes that a refit keeps until it is over, so that it is
            made once. None: no limit.
        tolerances: ``(absolute, relative)`` by dtype: an output passes the verifier ``outputs`` if
            no element differs by more than absolute + relative x the largest absolute element of
            the reference output.
        delta: Whether refits write only slots whose weights changed, where ``delta=`` is not given.
        changes: Whether a refit measures how far each slot moves, for ``RefitReport.changes``:
            ``sampled``: from at most 1024 elements of each; ``exact``: from all of them, which
            takes longer than the refit; ``off``: not at all.
        change_limit: A slot whose relative change is larger is named in the report's notes: ten
            times farther than it was long is likely a wrong scale or another model's. None: never.
        plan_cache: Folder in which plans are kept, so that the same program is not planned twice;
            None: the one that the environment variable ``REFITKIT_PLAN_CACHE`` names, if any. Who
            can write to it decides which weight goes where: it must be as safe as the engines.
        rules: How names, packing and dtypes of weights become those of the program; see
            :class:`~refitkit.model.rules.Rules`.
        plugin_settings: Settings of plugins, by the plugin's name; what they may be, each plugin
            says. Settings of a plugin that does not exist are a ``ConfigError``.
    """

    no_plugins: frozenset[str] = frozenset()
    strategies: tuple[str, ...] = ()
    check_finite: bool = True
    reread: bool = False
    rollback_limit: int | None = Field(default=None, ge=0)
    rollback: bool = True
    keep_base: bool = False
    keep_versions: int = Field(default=1, ge=0)
    keep_limit: int | None = Field(default=1 << 30, ge=0)
    tolerances: dict[str, tuple[Bound, Bound]] = Field(default_factory=lambda: dict(TOLERANCES))
    delta: bool = False
    changes: Literal["sampled", "exact", "off"] = "off"
    change_limit: float | None = Field(default=10.0, gt=0, allow_inf_nan=False)
    plan_cache: Path | None = None
    rules: Rules = Field(default_factory=Rules)
    plugin_settings: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("tolerances")
    @classmethod
    def _over_defaults(
        cls, value: dict[str, tuple[float, float]]
    ) -> dict[str, tuple[float, float]]:
        unknown = sorted(value.keys() - ITEM_BYTES.keys())
        if unknown:
            raise ValueError(f"there are no dtypes {', '.join(unknown)}")
        return {**TOLERANCES, **value}

    @classmethod
    def of(cls, settings: Config | Mapping[str, object] | None) -> Self:
        """A config from a config, from plain settings, or from nothing.

        Raises:
            ConfigError: A setting does not exist or has a wrong type; names all of them.
        """
        if settings is None:
            return cls()
        if isinstance(settings, cls):
            return settings
        try:
            return cls.model_validate(settings)
        except ValidationError as exc:
            problems = [_problem(error) for error in exc.errors()]
            raise ConfigError("These settings cannot be used.", problems=problems) from exc

    def switched_off(self) -> frozenset[str]:
        """Names of all plugins to switch off: those of the settings and of the environment."""
        named = os.environ.get(NO_PLUGIN_VARIABLE, "").split(",")
        return self.no_plugins | {name.strip() for name in named if name.strip()}

    def cache_folder(self) -> Path | None:
        """Where plans are kept: as the settings say, else the environment; None: nowhere."""
        named = os.environ.get(PLAN_CACHE_VARIABLE, "").strip()
        return self.plan_cache or (Path(named) if named else None)


def _problem(error: ErrorDetails) -> Problem:
    """What is wrong with one setting, without the words of the library that found it."""
    where, found = tuple(map(str, error["loc"])), repr(error["input"])
    name = ".".join(where) or "config"
    if error["type"] == "extra_forbidden":
        near = get_close_matches(where[-1], _fields_at(where[:-1]), n=1)
        hint = f"did you mean {near[0]!r}?" if near else ""
        return Problem(name, "no such setting", found, hint=hint)
    kind = "unusable" if error["type"] == "value_error" else error["type"].replace("_", " ")
    return Problem(name, kind, found, hint=error["msg"].removeprefix("Value error, "))


def _fields_at(where: tuple[str, ...]) -> Iterable[str]:
    """Names of the settings there: of ``Config``, of its rules, of one of these."""
    known: dict[tuple[str, ...], type[Frozen]] = {
        (): Config,
        ("rules",): Rules,
        ("rules", "rename"): Rename,
        ("rules", "pack"): Pack,
    }
    model = known.get(where[:2])
    return () if model is None else model.model_fields
