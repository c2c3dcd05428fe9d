"""Engines built with TensorRT itself, behind handles of our own: no torch_tensorrt in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from refitkit.builtin.torch_tensorrt.engine import EngineOptions, create_engine
from refitkit.builtin.torch_tensorrt.refitter import DeserializedEngine
from refitkit.errors import EngineError
from refitkit.model import Slot
from refitkit.protocols import SlotValue

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from refitkit.builtin.torch_tensorrt.engine import RefitterEngine

Values = dict[str, torch.Tensor]
CUDA = torch.device("cuda:0")
WIDTH = 64


def values_of(seed: int) -> Values:
    """Weights of the network below, on the host."""
    g = torch.Generator().manual_seed(seed)
    return {
        "conv KERNEL": torch.randn(8, 3, 3, 3, generator=g) / 5,
        "conv BIAS": torch.randn(8, generator=g),
        "dense CONSTANT": torch.randn(8 * WIDTH, 16, generator=g) / WIDTH,
        "shift CONSTANT": torch.randn(1, 16, generator=g),
    }


def reference(values: Values, x: torch.Tensor) -> torch.Tensor:
    """What the network computes, in float64."""
    v = {name: value.double() for name, value in values.items()}
    kernel, bias = v["conv KERNEL"], v["conv BIAS"]
    h = torch.nn.functional.conv2d(x.cpu().double(), kernel, bias, padding=1).relu()
    return h.reshape(1, -1) @ v["dense CONSTANT"] + v["shift CONSTANT"]


def build(trt: Any, values: Values, flag: str = "REFIT") -> bytes:
    """Engine bytes of a convolution and a matrix product."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in values.items()}
    weights = {name: trt.Weights(array) for name, array in arrays.items()}
    side = int(WIDTH**0.5)
    x = network.add_input("x", trt.float32, (1, 3, side, side))
    kernel, bias = weights["conv KERNEL"], weights["conv BIAS"]
    conv = network.add_convolution_nd(x, 8, (3, 3), kernel, bias)
    conv.padding_nd, conv.name = (1, 1), "conv"
    relu = network.add_activation(conv.get_output(0), trt.ActivationType.RELU)
    rows = network.add_shuffle(relu.get_output(0))
    rows.reshape_dims = (1, 8 * WIDTH)
    dense = network.add_constant((8 * WIDTH, 16), weights["dense CONSTANT"])
    shift = network.add_constant((1, 16), weights["shift CONSTANT"])
    dense.name, shift.name = "dense", "shift"
    none = trt.MatrixOperation.NONE
    product = network.add_matrix_multiply(rows.get_output(0), none, dense.get_output(0), none)
    total = network.add_elementwise(
        product.get_output(0), shift.get_output(0), trt.ElementWiseOperation.SUM
    )
    total.get_output(0).name = "y"
    network.mark_output(total.get_output(0))
    for name, one in weights.items():
        network.set_weights_name(one, name)
    config = builder.create_builder_config()
    config.set_flag(getattr(trt.BuilderFlag, flag))
    data = builder.build_serialized_network(network, config)
    assert data is not None, "TensorRT did not build the network"
    return bytes(data)


class RawHandle:
    """An engine that is called with an execution context."""

    settings = weight_name_map = None
    input_names, output_names = ("x",), ("y",)

    def __init__(self, data: bytes, trt: Any, runtime: str) -> None:
        self.name, self.runtime, self._trt = "raw", runtime, trt
        self._pending: Callable[[], bytes] | None = None
        self.fail = ""
        self.dropped = 0
        self.replace(data)

    def engine_bytes(self) -> bytes:
        if self._pending is not None:
            self._stored, self._pending = self._pending(), None
        return self._stored

    def cuda_engine(self) -> Any:
        return self._own.engine if self.runtime == "python" else None

    def prepare(self, data: bytes) -> tuple[Any, Any, bytes]:
        if self.fail == "replace":
            raise EngineError("on purpose")
        own = DeserializedEngine(data, self._trt)
        return own, own.engine.create_execution_context(), data

    def present(self) -> tuple[Any, Any, bytes]:
        return self._own, self._context, self.engine_bytes()

    def put(self, engine: tuple[Any, Any, bytes]) -> None:
        (self._own, self._context, self._stored), self._pending = engine, None

    def replace(self, data: bytes) -> None:
        self.put(self.prepare(data))

    def on_stale(self, flush: Callable[[], bytes] | None) -> None:
        self._pending = flush

    def drop_captured(self) -> None:
        self.dropped += 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(1, 16, device=CUDA)
        self._context.set_tensor_address("x", x.data_ptr())
        self._context.set_tensor_address("y", y.data_ptr())
        stream = torch.cuda.current_stream()
        assert self._context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        return y


def engine_on(
    data: bytes, trt: Any, runtime: str = "python", *, told: bool = True, **more: Any
) -> tuple[RefitterEngine, RawHandle]:
    """An engine of ours on a handle. ``told``: whether it hears of shapes and types from us."""
    handle = RawHandle(data, trt, runtime)
    known = {
        name: Slot(engine="raw", name=name, dtype="float32", shape=tuple(v.shape), count=v.numel())
        for name, v in (values_of(0) if told else {}).items()
    }
    return create_engine(handle, trt, EngineOptions(CUDA, known, **more)), handle  # type: ignore[arg-type]


def slot_values(engine: RefitterEngine, values: Mapping[str, torch.Tensor]) -> list[SlotValue]:
    return [
        SlotValue(engine.slots[name], "test", (name,), lambda value=value: value)  # type: ignore[misc]
        for name, value in values.items()
    ]
