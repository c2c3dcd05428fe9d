"""The drop-in for the reference's function, as its users call it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest

import refitkit
from refitkit.builtin.torch_tensorrt import upstream
from refitkit.compat import refit_module_weights, to_python_runtime
from tests.gpu.trt_helpers import (
    close,
    compiled_by_upstream,
    eager,
    export,
    needs_trt,
    same,
)
from tests.gpu.trt_models import Convolutions, Several, Words, inputs_of, randomized

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

pytestmark = [pytest.mark.gpu, needs_trt]
RUNTIMES = ["python", "cpp"]
KINDS = [Convolutions, Words, Several]


def program_of(kind: Callable[[], torch.nn.Module], seed: int) -> Any:
    return export(randomized(kind, seed), inputs_of(kind))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_refitted_and_the_module_is_left_alone(
    kind: Callable[[], torch.nn.Module], runtime: str
) -> None:
    module, inputs = compiled_by_upstream(kind, runtime), inputs_of(kind)
    before = module(*inputs)
    new = refit_module_weights(module, program_of(kind, 1), inputs, verify_output=True)
    assert new is not module
    assert close(new(*inputs), eager(kind, 1))
    assert same(module(*inputs), before)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_in_place_there_and_back(runtime: str) -> None:
    module, inputs = compiled_by_upstream(Convolutions, runtime), inputs_of(Convolutions)
    refit_module_weights(module, program_of(Convolutions, 0), in_place=True)
    before = module(*inputs)
    for seed in (1, 2, 0):
        found = refit_module_weights(
            compiled_module=module,
            new_weight_module=program_of(Convolutions, seed),
            arg_inputs=inputs,
            verify_output=True,
            in_place=True,
        )
        assert found is module
        assert close(module(*inputs), eager(Convolutions, seed))
    assert same(module(*inputs), before)


def test_positional_arguments_bind_as_in_the_installed_version() -> None:
    module, inputs = compiled_by_upstream(Several), inputs_of(Several)
    theirs = upstream.torch_tensorrt().dynamo.refit_module_weights
    known = inspect.signature(inspect.getclosurevars(theirs).nonlocals["f"]).parameters
    rest = {"verify_output": True, "use_weight_map_cache": False, "in_place": True}
    flags = [rest[name] for name in list(known)[4:]]
    found = refit_module_weights(module, program_of(Several, 1), inputs, None, *flags)
    assert found is module
    assert close(module(*inputs), eager(Several, 1))


def test_failures_raise_and_change_nothing() -> None:
    module, inputs = compiled_by_upstream(Convolutions), inputs_of(Convolutions)
    before = module(*inputs)
    with pytest.raises(refitkit.PlanMismatchError):
        refit_module_weights(module, program_of(Words, 1), in_place=True)
    with pytest.raises(refitkit.UnsupportedTargetError, match="not an ExportedProgram"):
        refit_module_weights(module, randomized(Convolutions, 1), in_place=True)
    with pytest.raises(TypeError):
        refit_module_weights(module, program_of(Convolutions, 1), nonsense=True)
    assert same(module(*inputs), before)


def test_engines_move_to_the_python_runtime() -> None:
    if not hasattr(upstream.torch_tensorrt().dynamo.runtime, "PythonTorchTensorRTModule"):
        pytest.skip("this version of torch_tensorrt has one runtime")
    module, inputs = compiled_by_upstream(Several, "cpp"), inputs_of(Several)
    before = module(*inputs)
    assert to_python_runtime(module) is module
    assert close(module(*inputs), before)
    engine = next(iter(refitkit.load(module).engines.values()))
    assert type(engine).__name__ == "InPlaceEngine"
    refit_module_weights(module, program_of(Several, 1), inputs, verify_output=True, in_place=True)
    assert close(module(*inputs), eager(Several, 1))
