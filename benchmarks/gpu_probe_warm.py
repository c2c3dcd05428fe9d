"""Probes of warm refits, of loggers that go before what they were made for, of looks at weights."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_models import MODELS
from gpu_probe_engines import Two
from gpu_probe_first import Bytes
from gpu_raw import ByHand, many, ready_values

from refitkit.builtin.torch_tensorrt import upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Found = dict[str, Any]
RUNS = 30


def warm_refits() -> Found:
    """What TensorRT's own refit takes once it is warm, and what could make it faster."""
    return {model: _warm(model) for model in ("resnet18", "mobilenet_v3_small")}


def _warm(model: str) -> Found:
    two = Two(model)
    kept = Bytes(two)
    own = kept.opened()
    hand = ByHand(own.engine, kept.values)
    assert two.compiled.plan
    constants = {row.slot.name for row in two.compiled.plan.ledger if not row.sources}
    found: Found = {
        "weights": len(kept.values),
        "constants": len(constants),
        "usual": _ms(hand.refit),
        "names set anew": _ms(lambda: hand.point(hand.buffers)),
        "wait for an idle device": _ms(torch.cuda.synchronize),
        "wait for an idle stream": _ms(torch.cuda.current_stream().synchronize),
        "missing weights asked": _ms(hand.refitter.get_missing_weights),
    }
    for threads in (1, 2, 4, 16):
        hand.refitter.max_threads = threads
        found[f"max_threads={threads}"] = _ms(hand.refit)
    hand.refitter.weights_validation = False
    found["weights not validated"] = _ms(hand.refit)
    found["not asynchronous"] = _ms(hand.refitter.refit_cuda_engine)
    if hasattr(hand.refitter, "unset_named_weights"):
        found["without constants"] = _without(hand, kept, constants)
    return found


def _without(hand: ByHand, kept: Bytes, constants: Iterable[str]) -> Found:
    """A warm refitter that is no longer told of some weights, as far as it can do without."""
    unset = [hand.refitter.unset_named_weights(name) for name in constants]
    missing = list(hand.refitter.get_missing_weights())
    hand.point({name: kept.values[name] for name in missing})
    told = {"unset": sum(unset), "set again, as they are missing": missing}
    return {**told, **_ms(hand.refit)}


def _ms(call: Callable[[], Any]) -> Found:
    times = many(lambda _: call(), RUNS, 5.0)
    return {"p50_ms": statistics.median(times) * 1e3, "least_ms": min(times) * 1e3}


_LOGGERS = """
import ctypes, faulthandler, gc, sys
faulthandler.enable()
faulthandler.dump_traceback_later(100, exit=True)
from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt import refitter
from tests.gpu.trt_raw import build, values_of
trt = upstream.tensorrt()
data = build(trt, values_of(0))
kept = []

class Logger(trt.ILogger):
    def __init__(self, name):
        trt.ILogger.__init__(self)
        self.name = name
    def log(self, severity, text):
        print(self.name, severity, text[:100], flush=True)

def opened(name):
    logger = Logger(name)
    runtime = trt.Runtime(logger)
    if sys.argv[1] == "kept":
        kept.append(logger)
    return runtime, runtime.deserialize_cuda_engine(data)

first = opened("first")
second = opened("second")
print("ONE IS LET GO", flush=True)
del first
gc.collect()
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
for size in (8, 16, 24, 32, 40, 48, 64):
    for _ in range(300):
        ctypes.memset(malloc(size), 0x41, size)
logger = Logger("third")
refitter = trt.Refitter(second[1], logger)
refitter.set_named_weights("conv BIAS", trt.Weights(trt.DataType.FLOAT, 64, 3))
context = second[1].create_execution_context()
again = opened("fourth")
second[0].deserialize_cuda_engine(b"no engine")
print("SURVIVED", flush=True)
"""


def loggers() -> Found:
    """Which logger TensorRT uses once the first one's engine is gone, and whether that crashes."""
    return {how: _in_child(_LOGGERS, how) for how in ("let go", "kept")}


def _in_child(code: str, *words: str) -> Found:
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    return {"exit": done.returncode, "said": done.stdout[-3000:], "errors": done.stderr[:2500]}


def looks() -> Found:
    """What it takes to look at all weights of the host for what is not finite, by threads."""
    found: Found = {}
    before = torch.get_num_threads()
    for model in ("resnet50", "vit_b_16"):
        state = MODELS[model].new(0, torch.float32, "cpu").state_dict()
        floats = [value for value in state.values() if value.is_floating_point()]
        for memory in ("pageable", "pinned"):
            values = [v.pin_memory() if memory == "pinned" else v.clone() for v in floats]
            for threads in (1, 4, 8, 16):
                torch.set_num_threads(threads)
                key = f"{model}, {memory}, {threads} threads"
                found[key] = {
                    "aminmax": _ms(lambda v=values: [torch.aminmax(one) for one in v]),  # type: ignore[misc]
                    "sum": _ms(lambda v=values: [one.sum() for one in v]),  # type: ignore[misc]
                }
    torch.set_num_threads(before)
    return found


def what_a_refitter_has() -> list[str]:
    """Names of this version's refitter."""
    return [name for name in dir(upstream.tensorrt().Refitter) if not name.startswith("_")]


_REFITS = """
import faulthandler, sys
faulthandler.enable(all_threads=False)
import torch
from gpu_raw import ByHand, seconds
from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt import refitter
folder, data, place = sys.argv[1:]
trt = upstream.tensorrt()
own = refitter.DeserializedEngine(open(f"{folder}/{data}", "rb").read(), trt)
print("deserialized", flush=True)
values = torch.load(f"{folder}/values")
if place == "gpu":
    hand = ByHand(own.engine, {name: value.cuda() for name, value in values.items()})
    print("bound", flush=True)
    print("refitted", seconds(hand.refit), flush=True)
else:
    refitter = trt.Refitter(own.engine, trt.Logger(trt.Logger.ERROR))
    from torch_tensorrt._enums import dtype
    for name, value in values.items():
        kind = dtype._from(value.dtype).to(trt.DataType)
        weights = trt.Weights(kind, value.data_ptr(), value.numel())
        assert refitter.set_named_weights(name, weights, trt.TensorLocation.HOST), name
    print("bound", refitter.get_missing_weights(), flush=True)
    print("refitted", refitter.refit_cuda_engine(), flush=True)
"""


def gpt2_half() -> Found:
    """Which refits of GPT-2 in float16 crash: of which bytes, from where, each in a process."""
    two = Two("gpt2", dtype=torch.float16)
    ((name, engine),) = two.compiled.engines.items()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "built").write_bytes(engine.handle.engine_bytes())
        two.refit(1)
        (place / "refitted").write_bytes(engine.handle.engine_bytes())
        values = ready_values(two.compiled, two.models[1].state_dict())[name]
        torch.save({name: value.cpu() for name, value in values.items()}, place / "values")
        kinds = [[data, where] for data in ("built", "refitted") for where in ("gpu", "host")]
        with ThreadPoolExecutor(4) as pool:
            told = pool.map(lambda kind: _in_child(_REFITS, folder, *kind), kinds)
            return {", ".join(kind): one for kind, one in zip(kinds, told, strict=True)}
