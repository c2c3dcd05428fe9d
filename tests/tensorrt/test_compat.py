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
    with pytest.raises(refitkit.UnsupportedTargetError, match="no ExportedProgram"):
        compat.refit_module_weights(torch.nn.Identity(), case.model(1))


@pytest.mark.usefixtures("torch_tensorrt")
def test_modules_without_engines_are_refused() -> None:
    """The reference gives an uncompiled module back."""
    case = CASES["odd"]
    with pytest.raises(refitkit.UnsupportedTargetError, match="No plugin can open"):
        compat.refit_module_weights(torch.nn.Identity(), case.program(1))


@pytest.mark.usefixtures("torch_tensorrt")
def test_arguments_that_do_not_exist_are_a_type_error() -> None:
    arguments: dict[str, Any] = {"nonsense": True}
    with pytest.raises(TypeError, match="nonsense"):
        compat.refit_module_weights(torch.nn.Identity(), None, **arguments)


def test_copies_of_a_module_have_no_handle_of_the_original() -> None:
    handle = compat._Handle(object())  # type: ignore[arg-type]
    assert copy.deepcopy(handle).compiled is None
    kind, arguments = handle.__reduce__()
    assert kind(*arguments).compiled is None
