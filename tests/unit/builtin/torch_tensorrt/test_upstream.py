"""Finding torch_tensorrt, and saying what to install where it is not there."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from typing import Any

import pytest

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.errors import ToolchainError


@pytest.fixture
def not_imported(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    return monkeypatch


@pytest.mark.parametrize("function", ["torch_tensorrt", "tensorrt", "import_headless"])
def test_where_it_is_not_installed_the_extras_are_named(
    not_imported: pytest.MonkeyPatch, function: str
) -> None:
    not_imported.setattr(upstream, "is_installed", lambda: False)
    with pytest.raises(ToolchainError, match="not installed") as info:
        getattr(upstream, function)()
    assert "refitkit[rtx]" in info.value.hint
    assert "refitkit[tensorrt]" in info.value.hint


def test_without_a_gpu_the_other_backend_is_named(not_imported: pytest.MonkeyPatch) -> None:
    not_imported.setattr(upstream, "is_installed", lambda: True)
    not_imported.setattr(upstream, "has_gpu", lambda: False)
    with pytest.raises(ToolchainError, match="needs a GPU") as info:
        upstream.torch_tensorrt()
    assert "tensorrt_network" in info.value.hint


def test_an_import_that_fails_is_told_and_leaves_everything_as_it_was(
    not_imported: pytest.MonkeyPatch,
) -> None:
    def fails(name: str) -> Any:
        assert logging.root.manager.disable == logging.WARNING
        sys.modules[name] = sys
        raise OSError("libnvinfer is not there")

    level, find_spec = logging.root.manager.disable, importlib.util.find_spec
    not_imported.setattr(upstream, "is_installed", lambda: True)
    with not_imported.context() as patch:
        patch.setattr(importlib, "import_module", fails)
        with pytest.raises(ToolchainError, match="libnvinfer is not there"):
            upstream.import_headless()
    assert "torch_tensorrt" not in sys.modules
    assert logging.root.manager.disable == level
    assert importlib.util.find_spec is find_spec


def test_what_is_imported_is_not_imported_again(not_imported: pytest.MonkeyPatch) -> None:
    package = object()
    not_imported.setitem(sys.modules, "torch_tensorrt", package)
    assert upstream.is_imported()
    assert upstream.import_headless() is upstream.torch_tensorrt() is package
