"""TensorRT's engines with memory that is known: TensorRT asks an allocator of ours for it."""

from __future__ import annotations

import contextlib
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.torch_tensorrt.direct.learning import UnknownLayoutError
from refitkit.builtin.torch_tensorrt.refitter import (
    DeserializedEngine,
    PersistentRefitter,
    current_device,
    torch_name,
    wait_for_calls,
)
from refitkit.processes import ForkedLock
from refitkit.program.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from refitkit.builtin.torch_tensorrt.refitter import WeightSpec

_PLACES = (0, 1, 2)  # smallest, optimal and largest shapes of a profile


class Pieces:
    """All memory that TensorRT has asked for on behalf of one engine, in that order."""

    def __init__(self, device: torch.device) -> None:
        """Start with none.

        Args:
            device: Device of the memory.
        """
        self._device = device
        self._by_address: dict[int, torch.Tensor] = {}

    def all(self) -> list[torch.Tensor]:
        """Return the pieces as ``uint8``: aliases, each as large as was asked for."""
        return list(self._by_address.values())

    def take(self, size: int) -> int | None:
        """Return the address of new memory; None if there is none.

        Args:
            size: In bytes.
        """
        if size <= 0:
            return None
        try:
            piece = torch.empty(size, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            return None  # TensorRT reports it
        address = piece.data_ptr()
        self._by_address[address] = piece
        _in_use.add(self)
        return address

    def give_back(self, address: int) -> bool:
        """Free memory; return whether it was taken here."""
        if self._device.type == "cuda":
            # as cudaFree does: torch may give the memory to work on another stream at once
            torch.cuda.synchronize(self._device)
        found = self._by_address.pop(address, None) is not None
        if not self._by_address:
            _in_use.discard(self)
        return found


_in_use: set[Pieces] = set()
"""An engine may outlive everything else that refers to its memory."""


def allocator(trt: Any, pieces: Pieces) -> Any:
    """Return an ``IGpuAllocator`` that takes memory from some pieces.

    Args:
        trt: The package ``tensorrt``.
        pieces: Where it is noted.
    """

    class Allocator(trt.IGpuAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IGpuAllocator.__init__(self)

        def allocate(self, size: int, _alignment: int, _flags: int) -> int | None:
            return pieces.take(size)

        def deallocate(self, address: int) -> bool:
            return pieces.give_back(address)

        def reallocate(self, _address: int, _alignment: int, _size: int) -> None:
            return None

        def allocate_async(self, size: int, _alignment: int, _flags: int, _: int) -> int | None:
            return pieces.take(size)

        def deallocate_async(self, address: int, _stream: int) -> bool:
            return pieces.give_back(address)

    return Allocator()


@contextlib.contextmanager
def allocating(trt: Any, pieces: Pieces) -> Iterator[None]:
    """Have runtimes that this thread makes meanwhile take memory from some pieces.

    Torch-TensorRT makes a ``tensorrt.Runtime`` wherever it opens an engine, and does not let one
    in from outside.

    Args:
        trt: The package ``tensorrt``.
        pieces: Where the memory is noted.
    """
    given, thread = allocator(trt, pieces), get_ident()
    with _patching.held:
        original = trt.Runtime

        def runtime(logger: Any) -> Any:
            made = original(logger)
            if get_ident() == thread:
                made.gpu_allocator = given
                _allocators.append(given)
            return made

        trt.Runtime = runtime
        try:
            yield
        finally:
            trt.Runtime = original


_patching = ForkedLock()
_allocators: list[Any] = []
"""They are tiny, and a runtime that somebody keeps may use its allocator at any time."""


# -- engines ------------------------------------------------------------------------------------


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
        self._contexts: dict[bool, Any] = {}

    def require_static(self) -> None:
        """Check that all shapes are fixed: TensorRT-RTX specializes kernels for others later.

        Raises:
            UnknownLayoutError: Some are not.
        """
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        if any(-1 in tuple(self.engine.get_tensor_shape(name)) for name in names):
            raise UnknownLayoutError("its shapes are dynamic")

    def pieces(self) -> Sequence[torch.Tensor]:
        """Return its memory."""
        return self._pieces.all()

    def answers(self, *, late: bool) -> Sequence[torch.Tensor]:
        """Return its outputs for three inputs of each profile; see ``proving.Answering``."""
        with current_device(self._device):
            if late not in self._contexts:
                self._contexts[late] = self._new_context()
            context = self._contexts[late]
            found = [
                one
                for profile in range(self.engine.num_optimization_profiles)
                for number in _PLACES
                for one in self._answer(context, profile, number)
            ]
            wait_for_calls(self._device, idle=False)
        return found

    def _new_context(self) -> Any:
        context = self.engine.create_execution_context()
        if context is None:
            raise UnknownLayoutError("there is no memory for another context")
        return context

    def _answer(self, context: Any, profile: int, number: int) -> list[torch.Tensor]:
        mode, engine = self._trt.TensorIOMode, self.engine
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device).cuda_stream if on_gpu else 0
        context.set_optimization_profile_async(profile, stream)
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
        if not context.execute_async_v3(stream):
            raise UnknownLayoutError("a call of it failed")
        wait_for_calls(self._device, idle=True)  # then the inputs may go
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
