"""Probes of the first refit of a refitter, which compiles kernels for seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from gpu_models import exported
from gpu_probe_engines import Two
from gpu_raw import ByHand, many, ready_values, seconds, upstream_compiled
from gpu_tables import gaps, summary

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.refitter import DeserializedEngine
from refitkit.program.bits import same_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Found = dict[str, Any]
MODELS = ("resnet18", "mobilenet_v3_small")
LOAD_S = 2.0


def what_there_is() -> Found:
    """Names that this version offers for refitters, caches and builders."""
    trt = upstream.tensorrt()
    kinds = ("Refitter", "IRuntimeConfig", "IRuntimeCache", "ICudaEngine", "BuilderFlag")
    kinds += ("IBuilderConfig", "Runtime", "SerializationFlag", "ComputeCapability")
    return {
        kind: [name for name in dir(getattr(trt, kind)) if not name.startswith("_")]
        for kind in kinds
        if hasattr(trt, kind)
    }


class Bytes:
    """Engine bytes of a compiled model, and values for all weights."""

    def __init__(self, two: Two) -> None:
        ((self.name, engine),) = two.compiled.engines.items()
        self.data = engine.handle.engine_bytes()
        self.values = ready_values(two.compiled, two.models[1].state_dict())[self.name]

    def opened(self) -> Any:
        """Another engine of them."""
        return DeserializedEngine(self.data, upstream.tensorrt())


def _first(engine: Any, values: dict[str, torch.Tensor], **attributes: Any) -> Found:
    """Seconds of a new refitter's first refit, and milliseconds of its second."""
    hand = ByHand(engine, values)
    for name, value in attributes.items():
        setattr(hand.refitter, name, value)
    cpu = time.process_time()
    first = seconds(hand.refit)
    cpu = time.process_time() - cpu
    return {"first_s": first, "cpu_s": cpu, "then_ms": seconds(hand.refit) * 1e3}


def first_refits() -> Found:
    """What a new refitter's first refit takes, and whether anything that is kept shortens it."""
    found: Found = {}
    for model in MODELS:
        two = Two(model)
        kept, trt = Bytes(two), upstream.tensorrt()
        own = kept.opened()
        one: Found = {"new engine": _first(own.engine, kept.values)}
        one["same engine, another refitter"] = _first(own.engine, kept.values)
        one["another engine of the same bytes"] = _first(kept.opened().engine, kept.values)
        threads = os.cpu_count() or 1
        one[f"max_threads={threads}"] = _first(
            kept.opened().engine, kept.values, max_threads=threads
        )
        one["max_threads"] = trt.Refitter(own.engine, trt.Logger()).max_threads
        one["weights_validation=False"] = _first(
            kept.opened().engine, kept.values, weights_validation=False
        )
        called = kept.opened()
        context = called.engine.create_execution_context()
        one["after a context was made"] = _first(called.engine, kept.values)
        del context
        one["with a runtime cache"] = _with_cache(kept)
        found[model] = one
    found["driver's cache, two processes"] = _in_processes()
    return found


def _with_cache(kept: Bytes) -> Found:
    """A context with TensorRT-RTX's runtime cache, before a refitter is made; then once more."""
    own = kept.opened()
    if not hasattr(own.engine, "create_runtime_config"):
        return {"failed": "this TensorRT has no runtime cache"}
    config = own.engine.create_runtime_config()
    cache = config.create_runtime_cache()
    config.set_runtime_cache(cache)
    start = time.perf_counter()
    context = own.engine.create_execution_context(config)
    made_s = time.perf_counter() - start
    size = len(bytes(cache.serialize()))
    found: Found = {"context_s": made_s, "bytes": size, "first": _first(own.engine, kept.values)}
    stored = bytes(cache.serialize())
    found["bytes after the refit"] = len(stored)
    again = kept.opened()
    config = again.engine.create_runtime_config()
    cache = config.create_runtime_cache()
    found["taken back"] = bool(cache.deserialize(stored))
    config.set_runtime_cache(cache)
    start = time.perf_counter()
    second = again.engine.create_execution_context(config)
    found["context_s with it"] = time.perf_counter() - start
    found["first with it"] = _first(again.engine, kept.values)
    del context, second
    return found


_CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from gpu_probe_engines import Two
from gpu_probe_first import Bytes, _first
kept = Bytes(Two("resnet18"))
print(json.dumps(_first(kept.opened().engine, kept.values)))
"""


def _in_processes() -> list[str]:
    """The same in two processes one after the other that share the driver's cache of kernels."""
    with tempfile.TemporaryDirectory() as folder:
        more = {"CUDA_CACHE_PATH": folder, "CUDA_CACHE_MAXSIZE": str(4 << 30)}
        told = []
        for _ in range(2):
            done = subprocess.run(  # noqa: S603 - our own interpreter and code
                [sys.executable, "-c", _CHILD, os.path.dirname(__file__)],  # noqa: PTH120
                env={**os.environ, **more},
                capture_output=True,
                text=True,
                check=False,
            )
            lines = done.stdout.strip().splitlines()
            told.append(lines[-1] if lines and not done.returncode else done.stderr[-800:])
        size = sum(
            os.path.getsize(os.path.join(at, name))  # noqa: PTH118, PTH202
            for at, _, names in os.walk(folder)
            for name in names
        )
        return [*told, f"{size} bytes in the cache"]


def first_refits_of_options() -> Found:
    """The first refit of engines that were built in other ways."""
    ways: dict[str, Callable[[], Two]] = {
        "as usual": Two,
        "optimization_level=0": lambda: Two(optimization_level=0),
        "optimization_level=5": lambda: Two(optimization_level=5),
        "tiling full": lambda: Two(tiling_optimization_level="full"),
        "max_aux_streams=0": lambda: Two(max_aux_streams=0),
        "for this GPU only": lambda: _patched(_for_this_gpu),
        "no cache of compiled kernels": lambda: _patched(_without_cache),
        "stripped": lambda: Two(strip_engine_weights=True),
    }
    found: Found = {}
    for name, make in ways.items():
        try:
            start = time.perf_counter()
            two = make()
            compiled_s = time.perf_counter() - start
            kept = Bytes(two)
            own = kept.opened()
            found[name] = {
                "compile_s": compiled_s,
                "bytes": len(kept.data),
                **_first(own.engine, kept.values),
                "call": summary(many(lambda _, two=two: two.compiled(*two.inputs), 30, 1.0)),
            }
        except Exception as exc:  # noqa: BLE001 - told
            found[name] = f"{type(exc).__name__}: {exc}"[:1500]
    return found


def _patched(change: Callable[[Any, Any], None]) -> Two:
    """Compiled with a builder's configuration that was changed."""
    trt = upstream.tensorrt()
    from torch_tensorrt.dynamo.conversion import TRTInterpreter

    name = "_populate_trt_builder_config"
    real = getattr(TRTInterpreter, name)

    def populated(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = real(self, *args, **kwargs)
        change(config, trt)
        return config

    with mock.patch.object(TRTInterpreter, name, populated):
        return Two()


def _for_this_gpu(config: Any, trt: Any) -> None:
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)


def _without_cache(config: Any, trt: Any) -> None:
    config.set_flag(trt.BuilderFlag.DISABLE_COMPILATION_CACHE)


def distinct_layers() -> Found:
    """What the number of layers, and of layers that differ, does to the first refit."""
    found = {}
    for name, widths, kind in (
        ("1 convolution", [64, 64], "conv"),
        ("12 alike", [64] * 13, "conv"),
        ("12 that differ", [64 + 8 * i for i in range(13)], "conv"),
        ("1 linear", [64, 64], "linear"),
        ("12 linear alike", [64] * 13, "linear"),
        ("12 linear that differ", [64 + 8 * i for i in range(13)], "linear"),
    ):
        try:
            found[name] = _of_layers(widths, kind)
        except Exception as exc:  # noqa: BLE001 - told
            found[name] = {"failed": f"{type(exc).__name__}: {exc}"[:800]}
    return found


def _of_layers(widths: list[int], kind: str) -> Found:
    made: list[torch.nn.Module] = []
    for before, after in pairwise(widths):
        layer = (
            torch.nn.Conv2d(before, after, 3, padding=1)
            if kind == "conv"
            else torch.nn.Linear(before, after)
        )
        made += [layer, torch.nn.ReLU()]
    model = torch.nn.Sequential(*made).eval().cuda()
    shape = (1, widths[0], 32, 32) if kind == "conv" else (4, widths[0])
    inputs = (torch.randn(shape, device="cuda"),)
    module = upstream_compiled(exported(model, inputs), inputs, immutable_weights=False)
    ((_, child),) = module.named_children()
    trt = upstream.tensorrt()
    refitter = trt.Refitter(child.engine, trt.Logger(trt.Logger.ERROR))
    values = {}
    for name in refitter.get_all_weights():
        weights = refitter.get_weights_prototype(name)
        values[name] = torch.randn(weights.size, device="cuda")
    found = _first(child.engine, values)
    return {"weights": len(values), **found}


@contextmanager
def _served(two: Two) -> Iterator[tuple[list[float], list[bool]]]:
    """Another thread calls the module without pause: ends of its calls, whether outputs change."""
    expected = two.call()
    ends: list[float] = []
    same: list[bool] = []
    stop = threading.Event()

    def calls() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            while not stop.is_set():
                output = two.compiled(*two.inputs)
                stream.synchronize()
                ends.append(time.perf_counter())
                same.append(same_bits(output, expected))

    thread = threading.Thread(target=calls)
    thread.start()
    try:
        yield ends, same
    finally:
        stop.set()
        thread.join()


def warming_beside() -> Found:
    """Whether calls wait while another thread has a refitter compile, on a second engine or on it.

    Here nothing refits the engine that serves, except where it is said, with the weights it has.
    """
    found: Found = {}
    for model in MODELS:
        two = Two(model)
        kept = Bytes(two)
        ((_, engine),) = two.compiled.engines.items()
        assert two.compiled.plan
        own = ready_values(two.compiled, two.models[0].state_dict())[kept.name]
        with _served(two) as (ends, same):
            time.sleep(LOAD_S)
        found[model] = one = {"nobody else": {**gaps(ends), "same": all(same)}}
        works: dict[str, Callable[[], Any]] = {
            "a second engine": lambda kept=kept: _first(kept.opened().engine, kept.values),
            "the same engine, its own weights": lambda e=engine, own=own: _first(
                e.handle.cuda_engine(), own
            ),
        }
        for name, work in works.items():
            result: list[Found] = []
            thread = threading.Thread(target=lambda w=work, r=result: r.append(w()))
            with _served(two) as (ends, same):
                thread.start()
                thread.join()
            one[name] = {**gaps(ends), "same": all(same), "refit": result}
    return found
