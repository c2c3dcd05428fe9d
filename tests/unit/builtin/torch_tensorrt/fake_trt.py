"""TensorRT in memory: engines, refitters and runtimes that keep its rules, and fail when told to.

A ``Refusal`` in the wire is what TensorRT does instead of raising: it returns False or None.
Weights are read from the addresses that were set, when the refit runs, so that a source which was
freed or overwritten shows.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import EngineError
from refitkit.program.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.fakes import Tripwire


class Refusal(Exception):  # noqa: N818 - no error: an answer
    """TensorRT says no."""


class DataType(Enum):
    """As in TensorRT."""

    FLOAT = "float32"
    HALF = "float16"
    BF16 = "bfloat16"
    INT8 = "int8"
    INT32 = "int32"
    INT64 = "int64"
    BOOL = "bool"
    FP8 = "float8_e4m3fn"
    FP4 = "float4"
    COMPLEX = "complex64"

    @property
    def nbytes(self) -> int:
        return dtype_of(self.value).itemsize


class TensorLocation(Enum):
    """As in TensorRT."""

    DEVICE = 0
    HOST = 1


class Flags(Enum):
    """``SerializationFlag`` since 10.14."""

    EXCLUDE_WEIGHTS = 0
    INCLUDE_REFIT = 2


class OldFlags(Enum):
    """``SerializationFlag`` before 10.14."""

    EXCLUDE_WEIGHTS = 0


@dataclass
class Weights:
    """A type, an address, a number of elements."""

    dtype: DataType
    address: int
    size: int


class ILogger:
    """Base of all loggers."""

    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)
    ready = False

    def __init__(self) -> None:
        self.ready = True

    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError


class IErrorRecorder:
    """Base of all error recorders."""

    ready = False

    def __init__(self) -> None:
        self.ready = True

    def report_error(self, code: int, desc: str) -> bool:
        raise NotImplementedError


class Speaker:
    """Tells its logger, and of errors its recorder instead, as TensorRT's objects do."""

    logger: ILogger
    error_recorder: Any = None

    def say(self, severity: int, text: str) -> None:
        if self.error_recorder is not None and severity <= ILogger.ERROR:
            assert self.error_recorder.ready
            self.error_recorder.report_error(3, text)
        else:
            self.logger.log(severity, text)


class FakeConfig:
    """A serialization config that starts as TensorRT's might: without weights."""

    def __init__(self, wire: Tripwire) -> None:
        self.wire, self.set = wire, {"EXCLUDE_WEIGHTS"}

    def clear_flag(self, flag: Any) -> bool:
        self.wire("clear_flag")
        self.set.discard(flag.name)
        return True

    def set_flag(self, flag: Any) -> bool:
        if _refused(self.wire, "set_flag"):
            return False
        self.set.add(flag.name)
        return True

    def get_flag(self, flag: Any) -> bool:
        self.wire("get_flag")
        return flag.name in self.set


class FakeCudaEngine:
    """An engine with its weights in host memory.

    Attributes:
        held: Type and bytes of each weight.
        groups: Weights that TensorRT has merged: who sets one has to set all.
    """

    def __init__(
        self,
        wire: Tripwire,
        held: Mapping[str, tuple[DataType, bytes]],
        groups: tuple[tuple[str, ...], ...] = (),
        *,
        refittable: bool = True,
    ) -> None:
        self.wire, self.held, self.groups = wire, dict(held), groups
        self.refittable = refittable

    @classmethod
    def of(cls, values: Mapping[str, torch.Tensor], wire: Tripwire, *groups: Any) -> FakeCudaEngine:
        held = {name: (DataType(str(t.dtype)[6:]), raw(t)) for name, t in values.items()}
        return cls(wire, held, groups)

    def create_serialization_config(self) -> FakeConfig:
        return FakeConfig(self.wire)

    def serialize_with_config(self, config: FakeConfig) -> bytes | None:
        if _refused(self.wire, "serialize"):
            return None
        return self.stored(full="EXCLUDE_WEIGHTS" not in config.set, kept=config.set)

    def stored(self, *, full: bool = True, kept: set[str] | None = None) -> bytes:
        held = {
            name: (kind.name, data.hex() if full else "00" * len(data))
            for name, (kind, data) in self.held.items()
        }
        refittable = self.refittable and (kept is None or "INCLUDE_REFIT" in kept)
        return json.dumps([held, self.groups, refittable]).encode()

    def values(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.tensor(list(data), dtype=torch.uint8).view(dtype_of(kind.value))
            for name, (kind, data) in self.held.items()
        }


class TensorIOMode(Enum):
    """As in TensorRT."""

    INPUT = 1
    OUTPUT = 2


class IGpuAllocator:
    """Base of all allocators."""

    ready = False

    def __init__(self) -> None:
        self.ready = True

    def allocate(self, size: int, alignment: int, flags: int) -> int | None:
        raise NotImplementedError


def laid_out(values: Mapping[str, torch.Tensor], piece: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where a ``PlacedEngine`` keeps each weight: views of its memory in logical order, flat.

    Weights of even length have their halves interleaved, as one digit more; others lie as they are.
    """
    found, start = {}, 256
    for name, value in sorted(values.items()):
        size, count = value.element_size(), value.numel()
        words = piece[start : start + count * size].view(value.dtype)
        if count % 2 == 0 and count > 2:
            words = words.view(count // 2, 2).T
        found[name] = words
        start += -(-count * size // 64) * 64 + 64
    return found


class PlacedEngine(FakeCudaEngine):
    """An engine that has asked an allocator for memory, and keeps its weights there.

    Attributes:
        pieces: Its memory: first some that calls write to, then that of the weights.
    """

    num_optimization_profiles, num_io_tensors = 1, 2
    shape: tuple[int, ...] = (3,)

    def __init__(self, like: FakeCudaEngine, allocator: IGpuAllocator) -> None:
        assert allocator.ready
        super().__init__(like.wire, {}, like.groups, refittable=like.refittable)
        values = like.values()
        size = 256 + sum(-(-value.nbytes // 64) * 64 + 64 for value in values.values())
        self.pieces = [self._memory(allocator, one) for one in (64, size)]
        self.kinds = {name: kind for name, (kind, _) in like.held.items()}
        self.places = self.placed(values)
        self.held = _Held(self)
        for name, (_, data) in like.held.items():
            self.write(name, data)

    def placed(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return laid_out(values, self.pieces[1])

    def _memory(self, allocator: IGpuAllocator, size: int) -> torch.Tensor:
        self.wire("allocate")
        address = allocator.allocate(size, 256, 0)
        assert address
        memory = (ctypes.c_uint8 * size).from_address(address)
        piece = torch.frombuffer(memory, dtype=torch.uint8)
        piece.zero_()
        return piece

    def write(self, name: str, data: bytes) -> None:
        place = self.places[name]
        value = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(place.dtype)
        place.copy_(value.view(place.shape))

    def read(self, name: str) -> bytes:
        return raw(self.places[name])

    def answer(self, x: torch.Tensor) -> torch.Tensor:
        """Depends on each element of each weight and its position."""
        self.pieces[0].add_(1)
        sums = []
        for name in sorted(self.places):
            value = torch.frombuffer(bytearray(self.read(name)), dtype=torch.uint8)
            value = value.view(self.places[name].dtype).double()
            sums.append((value * torch.arange(1, value.numel() + 1)).sum())
        return (torch.stack(sums).sum() + x.double()).float()

    def create_execution_context(self) -> FakeContext:
        self.wire("context")
        return FakeContext(self)

    def get_tensor_name(self, number: int) -> str:
        return "xy"[number]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == "x" else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, _: str) -> DataType:
        return DataType.FLOAT

    def get_tensor_shape(self, _: str) -> tuple[int, ...]:
        return self.shape

    def get_tensor_profile_shape(self, _name: str, _profile: int) -> list[tuple[int, ...]]:
        return [(3,)] * 3

    def is_shape_inference_io(self, _: str) -> bool:
        return False


class _Held(MutableMapping[str, tuple[DataType, bytes]]):
    """Type and bytes of each weight, in the engine's memory."""

    def __init__(self, engine: PlacedEngine) -> None:
        self.engine = engine

    def __getitem__(self, name: str) -> tuple[DataType, bytes]:
        return self.engine.kinds[name], self.engine.read(name)

    def __setitem__(self, name: str, held: tuple[DataType, bytes]) -> None:
        self.engine.write(name, held[1])

    def __delitem__(self, name: str) -> None:
        raise NotImplementedError

    def __iter__(self) -> Iterator[str]:
        return iter(self.engine.kinds)

    def __len__(self) -> int:
        return len(self.engine.kinds)


class FakeContext:
    """Calls a ``PlacedEngine``."""

    def __init__(self, engine: PlacedEngine) -> None:
        self.engine, self.addresses = engine, dict[str, int]()

    def set_optimization_profile_async(self, _profile: int, _stream: int) -> None:
        pass

    def set_input_shape(self, _name: str, shape: tuple[int, ...]) -> None:
        assert shape == (3,)

    def get_tensor_shape(self, _: str) -> tuple[int, ...]:
        return (3,)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, _: int) -> bool:
        x, y = (
            torch.frombuffer(
                (ctypes.c_float * 3).from_address(self.addresses[name]), dtype=torch.float32
            )
            for name in "xy"
        )
        y.copy_(self.engine.answer(x))
        return True


class FakeRefitter(Speaker):
    """Keeps the rules of ``IRefitter``."""

    made = 0

    def __init__(self, engine: FakeCudaEngine, logger: ILogger) -> None:
        assert logger.ready, "a logger without its base class crashes TensorRT"
        self.wire = engine.wire
        self.wire("Refitter")
        type(self).made += 1
        self.engine, self.logger = engine, logger
        self.say(ILogger.WARNING, "The logger differs from one already registered.")
        self.given: dict[str, Weights] = {}
        self.weights_validation = False
        self.sets = 0

    def get_all_weights(self) -> list[str]:
        self.wire("get_all_weights")
        return list(self.engine.held)

    def get_missing_weights(self) -> list[str]:
        self.wire("get_missing_weights")
        return self._missing()

    def _missing(self) -> list[str]:
        touched = [g for g in self.engine.groups if any(name in self.given for name in g)]
        return [name for group in touched for name in group if name not in self.given]

    def set_named_weights(self, name: str, weights: Weights, location: TensorLocation) -> bool:
        self.sets += 1
        if _refused(self.wire, f"set {name}"):
            return False
        assert location is TensorLocation.HOST
        if name not in self.engine.held:
            return self._no(f"{name}: The weights cannot be refitted.")
        kind, data = self.engine.held[name]
        wanted = len(data) // kind.nbytes
        if weights.dtype is not kind:
            text = f"refit weights data type {weights.dtype.name}"
            return self._no(f"{name}: {text} must equal to weights prototype data type {kind.name}")
        if weights.size != wanted:
            text = f"refit weights count {weights.size}"
            return self._no(f"{name}: {text} must equal to weights prototype count {wanted}")
        assert (weights.size > 0) == (weights.address != 0)
        self.given[name] = weights
        return True

    def refit_cuda_engine(self) -> bool:
        """Read all addresses. A failure leaves a part of the weights new."""
        assert self.weights_validation
        try:
            self.wire("refit")
        except Refusal:
            return self._no("could not refit")
        if self._missing():
            self._write_some()
            return self._no(f"missing {len(self._missing())} needed Weights.")
        for name, weights in self.given.items():
            try:
                self.wire(f"refit {name}")
            except Refusal:
                return self._no(f"could not refit {name}")
            self._write(name, weights)
        return True

    def _write_some(self) -> None:
        for name, weights in list(self.given.items())[:1]:
            self._write(name, weights)

    def _write(self, name: str, weights: Weights) -> None:
        kind, old = self.engine.held[name]
        data = ctypes.string_at(weights.address, len(old)) if old else b""
        self.engine.held[name] = (kind, data)

    def _no(self, text: str) -> bool:
        self.say(ILogger.ERROR, text)
        self.say(ILogger.INFO, "chatter")
        return False


class TellingRefitter(FakeRefitter):
    """A refitter of newer versions, which has prototypes."""

    def get_weights_prototype(self, name: str) -> Weights:
        self.wire("get_weights_prototype")
        if name not in self.engine.held:
            return Weights(DataType.FLOAT, 0, -1)
        kind, data = self.engine.held[name]
        return Weights(kind, 0, len(data) // kind.nbytes)


class FakeRuntime(Speaker):
    """Reads engine bytes."""

    placed = PlacedEngine

    def __init__(self, wire: Tripwire, logger: ILogger) -> None:
        self.wire, self.logger = wire, logger
        self.gpu_allocator: IGpuAllocator | None = None

    def deserialize_cuda_engine(self, data: bytes) -> FakeCudaEngine | None:
        if _refused(self.wire, "deserialize"):
            self.say(ILogger.ERROR, "no such engine")
            return None
        found = engine_from(data, self.wire)
        return self.placed(found, self.gpu_allocator) if self.gpu_allocator else found


def engine_from(data: bytes, wire: Tripwire) -> FakeCudaEngine:
    held, groups, refittable = json.loads(data)
    kinds = {name: (DataType[kind], bytes.fromhex(text)) for name, (kind, text) in held.items()}
    return FakeCudaEngine(wire, kinds, tuple(map(tuple, groups)), refittable=refittable)


def fake_trt(
    wire: Tripwire,
    refitter: type[FakeRefitter] = TellingRefitter,
    flags: Any = Flags,
    runtime: type[FakeRuntime] = FakeRuntime,
) -> Any:
    """The package ``tensorrt``."""
    return SimpleNamespace(
        __version__="1",
        IGpuAllocator=IGpuAllocator,
        TensorIOMode=TensorIOMode,
        ILogger=ILogger,
        IErrorRecorder=IErrorRecorder,
        Weights=Weights,
        DataType=DataType,
        TensorLocation=TensorLocation,
        SerializationFlag=flags,
        Refitter=type("Refitter", (refitter,), {}),
        Runtime=lambda logger: runtime(wire, logger),
    )


@dataclass
class FakeHandle:
    """An engine in somebody's module.

    Its calls go through a captured graph, as in CUDA graphs: once captured, it answers with the
    weights of then until somebody drops it.
    """

    name: str
    wire: Tripwire
    engine: FakeCudaEngine
    runtime: str = "python"
    settings: Any = None
    pending: Callable[[], bytes] | None = None
    stored: bytes = b""
    captured: dict[str, torch.Tensor] | None = None
    flushes: int = field(default=0)

    def __post_init__(self) -> None:
        self.stored = self.engine.stored()

    trt: Any = None
    """The package that ``prepare`` opens engines with; None: without a runtime."""

    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    weight_name_map: Any = None

    def engine_bytes(self) -> bytes:
        self.wire(f"{self.name}.engine_bytes")
        self._flush()
        return self.stored

    def _flush(self) -> None:
        if self.pending is not None:
            self.stored, self.pending = self.pending(), None
            self.flushes += 1

    def cuda_engine(self) -> FakeCudaEngine | None:
        return self.engine if self.runtime == "python" else None

    def replace(self, engine_bytes: bytes) -> None:
        if _refused(self.wire, f"{self.name}.replace"):
            raise EngineError("The runtime refuses the bytes.")
        self._flush()  # to go back to, if it fails
        self.engine = engine_from(engine_bytes, self.wire)
        self.stored, self.pending = engine_bytes, None
        self.wire(f"{self.name}.replaced")

    def prepare(self, engine_bytes: bytes) -> tuple[FakeCudaEngine, bytes]:
        if _refused(self.wire, f"{self.name}.prepare"):
            raise EngineError("The runtime refuses the bytes.")
        if self.trt is None:
            return engine_from(engine_bytes, self.wire), engine_bytes
        return self.trt.Runtime(None).deserialize_cuda_engine(engine_bytes), engine_bytes

    def cuda_engine_of(self, engine: tuple[FakeCudaEngine, bytes]) -> FakeCudaEngine:
        return engine[0]

    def present(self) -> tuple[FakeCudaEngine, bytes]:
        self.wire(f"{self.name}.present")
        self._flush()
        return self.engine, self.stored

    def put(self, engine: tuple[FakeCudaEngine, bytes]) -> None:
        self.wire(f"{self.name}.put")
        (self.engine, self.stored), self.pending = engine, None
        self.wire(f"{self.name}.was_put")

    def on_stale(self, flush: Callable[[], bytes] | None) -> None:
        self.wire(f"{self.name}.on_stale")
        self.pending = flush

    def drop_captured(self) -> None:
        self.wire(f"{self.name}.drop_captured")
        self.captured = None

    def call(self) -> dict[str, torch.Tensor]:
        if self.captured is None:
            self.captured = self.engine.values()
        return self.captured


def raw(tensor: torch.Tensor) -> bytes:
    """The elements in logical order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _refused(wire: Tripwire, label: str) -> bool:
    try:
        wire(label)
    except Refusal:
        return True
    return False
