"""Refits of Torch-TensorRT engines on a GPU: where the time of one goes, against upstream's own.

usage: python benchmarks/torch_tensorrt_refit.py [results.json] [torchvision_model ...]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import refitkit
from refitkit.builtin.torch_tensorrt import upstream

if TYPE_CHECKING:
    from collections.abc import Callable

RUNS = 2
MODELS = ("resnet18",)


def model(name: str, seed: int) -> torch.nn.Module:
    import torchvision

    torch.manual_seed(seed)
    made: torch.nn.Module = getattr(torchvision.models, name)(weights=None).eval()
    with torch.no_grad():
        for value in made.parameters():
            value.add_(torch.randn_like(value) * 0.02)
        for key, value in made.named_buffers():
            if key.endswith("running_var"):
                value.copy_(torch.rand_like(value) + 0.5)
    return made.cuda()


def seconds(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str) -> dict[str, float]:
    x = (torch.randn(1, 3, 224, 224).cuda(),)
    a, b = (torch.export.export(model(name, seed), x) for seed in (0, 1))
    pipeline = refitkit.Pipeline()
    compiled = pipeline.compile(a, "torch_tensorrt", {"min_block_size": 1}, prove=False)
    found = {"slots_mb": sum(slot.nbytes for slot in compiled.slots) / 1e6}
    found["first_refit_s"] = seconds(lambda: pipeline.refit(compiled, b, verify="none"))
    reports = [pipeline.refit(compiled, program, verify="none").report for program in (a, b) * RUNS]
    found["whole_refit_s"] = statistics.median(report.seconds for report in reports)
    for stage in ("stage", "commit"):
        times = [s.seconds for report in reports for s in report.stages if s.stage == stage]
        found[f"{stage}_ms"] = statistics.median(times) * 1e3
    engine: Any = next(iter(compiled.engines.values()))
    if hasattr(engine, "refit"):
        found["engine_refit_ms"] = statistics.median(seconds(engine.refit) for _ in range(20)) * 1e3
    buffer = torch.empty(int(found["slots_mb"] * 1e6), dtype=torch.uint8, device="cuda")
    other = torch.empty_like(buffer)
    found["copy_ms"] = (
        statistics.median(seconds(lambda: other.copy_(buffer)) for _ in range(20)) * 1e3
    )
    theirs = upstream.torch_tensorrt().dynamo
    module = theirs.compile(a, arg_inputs=x, immutable_weights=False, min_block_size=1)
    found["upstream_refit_s"] = seconds(
        lambda: theirs.refit_module_weights(module, b, in_place=True)
    )
    return found


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    names = sys.argv[2:] or MODELS
    models: dict[str, dict[str, float]] = {}
    found = {"device": torch.cuda.get_device_name(), "models": models}
    for name in names:
        models[name] = measure(name)
        print(name, json.dumps(models[name], indent=1), flush=True)
        if out is not None:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
