"""Refittable units for the engines and torch parts of an opened target."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.engine import EngineOptions
from refitkit.builtin.torch_tensorrt.module import Makers
from refitkit.builtin.torch_tensorrt.runtimes import engine_for
from refitkit.builtin.torch_tensorrt.torch_part import TorchPartEngine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.builtin.torch_tensorrt.handles import EngineHandle
    from refitkit.model import Slot
    from refitkit.protocols import Engine


def default_makers(
    known: Mapping[str, Mapping[str, Slot]] | None = None, *, check_finite: bool = True
) -> Makers:
    """Engines with a persistent refitter, and torch parts that are written in place.

    Args:
        known: What is known of slots, by engine and name. Needed where TensorRT cannot tell dtypes
            and counts itself.
        check_finite: Whether new values must be finite where the live ones are known to be.
    """
    known = known or {}

    def engine(handle: EngineHandle) -> Engine:
        device = torch.device("cuda", handle.settings.device.gpu_id)
        options = EngineOptions(
            device=device, known=known.get(handle.name, {}), check_finite=check_finite
        )
        return engine_for(handle, upstream.tensorrt(), options)

    return Makers(engine=engine, torch_part=TorchPartEngine)
