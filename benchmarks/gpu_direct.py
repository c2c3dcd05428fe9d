"""Direct refits on a GPU: is the layout of an engine found and proved, and how fast is a refit?

One model a command, so that a run can be resumed: a file that is there is not made again.

usage: python benchmarks/gpu_direct.py MODEL DTYPE FILE
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_models import DTYPES, MODELS, exported
from gpu_raw import many, ready_values

import refitkit
from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.direct.engines import (
    KnownEngine,
    Pieces,
    ProbedEngine,
    allocating,
)
from refitkit.builtin.torch_tensorrt.direct.learning import UnknownLayoutError, learn
from refitkit.builtin.torch_tensorrt.direct.proving import prove
from refitkit.builtin.torch_tensorrt.direct.route import DirectWriter
from refitkit.builtin.torch_tensorrt.refitter import DeserializedEngine

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = torch.device("cuda", 0)


def seconds(do: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and how long it took with all work on the device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    found = do()
    torch.cuda.synchronize()
    return found, time.perf_counter() - start


def ms(do: Callable[[], Any], runs: int = 20) -> float:
    """Median time on the host and the device, in milliseconds."""
    do()
    return round(1e3 * statistics.median(seconds(do)[1] for _ in range(runs)), 4)


def measured(model: str, dtype: str) -> dict[str, Any]:
    """Learn, prove and time one model."""
    kind, trt = MODELS[model], upstream.tensorrt()
    inputs = kind.inputs(DTYPES[dtype])
    modules = [kind.new(seed, DTYPES[dtype]) for seed in (0, 1)]
    options = {"min_block_size": 1, "use_python_runtime": True}
    program = exported(modules[0], inputs)
    compiled = refitkit.Pipeline().compile(program, "torch_tensorrt", options, prove=False)
    found: dict[str, Any] = {"engines": {}}
    values = [ready_values(compiled, module.state_dict()) for module in modules]
    for name, engine in compiled.engines.items():
        if hasattr(engine, "handle"):
            a, b = ({n: v.reshape(-1) for n, v in one[name].items()} for one in values)
            found["engines"][name] = _engine(engine, a, b, trt)
    return found


def _engine(engine: Any, a: Any, b: Any, trt: Any) -> dict[str, Any]:
    data = engine.handle.engine_bytes()
    found: dict[str, Any] = {"weights": len(a), "MB": sum(v.nbytes for v in a.values()) / 1e6}
    norms = [n for n in a if "norm" in n][:6]
    found["names"] = norms or list(a)[:6]
    try:
        probed, found["open_s"] = seconds(lambda: ProbedEngine(data, engine.specs, trt, DEVICE))
        _, found["first_refit_s"] = seconds(lambda: probed.refit(a))
        layout, found["learn_s"] = seconds(lambda: learn(probed, a))
        found["places"], found["folds"] = len(layout.places), len(layout.folds)
        found["digits"] = max(len(place.digits) for place in layout.places.values())
        pieces = Pieces(DEVICE)
        with allocating(trt, pieces):
            opened = DeserializedEngine(data, trt)
        second = KnownEngine(opened.engine, pieces, trt, DEVICE)
        _, found["prove_s"] = seconds(lambda: prove(probed, second, layout, a))
    except UnknownLayoutError as exc:
        return {**found, "unknown": str(exc)}
    arena = {name: value.clone() for name, value in b.items()}
    writer = DirectWriter(layout, second.pieces()[layout.piece], arena)
    writer.prepare()
    flat, other = (torch.cat([t.view(torch.uint8) for t in one.values()]) for one in (a, b))
    found["copy_ms"] = ms(lambda: flat.copy_(other))
    found["stage_ms"] = ms(writer.prepare)
    found["commit_ms"] = ms(writer.commit)
    found["refit_ms"] = 1e3 * statistics.median(many(lambda _: probed.refit(b), 8, 2.0))
    return found


def main() -> None:
    """Measure one model and write the results to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("dtype", choices=list(DTYPES))
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    if given.file.exists():
        return
    found: dict[str, Any] = {"model": given.model, "dtype": given.dtype}
    try:
        found |= measured(given.model, given.dtype)
    except Exception:  # noqa: BLE001 - noted, so that the next model is measured
        found["error"] = traceback.format_exc()[-2000:]
    given.file.write_text(json.dumps(found, indent=1))
    print(json.dumps(found), file=sys.stdout)


if __name__ == "__main__":
    main()
