"""TensorRT's engines with memory that is known, for learning and proving a layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.torch_tensorrt.direct.learning import UnknownLayoutError
from refitkit.builtin.torch_tensorrt.direct.memory import Pieces, allocating
from refitkit.builtin.torch_tensorrt.refitter import (
    DeserializedEngine,
    PersistentRefitter,
    current_device,
    torch_name,
)
from refitkit.program.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from refitkit.builtin.torch_tensorrt.refitter import WeightSpec

_PLACES = (0, 1, 2)  # smallest, optimal and largest shapes of a profile


class KnownEngine:
    """An engine whose memory is known; see ``proving.Answering``."""

    def __init__(self, engine: Any, pieces: Pieces, trt: Any, device: torch.device) -> None:
        """Take an engine that was opened with an allocator.

        Args:
            engine: The ``ICudaEngine``.
            pieces: Its memory.
            trt: The package ``tensorrt``.
            device: Its device.
        """
        self.engine, self._pieces, self._trt, self._device = engine, pieces, trt, device
        self._context: Any = None

    def pieces(self) -> Sequence[torch.Tensor]:
        """Return its memory."""
        return self._pieces.all()

    def answers(self, *, late: bool) -> Sequence[torch.Tensor]:
        """Return its outputs for three inputs of each profile."""
        with current_device(self._device):
            if self._context is None:
                self._context = self._new_context()
            context = self._new_context() if late else self._context
            found = [
                one
                for profile in range(self.engine.num_optimization_profiles)
                for number in _PLACES
                for one in self._answer(context, profile, number)
            ]
            torch.cuda.synchronize(self._device)
        return found

    def _new_context(self) -> Any:
        context = self.engine.create_execution_context()
        if context is None:
            raise UnknownLayoutError("there is no memory for another context")
        return context

    def _answer(self, context: Any, profile: int, number: int) -> list[torch.Tensor]:
        mode, engine = self._trt.TensorIOMode, self.engine
        stream = torch.cuda.current_stream(self._device)
        context.set_optimization_profile_async(profile, stream.cuda_stream)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == mode.INPUT]
        kept, outputs = [], []
        for position, name in enumerate(inputs):
            if engine.is_shape_inference_io(name):
                raise UnknownLayoutError("it has inputs that are shapes")
            shape = tuple(engine.get_tensor_profile_shape(name, profile)[number])
            context.set_input_shape(name, shape)
            value = self._input(name, shape, 10 * position + number)
            context.set_tensor_address(name, value.data_ptr())
            kept.append(value)
        for name in (n for n in names if n not in inputs):
            shape = tuple(context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise UnknownLayoutError("sizes of its outputs depend on its inputs")
            value = torch.empty(shape, dtype=self._dtype(name), device=self._device)
            context.set_tensor_address(name, value.data_ptr())
            outputs.append(value)
        if not context.execute_async_v3(stream.cuda_stream):
            raise UnknownLayoutError("a call of it failed")
        stream.synchronize()  # the inputs may go
        return outputs

    def _dtype(self, name: str) -> torch.dtype:
        kind = torch_name(self.engine.get_tensor_dtype(name).name)
        if kind is None:
            raise UnknownLayoutError("torch has no dtype for its inputs or outputs")
        return dtype_of(kind)

    def _input(self, name: str, shape: Sequence[int], seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        dtype = self._dtype(name)
        if dtype.is_floating_point:
            value = torch.randn(shape, generator=generator).to(dtype)
        else:  # indices: 0 and 1 are valid in nearly any table
            value = torch.randint(0, 2, shape, generator=generator).to(dtype)
        return value.to(self._device)


class ProbedEngine(KnownEngine):
    """A second engine of the same bytes with a refitter of its own; see ``proving.Provable``."""

    def __init__(
        self, data: bytes, specs: Mapping[str, WeightSpec], trt: Any, device: torch.device
    ) -> None:
        """Deserialize it.

        Args:
            data: Engine bytes.
            specs: Dtype and number of elements of each weight, by name.
            trt: The package ``tensorrt``.
            device: Its device.

        Raises:
            EngineError: TensorRT refuses the bytes.
        """
        pieces = Pieces(device)
        with current_device(device), allocating(trt, pieces):
            self._opened = DeserializedEngine(data, trt)  # the engine needs its runtime
        super().__init__(self._opened.engine, pieces, trt, device)
        self.specs = specs
        self._values = {
            name: torch.zeros(spec.count, dtype=dtype_of(spec.dtype), device=device)
            for name, spec in specs.items()
        }
        self._refitter = PersistentRefitter(self.engine, trt, device)
        self._refitter.bind(specs, self._values)

    def refit(self, values: Mapping[str, torch.Tensor]) -> None:
        """Have TensorRT refit it. The first time takes seconds."""
        for name, value in values.items():
            self._values[name].copy_(value.reshape(-1))
        self._refitter.refit(idle=False)
