"""Live engines as bytes, and back."""

from __future__ import annotations

from typing import Any

from refitkit.builtin.torch_tensorrt.trtlog import Listener, uncollected
from refitkit.errors import EngineError


def bytes_of(engine: Any, trt: Any) -> bytes:
    """Serialize a live engine with its present weights, such that it can be refitted again.

    Raises:
        EngineError: TensorRT refuses.
    """
    flags = trt.SerializationFlag
    config = engine.create_serialization_config()
    config.clear_flag(flags.EXCLUDE_WEIGHTS)
    refusals = [] if not config.get_flag(flags.EXCLUDE_WEIGHTS) else ["EXCLUDE_WEIGHTS"]
    # without it an engine cannot be refitted once it was loaded; there since TensorRT 10.14
    include = getattr(flags, "INCLUDE_REFIT", None)
    if include is not None and not config.set_flag(include):
        refusals.append("INCLUDE_REFIT")
    data = None if refusals else engine.serialize_with_config(config)
    if data is None:
        what = f" (flags {', '.join(refusals)})" if refusals else ""
        raise EngineError(f"TensorRT failed to serialize the refitted engine{what}.")
    return bytes(data)


class Deserialized:
    """An engine of our own, made from bytes.

    Attributes:
        engine: The ``ICudaEngine``.
    """

    def __init__(self, data: bytes, trt: Any) -> None:
        """Deserialize.

        Raises:
            EngineError: TensorRT refuses the bytes.
        """
        self._heard = Listener(trt)  # both have to outlive the engine
        with uncollected():
            self._runtime = trt.Runtime(self._heard.logger)
        self._runtime.error_recorder = self._heard.recorder
        self.engine = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise EngineError(f"TensorRT cannot read the engine's bytes{self._heard.quote()}.")
