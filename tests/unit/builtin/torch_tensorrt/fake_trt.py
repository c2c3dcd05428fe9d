"""TensorRT in memory: engines, refitters and runtimes that keep its rules, and fail when told to.

A ``Refusal`` in the wire is what TensorRT does instead of raising: it returns False or None.
Weights are read from the addresses that were set, when the refit runs, so that a source which was
freed or overwritten shows.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import EngineError
from refitkit.program.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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

    def __init__(self, wire: Tripwire, logger: ILogger) -> None:
        self.wire, self.logger = wire, logger

    def deserialize_cuda_engine(self, data: bytes) -> FakeCudaEngine | None:
        if _refused(self.wire, "deserialize"):
            self.say(ILogger.ERROR, "no such engine")
            return None
        return engine_from(data, self.wire)


def engine_from(data: bytes, wire: Tripwire) -> FakeCudaEngine:
    held, groups, refittable = json.loads(data)
    kinds = {name: (DataType[kind], bytes.fromhex(text)) for name, (kind, text) in held.items()}
    return FakeCudaEngine(wire, kinds, tuple(map(tuple, groups)), refittable=refittable)


def fake_trt(
    wire: Tripwire, refitter: type[FakeRefitter] = TellingRefitter, flags: Any = Flags
) -> Any:
    """The package ``tensorrt``."""
    return SimpleNamespace(
        ILogger=ILogger,
        IErrorRecorder=IErrorRecorder,
        Weights=Weights,
        DataType=DataType,
        TensorLocation=TensorLocation,
        SerializationFlag=flags,
        Refitter=type("Refitter", (refitter,), {}),
        Runtime=lambda logger: FakeRuntime(wire, logger),
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
        return engine_from(engine_bytes, self.wire), engine_bytes

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
