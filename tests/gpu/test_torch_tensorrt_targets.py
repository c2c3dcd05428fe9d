"""Targets that ``torch_tensorrt`` itself compiled, copied, saved and loaded."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit.builtin.torch_tensorrt import upstream
from tests.gpu.trt_helpers import (
    PIPELINE,
    TOLERANCE,
    close,
    compiled_by_upstream,
    eager,
    export,
    needs_trt,
    same,
)
from tests.gpu.trt_models import Convolutions, Fallback, Several, Words, inputs_of, randomized

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = needs_trt
RUNTIMES = ["python", "cpp"]
CONVOLUTION = "torch.ops.aten.convolution.default"


def program_of(kind: Callable[[], torch.nn.Module], seed: int) -> Any:
    return export(randomized(kind, seed), inputs_of(kind))


def planned(target: Any, kind: Callable[[], torch.nn.Module]) -> refitkit.CompiledModule:
    """A target, opened, with a plan from the program that was compiled."""
    compiled = PIPELINE.load(target)
    PIPELINE.plan(program_of(kind, 0), compiled, prove=False)
    return compiled


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", [Convolutions, Words, Fallback])
def test_a_module_is_refitted_in_place(kind: Callable[[], torch.nn.Module], runtime: str) -> None:
    module, inputs = compiled_by_upstream(kind, runtime), inputs_of(kind)
    compiled = planned(module, kind)
    for seed in (1, 2):
        PIPELINE.refit(compiled, randomized(kind, seed), inputs=inputs)
        assert close(compiled(*inputs), eager(kind, seed))
        assert same(module(*inputs), compiled(*inputs))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_several_engines(runtime: str) -> None:
    module = compiled_by_upstream(Convolutions, runtime, torch_executed_ops={CONVOLUTION})
    compiled, inputs = planned(module, Convolutions), inputs_of(Convolutions)
    PIPELINE.refit(compiled, program_of(Convolutions, 1), inputs=inputs)
    assert close(module(*inputs), eager(Convolutions, 1))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_deepcopies_hold_the_weights_of_their_time(runtime: str) -> None:
    module, inputs = compiled_by_upstream(Several, runtime), inputs_of(Several)
    compiled = planned(module, Several)
    PIPELINE.refit(compiled, randomized(Several, 1), inputs=inputs)
    copied = copy.deepcopy(module)
    PIPELINE.refit(compiled, randomized(Several, 2), inputs=inputs)
    assert close(copied(*inputs), eager(Several, 1))
    assert close(copy.deepcopy(module)(*inputs), eager(Several, 2))
    assert close(module(*inputs), eager(Several, 2))


def test_a_copy_can_be_refitted() -> None:
    module, inputs = compiled_by_upstream(Several), inputs_of(Several)
    compiled = planned(module, Several)
    PIPELINE.refit(compiled, randomized(Several, 1), inputs=inputs)
    copied = planned(copy.deepcopy(module), Several)
    PIPELINE.refit(copied, randomized(Several, 2), inputs=inputs)
    assert close(copied(*inputs), eager(Several, 2))
    assert close(module(*inputs), eager(Several, 1))


def test_an_exported_program_with_engines_inside(tmp_path: Path) -> None:
    module = compiled_by_upstream(Several, "cpp")
    inputs, trt = inputs_of(Several), upstream.torch_tensorrt()
    path = str(tmp_path / "compiled.ep")
    trt.save(module, path, arg_inputs=inputs)
    compiled = planned(torch.export.load(path), Several)
    PIPELINE.refit(compiled, randomized(Several, 1), inputs=inputs)
    assert close(compiled(*inputs), eager(Several, 1))


def test_what_upstream_saves_after_a_refit(tmp_path: Path) -> None:
    module = compiled_by_upstream(Several, "cpp")
    inputs, trt = inputs_of(Several), upstream.torch_tensorrt()
    PIPELINE.refit(planned(module, Several), randomized(Several, 1), inputs=inputs)
    path = str(tmp_path / "refitted.ep")
    trt.save(module, path, arg_inputs=inputs)
    assert close(torch.export.load(path).module()(*inputs), eager(Several, 1))


@pytest.mark.parametrize("strategies", [("rebuild",), ("name-map", "rebuild")])
@pytest.mark.parametrize("kind", [Convolutions, Words])
def test_strategies_agree(kind: Callable[[], torch.nn.Module], strategies: tuple[str, ...]) -> None:
    tolerances = {"float32": (TOLERANCE, TOLERANCE)}
    pipeline = refitkit.Pipeline({"strategies": strategies, "tolerances": tolerances})
    compiled, inputs = planned(compiled_by_upstream(kind), kind), inputs_of(kind)
    pipeline.refit(compiled, program_of(kind, 1), inputs=inputs)
    ours = compiled(*inputs)
    PIPELINE.refit(compiled, randomized(kind, 2), inputs=inputs)
    PIPELINE.refit(compiled, randomized(kind, 1), inputs=inputs)
    assert same(compiled(*inputs), ours)


@pytest.mark.parametrize("spoil", ["whole", "none", "without-scales"])
def test_the_cached_map_of_old_versions_never_makes_it_wrong(spoil: str) -> None:
    """Whatever is left of the map: right values, from it or from another strategy."""
    module, inputs = compiled_by_upstream(Convolutions), inputs_of(Convolutions)
    children = [c for c in module.children() if getattr(c, "weight_name_map", None)]
    if not children:
        pytest.skip("this version of torch_tensorrt stores no map")
    for child in children:
        held: Any = child.weight_name_map
        left = {k: v for k, v in held.items() if "[SCALE]" not in k}
        child.weight_name_map = {"whole": held, "none": None, "without-scales": left}[spoil]  # type: ignore[assignment]
    tolerances = {"float32": (TOLERANCE, TOLERANCE)}
    pipeline = refitkit.Pipeline({"strategies": ("name-map", "rebuild"), "tolerances": tolerances})
    compiled = planned(module, Convolutions)
    pipeline.refit(compiled, program_of(Convolutions, 1), inputs=inputs)
    assert close(compiled(*inputs), eager(Convolutions, 1))


def test_another_model_is_refused() -> None:
    compiled = planned(compiled_by_upstream(Several), Several)
    inputs = inputs_of(Several)
    before = compiled(*inputs)
    with pytest.raises(refitkit.WeightMismatchError):
        PIPELINE.refit(compiled, randomized(Convolutions, 1))
    with pytest.raises(refitkit.PlanMismatchError):
        PIPELINE.plan(program_of(Convolutions, 0), compiled)
    assert same(compiled(*inputs), before)


def test_immutable_engines_are_refused_with_the_flag_to_set() -> None:
    inputs = inputs_of(Several)
    program = program_of(Several, 0)
    module = upstream.torch_tensorrt().dynamo.compile(
        program, inputs, immutable_weights=True, min_block_size=1
    )
    with pytest.raises(refitkit.NotRefittableError, match="immutable_weights=False"):
        PIPELINE.load(module)


def test_captured_cuda_graphs_do_not_answer_with_old_weights() -> None:
    trt = upstream.torch_tensorrt()
    module, inputs = compiled_by_upstream(Several), inputs_of(Several)
    compiled = planned(module, Several)
    with trt.runtime.enable_cudagraphs(module) as captured:
        captured(*inputs)
        PIPELINE.refit(compiled, randomized(Several, 1), inputs=inputs)
        assert close(captured(*inputs), eager(Several, 1))
        PIPELINE.refit(compiled, randomized(Several, 2), inputs=inputs)
        assert close(captured(*inputs), eager(Several, 2))


def test_upstreams_own_refit_agrees() -> None:
    refit = upstream.torch_tensorrt().dynamo.refit_module_weights
    module, inputs = compiled_by_upstream(Several), inputs_of(Several)
    theirs = refit(module, program_of(Several, 1), arg_inputs=inputs)
    PIPELINE.refit(planned(module, Several), randomized(Several, 1), inputs=inputs)
    assert same(module(*inputs), theirs(*inputs))
