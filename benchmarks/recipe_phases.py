"""What the benchmark of recipes measures of one model; each function runs in its own process.

The reference is upstream's own code, called as ``torch_tensorrt/dynamo/_refit.py`` (2.14) calls it
at each refit, as far as the values of slots; no engine is built.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import time
import warnings
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from memory_probe import Probe
from recipe_models import HUGE, MODELS, TINY
from safetensors.torch import load_file, save_file

import refitkit
from refitkit.builtin.torch_tensorrt import upstream
from refitkit.program.bits import same_bits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from recipe_models import Model

    from refitkit.model import Slot

BACKEND = "tensorrt_network"
OPTIONS = {"min_block_size": 1}
SEEDS = (1, 2)
"""Weights that the plan was not made with."""
CALLS = 21
SELDOM = 0.02
"""Seconds between two looks at the processes that plan."""
PLAN, WEIGHTS = "model.refitplan", "model.safetensors"
_ALIGNMENT = 64
State = dict[str, torch.Tensor]
T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and what it gave."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def spent(work: Callable[[], T]) -> tuple[float, float, T]:
    """Seconds, those that processors worked for this process, and what it gave."""
    before = time.process_time()
    took, result = timed(work)
    return took, time.process_time() - before, result


class Reference:
    """Upstream's way from a module to the values of slots."""

    def __init__(self) -> None:
        """Import torch_tensorrt."""
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        self._package = upstream.import_headless()
        from torch_tensorrt.dynamo import CompilationSettings

        # the reference refits nothing else; recipes are for engines without the flag, too
        self.settings = CompilationSettings(
            immutable_weights=False, device=self._package.Device("cuda:0"), **OPTIONS
        )

    def run(self, model: Model, module: torch.nn.Module) -> tuple[dict[str, float], dict[Any, Any]]:
        """Seconds of each stage, and values by engine and slot."""
        took: dict[str, float] = {}
        took["export"], program = timed(lambda: model.export(module))
        took["lower"], lowered = timed(lambda: self._lowered(program))
        took["partition"], parts = timed(lambda: self._parts(lowered))
        took["interpret"], values = timed(lambda: self._values(parts))
        return took, values

    def _lowered(self, program: Any) -> Any:
        from torch_tensorrt.dynamo import lowering

        st = self.settings
        program = lowering.pre_export_lowering(program, st)
        table = lowering.get_decompositions(
            st.enable_experimental_decompositions,
            st.decompose_attention,
            st.use_distributed_mode_trace,
            use_fp32_acc=st.use_fp32_acc,
        )
        return lowering.post_lowering(program.run_decompositions(table).module(), st)

    def _parts(self, lowered: Any) -> list[tuple[str, Any]]:
        from torch_tensorrt.dynamo import partitioning
        from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_CONVERTERS

        st = self.settings
        DYNAMO_CONVERTERS.set_compilation_settings(st)
        supported, total = partitioning.get_graph_converter_support(lowered, st.torch_executed_ops)
        whole, _ = partitioning.fast_partition(
            lowered,
            min_block_size=st.min_block_size,
            torch_executed_ops=st.torch_executed_ops,
            require_full_compilation=st.require_full_compilation,
            skip_fusion=supported == total,
        )
        return [(name, part) for name, part in whole.named_children() if "_run_on_acc" in name]

    def _values(self, parts: list[tuple[str, Any]]) -> dict[Any, Any]:
        from torch_tensorrt.dynamo import _refit, partitioning

        found: dict[Any, Any] = {}
        for name, part in parts:
            inputs = partitioning.construct_submodule_inputs(part)
            weights = _refit.construct_refit_mapping(part, inputs, self.settings)
            found.update({(name, slot): value for slot, value in weights.items()})
        return found


def plan_of(model: Model, module: torch.nn.Module) -> Any:
    """A plan, made offline."""
    program = model.export(module)
    return refitkit.plan(program, backend=BACKEND, options=OPTIONS, prove=False)


# -- speed --------------------------------------------------------------------------------------


def speed(name: str, folder: Path) -> dict[str, Any]:
    """The reference against a plan's replay, in one process; leaves plan and weights behind."""
    model, reference = MODELS[name], Reference()
    plan_of(TINY, TINY.new(0))  # imports, and starts what plans
    reference.run(TINY, TINY.new(0))
    stages: list[dict[str, float]] = []
    references: list[float] = []
    references_cpu: list[float] = []
    planning: list[float] = []
    planning_cpu: list[float] = []
    values: dict[Any, Any] = {}
    states: list[State] = []
    for seed in SEEDS:
        program = model.export(model.new(0))
        with Probe(SELDOM) as probe:
            took, plan = timed(
                partial(refitkit.plan, program, backend=BACKEND, options=OPTIONS, prove=False)
            )
        planning.append(took)
        planning_cpu.append(probe.worked)
        del program
        module = model.new(seed)
        took, worked, (found, values) = spent(partial(reference.run, model, module))
        stages.append(found)
        references.append(took)
        references_cpu.append(worked)
        states.append(module.state_dict())
    plan.save(folder / PLAN)
    kept = {fqn: value.clone().contiguous() for fqn, value in states[0].items()}
    save_file(kept, folder / WEIGHTS)
    rows = plan.ledger
    result = {
        "reference threads": torch.get_num_threads(),
        "slots": len(rows),
        "slot_bytes": sum(row.slot.nbytes for row in rows),
        "states": {str(s): sum(row.state == s for row in rows) for s in {r.state for r in rows}},
        "calls": len(plan.data.calls),
        "plan_bytes": (folder / PLAN).stat().st_size,
        "weight_bytes": sum(value.nbytes for value in states[0].values()),
        "stages": {stage: [found[stage] for found in stages] for stage in stages[0]},
        "reference": references,
        "reference cpu": references_cpu,
        "reference_slots": len(values),
        "planning": planning,
        "planning cpu": planning_cpu,
    }
    del module
    gc.collect()
    try:
        result.update(replayed(plan, states, values))
    except refitkit.RefitError as exc:
        result["error"] = f"{type(exc).__name__}: {exc.message}"
    return result


def replayed(plan: Any, states: list[State], truth: dict[Any, Any]) -> dict[str, Any]:
    """Times of the replay, of a copy of as many bytes, and of writing values in one piece.

    All with one thread: several suffer from other work on the machine far more than one does.
    """
    torch.set_num_threads(1)
    first, _ = timed(lambda: plan.materialize(states[0]))
    slots = [row.slot for row in plan.ledger]
    staging = Staging(slots)
    other = torch.zeros_like(staging.whole)
    took: dict[str, list[float]] = defaultdict(list)
    for call in range(-2, CALLS):  # the first two warm up
        state = states[call % len(states)]  # so no call finds the weights of the one before
        works: dict[str, Callable[[], object]] = {
            "materialize": partial(plan.materialize, state),
            "memmove": partial(other.copy_, staging.whole),
            "staged": partial(staging.fill, plan, state),
        }
        for what, work in works.items():
            seconds, worked, _ = spent(work)
            if call >= 0:
                took[what].append(seconds)
                took[f"{what} cpu"].append(worked)
    found = plan.materialize(states[-1])
    return {"first": first, **took, **compared(found, truth)}


def compared(found: dict[str, dict[str, torch.Tensor]], truth: dict[Any, Any]) -> dict[str, Any]:
    """How many values are bit for bit those of the reference, and which are not."""
    flat = {(engine, slot): v for engine, slots in found.items() for slot, v in slots.items()}
    both = [key for key in truth if key in flat]
    wrong = [
        "/".join(key)
        for key in both
        if flat[key].numel() != truth[key].numel()
        or not same_bits(flat[key].detach().reshape(-1), truth[key].detach().reshape(-1))
    ]
    return {"equal": len(both) - len(wrong), "wrong": wrong, "of": len(truth)}


class Staging:
    """Memory for all slots in one piece, touched before: what an engine reads."""

    def __init__(self, slots: list[Slot]) -> None:
        sizes = [-(-slot.nbytes // _ALIGNMENT) * _ALIGNMENT for slot in slots]
        self.whole = torch.zeros(sum(sizes), dtype=torch.uint8)
        self._views: dict[tuple[str, str], torch.Tensor] = {}
        start = 0
        for slot, size in zip(slots, sizes, strict=True):
            raw = self.whole[start : start + slot.nbytes]
            self._views[slot.key] = raw.view(getattr(torch, slot.dtype))
            start += size

    def fill(self, plan: Any, state: State) -> None:
        """Compute all values and write them here."""
        with torch.no_grad():
            for slot, value in plan.iter_slots(state):
                self._views[slot.key].view(value.shape).copy_(value)


# -- memory -------------------------------------------------------------------------------------


def settle() -> None:
    """Give free memory back, so that what is taken from now on shows."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def probed(work: Callable[[], object], times: int = 1) -> dict[str, Any]:
    """Peaks while it runs, results alive."""
    settle()
    with Probe() as probe:
        for _ in range(times):
            work()
    return {"own": probe.own, "all": probe.all, "children": probe.children}


def memory_materialize(name: str, folder: Path) -> dict[str, Any]:
    """Of values from a file, all at once and one after another."""
    del name
    plan = refitkit.RefitPlan.load(folder / PLAN)
    pipeline = refitkit.Pipeline()
    source = pipeline.open_weights(folder / WEIGHTS)
    first = probed(lambda: plan.materialize(source))
    later = probed(lambda: plan.materialize(source), 5)

    def stream() -> None:
        for _ in plan.iter_slots(source):
            pass

    return {"first": first, "later": later, "stream": probed(stream, 5)}


def memory_refit(name: str, folder: Path, backend: str, options: dict[str, Any]) -> dict[str, Any]:
    """Of refits of a compiled module from a file."""
    model = MODELS[name]
    took, compiled = timed(
        lambda: refitkit.compile(model.export(model.new(0)), backend, options, prove=False)
    )
    plan = refitkit.RefitPlan.load(folder / PLAN) if backend == BACKEND else compiled.plan
    run = partial(refitkit.Pipeline().refit, compiled, folder / WEIGHTS, plan=plan, verify="none")
    return {"compile": took, "first": probed(run)}


def memory_network(name: str, folder: Path) -> dict[str, Any]:
    """Of refits of the backend ``tensorrt_network``."""
    return memory_refit(name, folder, BACKEND, OPTIONS)


def memory_aotinductor(name: str, folder: Path) -> dict[str, Any]:
    """Of refits of the backend ``aotinductor``."""
    return memory_refit(name, folder, "aotinductor", {})


def memory_reference(name: str, folder: Path) -> dict[str, Any]:
    """Of the reference, whose module holds mapped weights."""
    model, reference = MODELS[name], Reference()
    module = model.new(1)
    module.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    reference.run(TINY, TINY.new(0))
    kept: list[Any] = []
    return probed(lambda: kept.append(reference.run(model, module)))


def memory_huge(name: str, folder: Path) -> dict[str, Any]:
    """Of planning and replaying a model whose mapped weights hardly fit into memory."""
    del name
    with torch.device("meta"):
        module = HUGE.make().eval()
    module.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    plan_of(TINY, TINY.new(0))
    program = HUGE.export(module)
    made: list[Any] = []

    def work() -> None:
        plan = refitkit.plan(program, backend=BACKEND, options=OPTIONS, prove=False)
        made.append(plan)

    took, planning = timed(lambda: probed(work))
    result = {
        "weight_bytes": sum(value.nbytes for value in module.state_dict().values()),
        "seconds": took,
        "planning": planning,
    }
    plan = made.pop()
    try:
        source = refitkit.Pipeline().open_weights(folder / WEIGHTS)
        result["materialize"] = probed(lambda: plan.materialize(source))
    except refitkit.RefitError as exc:
        result["error"] = f"{type(exc).__name__}: {exc.message}"
    return result


PHASES: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    "speed": speed,
    "materialize": memory_materialize,
    "network": memory_network,
    "aotinductor": memory_aotinductor,
    "reference": memory_reference,
    "huge": memory_huge,
}
