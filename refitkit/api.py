"""The verbs as plain functions. They share one pipeline with all installed plugins.

If you need settings or explicit plugins, create a :class:`refitkit.Pipeline` and call its methods.
They document all arguments, results and errors.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from refitkit.pipeline import CompiledModule, Pipeline, RefitResult, RefitResults

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch.export import ExportedProgram

    from refitkit.model import DiffReport, VerificationResult
    from refitkit.protocols import SharedMemory
    from refitkit.recipe import RefitPlan


def compile(  # noqa: A001 - the name that users expect, as in torch.compile
    program: ExportedProgram,
    backend: str = "aotinductor",
    options: Mapping[str, Any] | None = None,
    *,
    prove: bool = True,
) -> CompiledModule:
    """Compile a program into a refittable module; see :meth:`refitkit.Pipeline.compile`."""
    return _pipeline().compile(program, backend, options, prove=prove)


def load(
    target: object,
    *,
    warm: bool = False,
    num_models: int = 1,
    shared: SharedMemory | None = None,
) -> CompiledModule:
    """Open a compiled or saved module; see :meth:`refitkit.Pipeline.load`.

    A saved module holds machine code, and loading it runs that code.
    """
    return _pipeline().load(target, warm=warm, num_models=num_models, shared=shared)


def plan(
    program: ExportedProgram,
    target: object = None,
    backend: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    prove: bool | None = None,
) -> RefitPlan:
    """Make a plan for a program and its module; see :meth:`refitkit.Pipeline.plan`."""
    return _pipeline().plan(program, target, backend, options, prove=prove)


def refit(  # noqa: PLR0913 - one verb; all but two are given by name
    target: object,
    weights: object,
    *,
    plan: RefitPlan | None = None,
    inputs: Any = None,
    reference: Any = None,
    verify: str | None = None,
    partial: bool = False,
    copy: bool = False,
    delta: bool | None = None,
    rollback: bool | None = None,
    reset_state: bool = False,
    donate: bool = False,
) -> RefitResult:
    """Put new weights into a compiled module; see :meth:`refitkit.Pipeline.refit`."""
    return _pipeline().refit(
        target,
        weights,
        plan=plan,
        inputs=inputs,
        reference=reference,
        verify=verify,
        partial=partial,
        copy=copy,
        delta=delta,
        rollback=rollback,
        reset_state=reset_state,
        donate=donate,
    )


def refit_all(modules: Iterable[Sequence[Any]], **how: Any) -> RefitResults:
    """Refit several modules in one transaction; see :meth:`refitkit.Pipeline.refit_all`."""
    return _pipeline().refit_all(modules, **how)


def verify(target: object, weights: object, **how: Any) -> VerificationResult:
    """Verify that a module holds weights; see :meth:`refitkit.Pipeline.verify`."""
    return _pipeline().verify(target, weights, **how)


def diff(a: object, b: object, **how: Any) -> DiffReport:
    """Compare two sets of weights; see :meth:`refitkit.Pipeline.diff`."""
    return _pipeline().diff(a, b, **how)


def inspect(path: str | Path) -> Mapping[str, Any]:
    """Describe a saved module without running its code; see :meth:`refitkit.Pipeline.describe`."""
    return _pipeline().describe(path)


def _pipeline() -> Pipeline:
    """The pipeline of all functions here, with the plugins that are installed now."""
    return _pipeline_for(tuple((path, _changed_at(path)) for path in sys.path))


@lru_cache(maxsize=1)
def _pipeline_for(_folders: tuple[tuple[str, int], ...]) -> Pipeline:
    """Finding and registering all plugins takes longer than a refit of a small model."""
    return Pipeline()


def _changed_at(path: str) -> int:
    """When something was last installed in a folder or removed, in nanoseconds; 0 if unknown."""
    try:
        return os.stat(path or ".").st_mtime_ns  # noqa: PTH116 - a Path takes longer than the call
    except OSError:
        return 0
