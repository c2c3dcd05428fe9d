"""Put new weights into compiled inference engines in milliseconds, and verify the result.

Importing this package does not import torch: each public name is imported at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from refitkit.version import __version__

if TYPE_CHECKING:
    from refitkit.api import compile, diff, inspect, load, plan, refit, refit_all, verify  # noqa: A004
    from refitkit.builtin.merges.descriptions import TaskVectors, WeightedAverage
    from refitkit.builtin.torch_tensorrt.upstream import tensorrt_converter
    from refitkit.config import Config
    from refitkit.errors import (
        CompileError,
        ConfigError,
        DeadlockError,
        EngineError,
        InputMismatchError,
        ModuleLostError,
        NotRefittableError,
        PlanMismatchError,
        PluginError,
        Problem,
        RefitError,
        RefitInProgressError,
        ResourceError,
        SourceError,
        ToolchainError,
        UnmappedSlotError,
        UnsupportedTargetError,
        UpdateStateError,
        VerificationError,
        WeightMismatchError,
    )
    from refitkit.hookspecs import hookimpl
    from refitkit.live import WeightReceiver
    from refitkit.model import DiffReport, RefitReport, UpdateManifest, VerificationResult
    from refitkit.pipeline import CompiledModule, Pipeline, RefitResult, RefitResults
    from refitkit.recipe import RefitPlan
    from refitkit.recipe.declarations import made_of

# ``import refitkit`` stays fast for the command line and for plugins, which seldom need every name.
# The table repeats the imports above because type checkers cannot follow it.
_HOMES = {
    "refitkit.api": ("compile", "diff", "inspect", "load", "plan", "refit", "refit_all", "verify"),
    "refitkit.builtin.merges.descriptions": ("TaskVectors", "WeightedAverage"),
    "refitkit.builtin.torch_tensorrt.upstream": ("tensorrt_converter",),
    "refitkit.config": ("Config",),
    "refitkit.errors": (
        "CompileError",
        "ConfigError",
        "DeadlockError",
        "EngineError",
        "InputMismatchError",
        "ModuleLostError",
        "NotRefittableError",
        "PlanMismatchError",
        "PluginError",
        "Problem",
        "RefitError",
        "RefitInProgressError",
        "ResourceError",
        "SourceError",
        "ToolchainError",
        "UnmappedSlotError",
        "UnsupportedTargetError",
        "UpdateStateError",
        "VerificationError",
        "WeightMismatchError",
    ),
    "refitkit.hookspecs": ("hookimpl",),
    "refitkit.live": ("WeightReceiver",),
    "refitkit.model": ("DiffReport", "RefitReport", "UpdateManifest", "VerificationResult"),
    "refitkit.pipeline": ("CompiledModule", "Pipeline", "RefitResult", "RefitResults"),
    "refitkit.recipe": ("RefitPlan",),
    "refitkit.recipe.declarations": ("made_of",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CompileError",
    "CompiledModule",
    "Config",
    "ConfigError",
    "DeadlockError",
    "DiffReport",
    "EngineError",
    "InputMismatchError",
    "ModuleLostError",
    "NotRefittableError",
    "Pipeline",
    "PlanMismatchError",
    "PluginError",
    "Problem",
    "RefitError",
    "RefitInProgressError",
    "RefitPlan",
    "RefitReport",
    "RefitResult",
    "RefitResults",
    "ResourceError",
    "SourceError",
    "TaskVectors",
    "ToolchainError",
    "UnmappedSlotError",
    "UnsupportedTargetError",
    "UpdateManifest",
    "UpdateStateError",
    "VerificationError",
    "VerificationResult",
    "WeightMismatchError",
    "WeightReceiver",
    "WeightedAverage",
    "__version__",
    "compile",
    "diff",
    "hookimpl",
    "inspect",
    "load",
    "made_of",
    "plan",
    "refit",
    "refit_all",
    "tensorrt_converter",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'refitkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value  # so that __getattr__ is not called for this name again
    return value


def __dir__() -> list[str]:
    return __all__
