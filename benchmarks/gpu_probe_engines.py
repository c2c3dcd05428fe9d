"""Probes of engines: captured graphs and contexts, streamed and stripped weights, plans of CPUs."""

from __future__ import annotations

from typing import Any

import torch
from gpu_models import MODELS, exported, state_on

import refitkit
from refitkit.builtin.torch_tensorrt import upstream
from refitkit.program.bits import same_bits

MODEL = "resnet18"
OPTIONS: dict[str, Any] = {"min_block_size": 1, "use_python_runtime": True}
Found = dict[str, Any]


class Two:
    """A compiled model, and two sets of weights for it."""

    def __init__(
        self, model: str = MODEL, dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        kind, self.dtype = MODELS[model], dtype
        self.inputs = kind.inputs(self.dtype)
        self.models = [kind.new(seed, self.dtype) for seed in (0, 1)]
        self.program = exported(self.models[0], self.inputs)
        self.pipeline = refitkit.Pipeline()
        self.compiled = self.pipeline.compile(
            self.program, "torch_tensorrt", {**OPTIONS, **options}, prove=False
        )
        with torch.no_grad():
            self.eager = [model(*self.inputs) for model in self.models]

    def refit(self, to: int) -> None:
        """Refit to one of them."""
        state = self.models[to].state_dict()
        self.pipeline.refit(self.compiled, state, verify="none")

    def call(self) -> torch.Tensor:
        """A call, done."""
        output: torch.Tensor = self.compiled(*self.inputs)
        torch.cuda.synchronize()
        return output.clone()

    @property
    def child(self) -> Any:
        """The one engine's child module."""
        ((_, child),) = self.compiled.opened.module.named_children()
        return child

    def error(self, output: torch.Tensor, of: int) -> float:
        """Norm of the difference from eager over the norm of that."""
        wanted = self.eager[of].double()
        return float((output.double() - wanted).norm() / wanted.norm())

    def there_and_back(self) -> Found:
        """A, B, A: errors, and whether bits come back."""
        outputs = []
        for to in (0, 1, 0):
            self.refit(to)
            outputs.append(self.call())
        return {
            "error of A": self.error(outputs[0], 0),
            "error of B": self.error(outputs[1], 1),
            "A, B, A bit-equal": same_bits(outputs[0], outputs[2]),
            "A is not B": not same_bits(outputs[0], outputs[1]),
        }


class Context:
    """An execution context with memory of its own for inputs and outputs."""

    def __init__(self, child: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self._context = child.engine.create_execution_context()
        self._inputs = [one.clone() for one in inputs]
        for name, one in zip(child.input_names, self._inputs, strict=True):
            self._context.set_input_shape(name, tuple(one.shape))
            self._context.set_tensor_address(name, one.data_ptr())
        shapes = [tuple(self._context.get_tensor_shape(name)) for name in child.output_names]
        self.outputs = [torch.empty(shape, device="cuda") for shape in shapes]
        for name, one in zip(child.output_names, self.outputs, strict=True):
            self._context.set_tensor_address(name, one.data_ptr())
        self._stream = torch.cuda.Stream()

    def run(self) -> torch.Tensor:
        """Run it."""
        self.outputs[0].zero_()
        torch.cuda.synchronize()
        assert self._context.execute_async_v3(self._stream.cuda_stream)
        torch.cuda.synchronize()
        return self.outputs[0].clone()

    def captured(self) -> torch.cuda.CUDAGraph:
        """The same as a graph."""
        self.run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            assert self._context.execute_async_v3(self._stream.cuda_stream)
        return graph


def captured_graphs() -> Found:
    """What a graph and a context from before a refit in place answer after it."""
    two = Two()
    two.refit(1)
    b = two.call()
    two.refit(0)
    a = two.call()
    old = Context(two.child, two.inputs)
    first = old.run()
    other = Context(two.child, two.inputs)
    graph = other.captured()

    def replayed() -> torch.Tensor:
        other.outputs[0].zero_()
        graph.replay()
        torch.cuda.synchronize()
        return other.outputs[0].clone()

    before = replayed()
    two.refit(1)
    after, context = replayed(), old.run()
    late = Context(two.child, two.inputs).run()
    found: Found = {
        "graph before the refit answers as A": same_bits(before, a),
        "context before the refit answers as A": same_bits(first, a),
        "graph from before the refit answers": _which(after, a, b),
        "context from before the refit answers": _which(context, a, b),
        "context from after the refit answers": _which(late, a, b),
    }
    two.refit(0)
    found["graph, back at A"] = _which(replayed(), a, b)
    found["upstream's graphs"] = _graphs_of_upstream(two, a, b)
    return found


def _graphs_of_upstream(two: Two, a: torch.Tensor, b: torch.Tensor) -> Found:
    runtime = upstream.torch_tensorrt().runtime
    runtime.set_cudagraphs_mode(True)
    try:
        found = {"A": _which([two.call() for _ in range(3)][-1], a, b)}
        captured = getattr(two.child, "cudagraph", None)
        found["captured"] = captured is not None
        two.refit(1)
        found["dropped by the refit"] = getattr(two.child, "cudagraph", None) is None
        found["B"] = _which(two.call(), a, b)
        two.refit(0)
        found["A again"] = _which(two.call(), a, b)
    finally:
        runtime.set_cudagraphs_mode(False)
    return found


def _which(output: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> str:
    if same_bits(output, a):
        return "as A"
    return "as B" if same_bits(output, b) else "neither"


def weight_streaming() -> Found:
    """Whether engines that stream their weights can be refitted."""
    found: Found = {}
    for budget in ("automatic", "half", "none"):
        try:
            two = Two(enable_weight_streaming=True)
            child = two.child
            size = child.get_streamable_device_memory_budget()
            if budget != "automatic":
                child.set_device_memory_budget(size // 2 if budget == "half" else 0)
            found[budget] = {
                "streamable": size,
                "budget": child.get_device_memory_budget(),
                **two.there_and_back(),
            }
        except Exception as exc:  # noqa: BLE001 - told
            found[budget] = f"{type(exc).__name__}: {exc}"[:1500]
    return found


def stripped() -> Found:
    """Engines that were stored without weights: before the first refit, and after it."""
    two = Two(strip_engine_weights=True)
    found: Found = {
        "bytes": len(two.child.serialized_engine),
        "error before the first refit": two.error(two.call(), 0),
        "output before it is all zero": not bool(two.call().any()),
    }
    found |= two.there_and_back()
    found["bytes after it"] = len(two.child.serialized_engine)
    return found


def planned_on_the_cpu() -> Found:
    """Whether a plan of the CPU's program fits the engine of the GPU's."""
    return {
        model: _planned(model) for model in ("resnet18", "mobilenet_v3_small", "vit_b_16", "llama")
    }


def _planned(model: str) -> Found:
    two, kind = Two(model), MODELS[model]
    offline = kind.new(0, torch.float32, "cpu")
    program = exported(offline, kind.inputs(torch.float32, "cpu"))
    try:
        plan = two.pipeline.plan(program, backend="torch_tensorrt", options={"min_block_size": 1})
    except Exception as exc:  # noqa: BLE001 - told
        return {"failed": f"{type(exc).__name__}: {exc}"[:1500]}
    mine = {row.slot.key: row.slot for row in plan.ledger}
    live = {slot.key: slot for slot in two.compiled.slots}
    both = mine.keys() & live.keys()
    found: Found = {
        "slots": len(live),
        "planned": len(mine),
        "names in both": len(both),
        "only in the engine": sorted(map("/".join, live.keys() - mine.keys()))[:4],
        "only in the plan": sorted(map("/".join, mine.keys() - live.keys()))[:4],
        "of both, other dtype or count": sum(
            (mine[key].dtype, mine[key].count) != (live[key].dtype, live[key].count) for key in both
        ),
    }
    assert two.compiled.plan
    wanted = two.compiled.plan.materialize(state_on(two.models[1], "cuda"))
    for device in ("cuda", "cpu"):
        given = plan.materialize(state_on(two.models[1], device))
        found[f"of both, other bits, replayed on {device}"] = sum(
            not same_bits(
                given[engine][name].cpu().contiguous().reshape(-1),
                wanted[engine][name].cpu().contiguous().reshape(-1),
            )
            for engine, name in both
        )
    return found
