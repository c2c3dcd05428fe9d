"""Tasks: what users ask of refits, as what is done in one transaction."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refitkit.pipeline.refit import RefitTask, RefitRequest, as_jobs
from refitkit.pipeline.restore import RestoreRequest, RestoreTask
from refitkit.pipeline.result import RefitResult, RefitResults
from refitkit.pipeline.together import Task, each, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from refitkit.pipeline.compiled import CompiledModule
    from refitkit.pipeline.pipeline import Pipeline




def refit_task(
    pipeline: Pipeline, compiled: CompiledModule, weights: object, options: Mapping[str, Any]
) -> Task:
    """New weights for a module.

    Args:
        pipeline: What has the plugins and settings.
        compiled: The module.
        weights: The weights, as the user gave them.
        options: Arguments of ``Pipeline.refit``; what is None is as the settings say.
    """
    config = pipeline.config
    chosen = {name: value for name, value in options.items() if value is not None}
    wish = RefitRequest(weights, **{"delta": config.delta, "rollback": config.rollback, **chosen})
    return RefitTask(pipeline.host, config, compiled, wish)


def refit_tasks(
    pipeline: Pipeline, modules: Iterable[Sequence[Any]], how: dict[str, Any], handle: Callable[[object], CompiledModule]
) -> list[Task]:
    """New weights for several modules; see ``Pipeline.refit_all``.

    Args:
        pipeline: What has the plugins and settings.
        modules: Targets, weights and, for some, options.
        how: Options for all.
        handle: Makes a handle of a target.

    Raises:
        ConfigError: Something else than those.
        RefitError: Targets cannot be opened; with the problems of all.
    """
    jobs = as_jobs(modules, how)
    opened = _opened([target for target, _, _ in jobs], handle)
    return [
        refit_task(pipeline, compiled, weights, options)
        for compiled, (_, weights, options) in zip(opened, jobs, strict=True)
    ]


def _opened(targets: Sequence[object], handle: Callable[[object], CompiledModule]) -> list[CompiledModule]:
    """Handles of targets: the same one for an object that is given twice, which is refused."""
    handles: dict[int, CompiledModule] = {}

    def once(target: object) -> CompiledModule:
        if isinstance(target, str | Path):  # each is opened anew
            return handle(target)
        if id(target) not in handles:
            handles[id(target)] = handle(target)
        return handles[id(target)]

    names = [f"module {number}" for number in range(1, len(targets) + 1)]
    return each(names, [partial(once, target) for target in targets])


def return_task(
    pipeline: Pipeline, compiled: CompiledModule, back: RestoreRequest, *, delta: bool | None = None
) -> Task:
    """Earlier weights for a module: a refit to ``compiled.base``, or what was kept.

    Args:
        pipeline: What has the plugins and settings.
        compiled: The module.
        back: What the user asks for.
        delta: Whether a refit writes only what is not there; None: as the settings say.
    """
    if back.version != 0 or compiled.base is None:
        return RestoreTask(pipeline.host, pipeline.config, compiled, back)
    options = {
        "inputs": back.inputs,
        "reference": back.reference,
        "verify": back.verify,
        "delta": delta,
    }
    return refit_task(pipeline, compiled, compiled.base, options)


def run_tasks(pipeline: Pipeline, tasks: Sequence[Task]) -> RefitResults:
    """Do all tasks in one transaction; see :func:`refitkit.pipeline.together.run`."""
    outcomes = run(pipeline.host, pipeline.config, tasks)
    return RefitResults(
        RefitResult(task.compiled, outcome, pipeline)
        for task, outcome in zip(tasks, outcomes, strict=True)
    )
