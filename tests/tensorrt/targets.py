"""Real targets of torch_tensorrt, made without a GPU: engines are built, and set up lazily."""

from __future__ import annotations

from typing import Any


def compilation_settings(torch_tensorrt: Any, **options: Any) -> Any:
    """Settings as a refittable compilation has them."""
    fields = {"device": torch_tensorrt.Device("cuda:0"), "immutable_weights": False} | options
    return torch_tensorrt.dynamo._settings.CompilationSettings(**fields)
