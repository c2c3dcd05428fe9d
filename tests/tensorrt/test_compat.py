"""The drop-in, as far as it goes without a GPU."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit import compat
from tests.tensorrt.models import CASES

if TYPE_CHECKING:
    from types import ModuleType


def test_arguments_are_those_of_the_installed_version(torch_tensorrt: ModuleType) -> None:
    theirs = torch_tensorrt.dynamo.refit_module_weights
    wanted = inspect.signature(inspect.getclosurevars(theirs).nonlocals["f"]).parameters
    found = compat._signature().parameters
    assert [(p.name, p.default, p.kind) for p in found.values()] == [
        (p.name, p.default, p.kind) for p in wanted.values()
    ]


@pytest.mark.parametrize(
    ("version", "with_cache"), [("2.11.0", True), ("2.12.1+cu130", True), ("2.13.0", False)]
)
def test_older_versions_have_the_cache_argument(
    torch_tensorrt: ModuleType, monkeypatch: pytest.MonkeyPatch, version: str, with_cache: bool
) -> None:
    monkeypatch.setattr(torch_tensorrt, "__version__", version)
    names = list(compat._signature().parameters)
    assert ("use_weight_map_cache" in names) == with_cache
    assert names[-1] == "in_place"


@pytest.mark.usefixtures("torch_tensorrt")
def test_weights_that_are_no_program_are_refused() -> None:
    case = CASES["odd"]
    with pytest.raises(refitkit.UnsupportedTargetError, match="not an ExportedProgram"):
        compat.refit_module_weights(torch.nn.Identity(), case.model(1))


@pytest.mark.usefixtures("torch_tensorrt")
def test_modules_without_engines_are_refused() -> None:
    """The reference gives an uncompiled module back."""
    case = CASES["odd"]
    with pytest.raises(refitkit.UnsupportedTargetError, match="an eager module"):
        compat.refit_module_weights(torch.nn.Identity(), case.program(1))


@pytest.mark.usefixtures("torch_tensorrt")
def test_arguments_that_do_not_exist_are_a_type_error() -> None:
    arguments: dict[str, Any] = {"nonsense": True}
    with pytest.raises(TypeError, match="nonsense"):
        compat.refit_module_weights(torch.nn.Identity(), None, **arguments)


def test_copies_of_a_module_have_no_handle_of_the_original() -> None:
    handle = compat._ModuleHandle(object())  # type: ignore[arg-type]
    assert copy.deepcopy(handle).compiled is None
    kind, arguments = handle.__reduce__()
    assert kind(*arguments).compiled is None


@pytest.mark.usefixtures("torch_tensorrt")
def test_where_there_is_one_runtime_there_is_nothing_to_convert_to() -> None:
    with pytest.raises(refitkit.UnsupportedTargetError, match="one runtime"):
        compat.to_python_runtime(torch.nn.Identity())


def test_engines_of_the_cpp_runtime_are_converted(
    torch_tensorrt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for the classes of 2.11."""

    class Cpp(torch.nn.Module):
        name, settings, weight_name_map, requires_output_allocator = "e", object(), {"a": 1}, True
        serialized_engine, engine = b"engine", object()
        input_binding_names, output_binding_names = ["x"], ["y"]

        def are_output_tensors_unowned(self) -> bool:
            return True

    class Python(torch.nn.Module):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()
            self.args, self.kwargs, self.unowned = args, kwargs, False

        def set_output_tensors_as_unowned(self, value: bool) -> None:
            self.unowned = value

    runtime = torch_tensorrt.dynamo.runtime
    monkeypatch.setattr(runtime, "TorchTensorRTModule", Cpp)
    monkeypatch.setattr(runtime, "PythonTorchTensorRTModule", Python, raising=False)
    module = torch.nn.Sequential()
    module.add_module("_run_on_acc_0", Cpp())
    module.add_module("_run_on_gpu_1", torch.nn.Linear(2, 2))
    assert compat.to_python_runtime(module) is module
    made: Any = module.get_submodule("_run_on_acc_0")
    assert isinstance(made, Python)
    assert made.args == (b"engine", ["x"], ["y"])
    assert made.kwargs == {
        "name": "e",
        "settings": Cpp.settings,
        "weight_name_map": {"a": 1},
        "requires_output_allocator": True,
    }
    assert made.unowned
    with pytest.raises(refitkit.UnsupportedTargetError, match="no engine in the C"):
        compat.to_python_runtime(module)
