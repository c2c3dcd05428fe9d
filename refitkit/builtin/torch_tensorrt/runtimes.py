"""Which kind of engine serves which runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt.inplace import InPlaceEngine
from refitkit.builtin.torch_tensorrt.shadow import ShadowEngine

if TYPE_CHECKING:
    from refitkit.builtin.torch_tensorrt.engine import EngineOptions, RefitterEngine
    from refitkit.builtin.torch_tensorrt.handles import EngineHandle


def engine_for(handle: EngineHandle, trt: Any, options: EngineOptions) -> RefitterEngine:
    """The engine behind a handle: refitted in place where the runtime lets it be."""
    kind = ShadowEngine if handle.cuda_engine() is None else InPlaceEngine
    return kind(handle, trt, options)
