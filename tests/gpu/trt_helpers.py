"""Compiling and comparing with Torch-TensorRT on a GPU."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit.builtin.torch_tensorrt import upstream
from tests.gpu.trt_models import Inputs, inputs_of, randomized

if TYPE_CHECKING:
    from collections.abc import Callable

needs_trt = pytest.mark.skipif(
    not upstream.is_installed(), reason="torch_tensorrt is not installed"
)
TOLERANCE = 1e-2  # absolute and relative, upstream's own: TensorRT computes in TF32
PIPELINE = refitkit.Pipeline({"tolerances": {"float32": (TOLERANCE, TOLERANCE)}})


def export(model: torch.nn.Module, inputs: Inputs) -> Any:
    return torch.export.export(model, inputs)


def options_for(runtime: str, **more: Any) -> dict[str, Any]:
    """Options for a runtime; skips where this version or machine lacks it."""
    trt = upstream.torch_tensorrt()
    if runtime == "cpp" and not trt.ENABLED_FEATURES.torch_tensorrt_runtime:
        pytest.skip("this build of torch_tensorrt has no C++ runtime")
    options: dict[str, Any] = {"min_block_size": 1, **more}
    if "use_python_runtime" in inspect.signature(trt.dynamo.compile).parameters:
        options["use_python_runtime"] = runtime == "python"
    return options


def compiled_by_us(
    kind: Callable[[], torch.nn.Module], runtime: str = "python", **more: Any
) -> refitkit.CompiledModule:
    """Weights of seed 0, compiled and planned in one pass."""
    program = export(randomized(kind, 0), inputs_of(kind))
    return PIPELINE.compile(program, "torch_tensorrt", options_for(runtime, **more), prove=False)


def compiled_by_upstream(
    kind: Callable[[], torch.nn.Module], runtime: str = "python", **more: Any
) -> torch.fx.GraphModule:
    """Weights of seed 0, compiled by ``torch_tensorrt`` itself."""
    inputs = inputs_of(kind)
    options = options_for(runtime, **more)
    program = export(randomized(kind, 0), inputs)
    module: torch.fx.GraphModule = upstream.torch_tensorrt().dynamo.compile(
        program, inputs, immutable_weights=False, **options
    )
    return module


def flat(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if torch.is_tensor(leaf)]


def close(a: Any, b: Any) -> bool:
    """Whether all outputs agree within the tolerance."""
    pairs = list(zip(flat(a), flat(b), strict=True))
    assert pairs
    return all(torch.allclose(x, y, atol=TOLERANCE, rtol=TOLERANCE) for x, y in pairs)


def same(a: Any, b: Any) -> bool:
    """Whether all outputs are equal bit for bit."""
    pairs = list(zip(flat(a), flat(b), strict=True))
    assert pairs
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in pairs
    )


def eager(kind: Callable[[], torch.nn.Module], seed: int) -> Any:
    """What the model itself answers."""
    with torch.no_grad():
        return randomized(kind, seed)(*inputs_of(kind))
