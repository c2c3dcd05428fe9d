"""Where the time of one refit goes, on the side of the CPU; used by ``gpu_measure.py``."""

from __future__ import annotations

import cProfile
import io
import pstats
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack
from functools import wraps
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from gpu_raw import many

from refitkit.builtin.checks import finite, names
from refitkit.builtin.torch_tensorrt import engine as trt_engine
from refitkit.builtin.torch_tensorrt import filling
from refitkit.builtin.torch_tensorrt.engine import RefitterEngine
from refitkit.builtin.torch_tensorrt.filling import Filler
from refitkit.builtin.torch_tensorrt.refitter import PersistentRefitter
from refitkit.builtin.torch_tensorrt.weight_buffers import Uploader, WeightBuffers
from refitkit.pipeline import refit as refitting
from refitkit.pipeline.history import SnapshotBuilder
from refitkit.pipeline.report import ReportDraft
from refitkit.pipeline.stage import Staged
from refitkit.pipeline.transaction import ModuleTransaction, Transaction
from refitkit.program.bits import same_bits
from refitkit.recipe.plan import RefitPlan
from refitkit.recipe.replay import Replay

if TYPE_CHECKING:
    from collections.abc import Callable

    import refitkit

RUNS, SHOWN = 12, 45
WATCHED: tuple[tuple[Any, str], ...] = (
    (refitting, "for_one_refit"),
    (RefitPlan, "check_engines"),
    (refitting, "map_slots"),
    (refitting, "check_weights"),
    (names.NameCheck, "__init__"),
    (finite, "_non_finite"),
    (refitting, "check_abilities"),
    (refitting, "require_all_slots"),
    (refitting, "overridden_by"),
    (trt_engine, "require_values"),
    (WeightBuffers, "begin_staging"),
    (Filler, "fill"),
    (filling, "_mismatches"),
    (Replay, "value"),
    (Uploader, "copy"),
    (Uploader, "finish"),
    (RefitterEngine, "_check_finite"),
    (WeightBuffers, "changed"),
    (Transaction, "run"),
    (ModuleTransaction, "stage"),
    (ModuleTransaction, "synchronize"),
    (ModuleTransaction, "conclude"),
    (Staged, "fill"),
    (SnapshotBuilder, "__init__"),
    (PersistentRefitter, "_run"),
    (ReportDraft, "report"),
)
"""Functions that are timed, inner ones included in outer ones: owner and name."""


def profiled(
    compiled: refitkit.CompiledModule,
    refit: Callable[[int], Any],
    states: list[dict[str, torch.Tensor]],
) -> dict[str, Any]:
    """Milliseconds and calls of what is watched, a profile as text, and what else could be done."""
    for number in range(2):
        refit(number)
    return {
        "watched": watched(refit),
        "functions": _functions(refit),
        "alternatives": alternatives(compiled, states),
    }


def watched(refit: Callable[[int], Any]) -> dict[str, Any]:
    """Medians over refits: milliseconds and number of calls of each watched function."""
    runs = []
    for number in range(RUNS):
        times: dict[str, list[float]] = defaultdict(list)
        with ExitStack() as stack:
            for owner, name in WATCHED:
                where = getattr(owner, "__qualname__", owner.__name__.rpartition(".")[2])
                real, key = getattr(owner, name), f"{where}.{name}"
                stack.enter_context(mock.patch.object(owner, name, _timed(real, times[key])))
            torch.cuda.synchronize()
            start = time.perf_counter()
            refit(number % 2)
            times["whole"].append(time.perf_counter() - start)
        runs.append(times)
    return {
        key: {
            "ms": statistics.median(sum(run[key]) for run in runs) * 1e3,
            "calls": len(runs[-1][key]),
        }
        for key in runs[0]
    }


def _timed(real: Any, times: list[float]) -> Any:
    @wraps(real)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            times.append(time.perf_counter() - start)

    return call


def _functions(refit: Callable[[int], Any]) -> str:
    """What Python's profiler says of some refits, slowest first without what they call."""
    profile = cProfile.Profile()
    profile.enable()
    for number in range(RUNS):
        refit(number % 2)
    profile.disable()
    text = io.StringIO()
    stats = pstats.Stats(profile, stream=text).strip_dirs()
    stats.sort_stats("tottime").print_stats(SHOWN)
    stats.sort_stats("cumtime").print_stats(SHOWN)
    return text.getvalue()


def alternatives(
    compiled: refitkit.CompiledModule, states: list[dict[str, torch.Tensor]]
) -> dict[str, float]:
    """Milliseconds of ways to do the parts of a refit, each until the device is done."""
    engines = [one for one in compiled.engines.values() if isinstance(one, RefitterEngine)]
    if len(engines) != 1:
        return {}
    (engine,) = engines
    assert compiled.plan
    plan, buffers = compiled.plan, engine.buffers
    made = [plan.materialize(state)[engine.name] for state in states]
    own = [{name: value.clone().reshape(-1) for name, value in one.items()} for one in made]
    rooms = {name: torch.empty_like(value) for name, value in own[0].items()}
    uploader = Uploader(engine.device)
    flat, other = buffers.staging.memory, torch.empty_like(buffers.staging.memory)

    def by_one(number: int) -> None:
        for name, value in own[number % 2].items():
            rooms[name].copy_(value, non_blocking=True)

    def by_uploader(number: int) -> None:
        for name, value in made[number % 2].items():
            uploader.copy(rooms[name], value)
        uploader.finish()

    def together(number: int) -> None:
        values = own[number % 2]
        torch._foreach_copy_([rooms[name] for name in values], list(values.values()))

    ways: dict[str, Callable[[int], Any]] = {
        "materialize": lambda number: plan.materialize(states[number % 2]),
        "copies by the uploader": by_uploader,
        "copies one by one": by_one,
        "copies as one call": together,
        "set aside, one copy": lambda _: other.copy_(flat),
        "compare two sets": lambda _: same_bits(flat, other),
        "least and greatest of all": lambda _: [
            bool(torch.isfinite(torch.stack(torch.aminmax(run))).all())
            for run in buffers.staging.runs.values()
            if run.is_floating_point()
        ],
        "device idle": lambda _: torch.cuda.synchronize(),
        "TensorRT's refit": lambda _: engine.refit(),
    }
    return {name: statistics.median(many(way, 20, 1.0)) * 1e3 for name, way in ways.items()}
