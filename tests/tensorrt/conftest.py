"""Tests with the real torch_tensorrt and the real builder of TensorRT-RTX, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from refitkit.builtin.torch_tensorrt import upstream


@pytest.fixture(scope="session")
def torch_tensorrt() -> Any:
    """The package in this process; on a machine without a GPU, imported as the worker does."""
    if not upstream.is_installed():
        pytest.skip("torch_tensorrt is not installed: pip install 'refitkit[rtx]'")
    return upstream.torch_tensorrt() if upstream.has_gpu() else upstream.import_headless()
