"""Probe of AOTInductor on CUDA: the second buffer, the swap, tensors of the host."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from gpu_models import exported, state_on
from gpu_raw import copies, many
from gpu_tables import gaps, rate, summary

import refitkit
from refitkit.program.bits import same_bits

WIDTH, LAYERS, RUNS = 2048, 8, 20
Found = dict[str, Any]


def model(seed: int) -> torch.nn.Module:
    """134 MB of linear layers."""
    torch.manual_seed(seed)
    layers = [
        layer for _ in range(LAYERS) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU())
    ]
    return torch.nn.Sequential(*layers).eval().cuda()


def aotinductor() -> Found:
    """Refits from the device and the host, as GB/s; what the container itself takes."""
    inputs = (torch.randn(4, WIDTH, device="cuda"),)
    models = [model(seed) for seed in (0, 1)]
    pipeline, plain = refitkit.Pipeline(), refitkit.Pipeline({"check_finite": False})
    start = time.perf_counter()
    compiled = pipeline.compile(exported(models[0], inputs), prove=False)
    found: Found = {"compile_s": time.perf_counter() - start, "torch": torch.__version__}
    nbytes = sum(slot.nbytes for slot in compiled.slots)
    found |= {"nbytes": nbytes, "copies": copies(nbytes)}
    states = {
        "device": [state_on(one, "cuda") for one in models],
        "pinned": [state_on(one, "cpu", pinned=True) for one in models],
        "pageable": [state_on(one, "cpu") for one in models],
    }
    free = torch.cuda.mem_get_info()[0]
    pipeline.refit(compiled, states["device"][1], verify="none")
    found["second buffer, bytes"] = free - torch.cuda.mem_get_info()[0]
    outputs = []
    for to in (0, 1, 0):
        pipeline.refit(compiled, states["device"][to], verify="none")
        outputs.append(compiled(*inputs).clone())
    found["A, B, A bit-equal"] = same_bits(outputs[0], outputs[2])
    with torch.no_grad():
        found["error of B"] = float((outputs[1] - models[1](*inputs)).abs().max())
    for source, pair in states.items():
        for name, one in (("", pipeline), (", not asked whether finite", plain)):
            times = many(
                lambda n, p=pair, one=one: one.refit(compiled, p[n % 2], verify="none"), RUNS
            )
            found[source + name] = {
                **summary(times),
                "GB/s": rate(nbytes, statistics.median(times) * 1e3),
            }
    found["swap"] = summary(many(lambda _: compiled.engines["model"].swap(), RUNS))
    found["calls"] = gaps(_calls(compiled, inputs))
    found["container"] = _container(compiled, states)
    return found


def _calls(compiled: Any, inputs: Any) -> list[float]:
    ends = []
    for _ in range(200):
        compiled(*inputs)
        torch.cuda.synchronize()
        ends.append(time.perf_counter())
    return ends


def _container(compiled: Any, states: dict[str, Any]) -> Found:
    """What the container takes by itself, without us in between."""
    engine = compiled.engines["model"]
    runners = [value for value in vars(engine).values() if type(value).__name__.startswith("AOTI")]
    if not runners:
        return {"failed": f"no container among {sorted(vars(engine))}"}
    (runner,) = runners[:1]
    found: Found = {
        "methods": [name for name in dir(runner) if not name.startswith("_")],
        "update": str(type(runner).update_constant_buffer.__doc__)[:500],
    }
    names = runner.get_constant_names_to_original_fqns()
    for source in ("device", "pinned", "pageable"):
        given = {name: states[source][1][fqn] for name, fqn in names.items()}
        try:
            times = many(
                lambda _, g=given: runner.update_constant_buffer(g, True, True, False),  # noqa: FBT003 - torch's
                10,
            )
            found[f"{source} tensors into the inactive buffer"] = summary(times)
        except Exception as exc:  # noqa: BLE001 - told
            found[f"{source} tensors into the inactive buffer"] = f"{exc}"[:600]
    return found
