"""Settings of a pipeline, checked when they are made.

``Config`` is the one place for settings; ``Config.of`` accepts plain data. Environment variables
add to it: ``switched_off`` and ``cache_folder`` combine both. pydantic checks the values, and its
messages become ``Problem`` entries at the end of this module.
"""

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

# A tolerance of infinity or NaN would accept any output.
Bound = Annotated[float, Field(ge=0, allow_inf_nan=False)]
NO_PLUGIN_VARIABLE = "REFITKIT_NO_PLUGIN"
"""Environment variable with the names of plugins to switch off, separated by commas."""

PLAN_CACHE_VARIABLE = "REFITKIT_PLAN_CACHE"
"""Environment variable with the folder of cached plans, if ``Config.plan_cache`` is None."""

TOLERANCES: dict[str, tuple[float, float]] = {
    "float64": (1e-9, 1e-9),
    "float32": (1e-5, 1e-4),
    "float16": (1e-3, 1e-2),
    "bfloat16": (1e-2, 5e-2),
    "complex64": (1e-5, 1e-4),
    "complex128": (1e-9, 1e-9),
}
"""``(absolute, relative)`` by dtype of an output. Outputs of other dtypes have to be equal."""


class Config(Frozen):
    """Settings of a pipeline; each has a default.

    Attributes:
        no_plugins: Names of plugins to switch off, built-in ones included. The environment variable
            ``REFITKIT_NO_PLUGIN`` adds names.
        strategies: Names of the mapping strategies to try, in this order; empty: all strategies,
            by priority.
        check_finite: Whether new values must be finite wherever the present ones are.
        direct: Whether weights may be written straight into the memory of a TensorRT engine, where
            refitkit has proved for that engine that the result is that of TensorRT's refitter,
            bit for bit. NVIDIA does not document this; see the guide to TensorRT.
        reread: Whether a refit reads files of weights twice. The second reading follows when
            everything is staged, and must have the same digests as the first. This finds writers
            that leave no trace in the file's times: see the guide to weights.
        rollback_limit: Largest number of bytes that one refit may hold for a rollback; None: no
            limit.
        rollback: Whether a refit keeps the old weights until the new ones are verified, unless the
            call passes ``rollback=``. If False, engines that support it overwrite their weights in
            place, and a failure loses the module.
        keep_base: Whether the first write of a slot copies its compiled value to host memory, so
            that ``CompiledModule.restore`` can bring it back. A module that was loaded from a file
            needs no copies: ``restore`` opens the file again.
        keep_versions: Number of refits that can be undone. Undoing the last refit needs no copy if
            the engines still have the old values; older versions are copied to host memory.
        keep_limit: Largest number of bytes for all these copies of one module; the oldest are
            dropped first. It also limits the results of a merge that a refit keeps until its end,
            so that they are computed once. None: no limit.
        tolerances: ``(absolute, relative)`` by dtype. An output passes the verifier ``outputs`` if
            no element differs by more than absolute + relative x the largest absolute element of
            the reference output. Missing dtypes have the defaults.
        delta: Whether refits write only slots whose weights changed, unless the call passes
            ``delta=``.
        changes: How a refit measures how far each slot moves, for ``RefitReport.changes``.
            ``sampled``: from at most 1024 elements of each slot; ``exact``: from all elements,
            which takes longer than the refit; ``off``: not at all.
        change_limit: Relative change above which the report's notes name a slot. A slot that moves
            by ten times its own norm has likely a wrong scale or weights of another model. None:
            never.
        plan_cache: Folder in which plans are cached, so that a program is planned once, and where
            TensorRT engines keep their weights, so that it is found out once. None: the folder that
            the environment variable ``REFITKIT_PLAN_CACHE`` names, if any. A user who can write to
            the folder decides which weight goes into which slot, so protect it like the engines.
        rules: Rules for names, packing and dtypes of weights; see
            :class:`~refitkit.model.rules.Rules`.
        plugin_settings: Settings of plugins, by the plugin's name. Each plugin defines its own. A
            name that is not a registered plugin's raises a ``ConfigError``.
    """

    no_plugins: frozenset[str] = frozenset()
    strategies: tuple[str, ...] = ()
    check_finite: bool = True
    direct: bool = True
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
            raise ValueError(f"unknown dtypes: {', '.join(unknown)}")
        # Users set the dtypes that they care about; the others keep their defaults.
        return {**TOLERANCES, **value}

    @classmethod
    def of(cls, settings: Config | Mapping[str, object] | None) -> Self:
        """A config from a config, from plain settings, or with all defaults for None.

        Raises:
            ConfigError: Settings do not exist or have wrong types; ``problems`` lists them all.
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
        """Names of plugins to switch off, from the settings and from the environment."""
        named = os.environ.get(NO_PLUGIN_VARIABLE, "").split(",")
        return self.no_plugins | {name.strip() for name in named if name.strip()}

    def cache_folder(self) -> Path | None:
        """Folder of cached plans, from the settings or the environment; None: no cache."""
        # An empty variable means no cache: Path("") would be the current folder.
        named = os.environ.get(PLAN_CACHE_VARIABLE, "").strip()
        return self.plan_cache or (Path(named) if named else None)


def _problem(error: ErrorDetails) -> Problem:
    """One error of pydantic as a problem, with a suggestion for a misspelt name."""
    where, found = tuple(map(str, error["loc"])), repr(error["input"])
    name = ".".join(where) or "config"
    if error["type"] == "extra_forbidden":
        near = get_close_matches(where[-1], _fields_at(where[:-1]), n=1)
        hint = f"did you mean {near[0]!r}?" if near else ""
        return Problem(name, "no such setting", found, hint=hint)
    kind = "unusable" if error["type"] == "value_error" else error["type"].replace("_", " ")
    # pydantic puts this prefix before the message of a validator's ValueError.
    return Problem(name, kind, found, hint=error["msg"].removeprefix("Value error, "))


def _fields_at(where: tuple[str, ...]) -> Iterable[str]:
    """Names of the settings at a place: in ``Config``, in its rules, or in one rule."""
    known: dict[tuple[str, ...], type[Frozen]] = {
        (): Config,
        ("rules",): Rules,
        ("rules", "rename"): Rename,
        ("rules", "pack"): Pack,
    }
    # A third part is the index of one rule in its list.
    model = known.get(where[:2])
    return () if model is None else model.model_fields
