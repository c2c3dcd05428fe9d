"""One ``tensorrt.Refitter`` for the life of an engine.

A new refitter compiles its own kernels at its first refit, for seconds; the next refit takes
milliseconds. So there is one for each engine, its names are set once, to buffers that stay, and a
refit reads what is in them then. Rules are from ``NvInfer.h``, class ``IRefitter`` (TensorRT 10 to
11, TensorRT-RTX 1.4 to 1.7).
"""

from __future__ import annotations

import gc
import re
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import EngineError, NotRefittableError, Problem
from refitkit.processes import ForkedLock

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from refitkit.model import Slot


_COUNT = re.compile(r"prototype count (\d+)")
_GUESSES = ("FLOAT", "HALF", "BF16", "INT32", "INT64", "INT8", "FP8", "BOOL")


class PersistentRefitter:
    """A thin and exact wrapper: every result is looked at, and what TensorRT logs is told.

    Attributes:
        engine: The ``ICudaEngine`` that it refits.
    """

    def __init__(self, engine: Any, trt: Any, device: torch.device) -> None:
        """Make the refitter. Fast; the first ``refit`` is not.

        Args:
            engine: A live ``ICudaEngine``.
            trt: The package ``tensorrt``.
            device: Where the engine runs, and where buffers will be.

        Raises:
            NotRefittableError: The engine was built without the flag for refits.
        """
        self.engine = engine
        self._trt = trt
        self._device = device
        self._heard = Listener(trt)
        if not engine.refittable:
            raise NotRefittableError(
                "The engine was built without TensorRT's flag REFIT.",
                hint="Compile it with immutable_weights=False.",
            )
        with current(device), uncollected():
            self._refitter = trt.Refitter(engine, self._heard.logger)
        self._refitter.error_recorder = self._heard.recorder
        self._refitter.weights_validation = True
        self._bound: dict[str, torch.Tensor] = {}
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch's

    def names(self) -> tuple[str, ...]:
        """Names of all weights that can be refitted."""
        return tuple(self._refitter.get_all_weights())

    # -- facts ------------------------------------------------------------------------------

    def facts(self, known: Mapping[str, Slot]) -> dict[str, WeightFact]:
        """Dtype and count of every weight, as the engine has them.

        Args:
            known: What somebody else knows of the weights: shapes, and all where this TensorRT has
                no prototypes.

        Raises:
            NotRefittableError: Nobody knows; names the weights.
        """
        found = {name: self._fact(name, known.get(name)) for name in self.names()}
        lost = [Problem(name, "unknown dtype and count") for name, f in found.items() if f is None]
        if lost:
            raise NotRefittableError(
                "This version of TensorRT does not tell what its weights are.",
                problems=lost,
                hint="Open the module with the plan that was made when it was compiled.",
            )
        return {name: fact for name, fact in found.items() if fact is not None}

    def _fact(self, name: str, slot: Slot | None) -> WeightFact | None:
        fact = self._prototype(name)
        if fact is None:
            return fact_of_slot(slot) if slot is not None else self._tried(name)
        fits = slot is not None and (slot.dtype, slot.count) == (fact.dtype, fact.count)
        return replace(fact, shape=slot.shape) if slot is not None and fits else fact

    def _prototype(self, name: str) -> WeightFact | None:
        if not hasattr(self._refitter, "get_weights_prototype"):
            return None
        weights = self._refitter.get_weights_prototype(name)
        if weights.size < 0:
            return None
        return fact_of_trt(name, weights.dtype, weights.size)

    def _tried(self, name: str) -> WeightFact | None:
        """Learn a fact from refusals, which name the count that was expected, and acceptance.

        Some versions take other types, too, and warn: a type is believed only if it is the one
        that TensorRT takes without a word.
        """
        count = self._tried_count(name)
        if count is None:
            return None
        quiet = [
            guess for guess in self._guesses() if self._takes(name, guess, count) == (True, "")
        ]
        if len(quiet) != 1:
            return None
        return fact_of_trt(name, getattr(self._trt.DataType, quiet[0]), count)

    def _tried_count(self, name: str) -> int | None:
        for guess in self._guesses():
            taken, said = self._takes(name, guess, 1)
            wanted = _COUNT.search(said)
            if taken or wanted:
                return int(wanted[1]) if wanted else 1
        return None

    def _guesses(self) -> list[str]:
        return [guess for guess in _GUESSES if hasattr(self._trt.DataType, guess)]

    def _takes(self, name: str, guess: str, count: int) -> tuple[bool, str]:
        """Whether TensorRT takes weights, and what it says.

        It does not read them before a refit, and before that ``bind`` sets others.
        """
        place = torch.zeros(1, dtype=torch.int64)
        kind = getattr(self._trt.DataType, guess)
        self._heard.take()
        taken = self._set(name, self._trt.Weights(kind, place.data_ptr() if count else 0, count))
        return taken, " ".join(self._heard.take())

    # -- binding ----------------------------------------------------------------------------

    def bind(self, facts: Mapping[str, WeightFact], buffers: Mapping[str, torch.Tensor]) -> None:
        """Set every name, once, to the buffer that later refits read.

        Args:
            facts: What the engine asks of each weight.
            buffers: A contiguous tensor for each name; kept alive from now on.

        Raises:
            EngineError: TensorRT refuses some, or lacks some; lists all of them.
        """
        self._heard.take()
        self._bound = dict(buffers)
        refused = []
        for name, buffer in buffers.items():
            fact = facts[name]
            kind = getattr(self._trt.DataType, fact.trt_type)
            address = buffer.data_ptr() if fact.count else 0
            weights = self._trt.Weights(kind, address, fact.trt_count)
            if not self._set(name, weights, buffer.device.type):
                refused.append(Problem(name, "refused", f"{fact.trt_count} x {fact.trt_type}"))
        refused += [Problem(n, "missing") for n in self._refitter.get_missing_weights()]
        if refused:
            reason = self._heard.quote()
            raise EngineError(f"TensorRT does not take its weights{reason}.", problems=refused)

    def _set(self, name: str, weights: Any, kind: str = "cpu") -> bool:
        location = self._trt.TensorLocation
        where = location.DEVICE if kind == "cuda" else location.HOST
        return bool(self._refitter.set_named_weights(name, weights, where))

    # -- refitting --------------------------------------------------------------------------

    def refit(self, *, idle: bool = False) -> None:
        """Give the engine what the buffers hold; when this returns, it is done.

        Work that is pending on the current stream is waited for, and so is all other work of the
        device: TensorRT leaves undefined what happens to calls that are still running. That wait
        takes up to two milliseconds even where there is nothing to wait for.

        Args:
            idle: Whether no call of the engine can be pending: then only the stream is waited for.

        Raises:
            EngineError: TensorRT failed. Some of the weights may be new by then, and others not.
        """
        self._heard.take()
        with current(self._device):
            done = self._run(idle=idle)
        if not done:
            missing = self._refitter.get_missing_weights()
            raise EngineError(
                f"TensorRT failed to refit the engine{self._heard.quote()}.",
                problems=[Problem(name, "missing") for name in missing],
            )

    def _run(self, *, idle: bool) -> bool:
        if self._stream is None:
            return bool(self._refitter.refit_cuda_engine())
        if idle:
            torch.cuda.current_stream(self._device).synchronize()
        else:
            torch.cuda.synchronize(self._device)
        try:
            return bool(self._refitter.refit_cuda_engine_async(self._stream.cuda_stream))
        finally:
            self._stream.synchronize()


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one, as TensorRT wants it for all that it does."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# MERGED serialized: Live engines as bytes, and back.


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


# MERGED weighttypes: TensorRT's data types as torch has them.

_TORCH_NAME = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
    "FP8": "float8_e4m3fn",
    "E8M0": "float8_e8m0fnu",
}
_TRT_NAME = {torch: trt for trt, torch in _TORCH_NAME.items()}
_TWO_IN_A_BYTE = {"INT4", "FP4"}
"""torch keeps such weights as ``uint8``, and TensorRT counts their halves."""


def torch_name(kind: str) -> str | None:
    """Torch's name for a ``tensorrt.DataType``, by its name; None where torch has none."""
    return "uint8" if kind in _TWO_IN_A_BYTE else _TORCH_NAME.get(kind)


@dataclass(frozen=True)
class WeightFact:
    """What an engine asks of one weight.

    Attributes:
        name: The engine's own name of it.
        dtype: torch's name without the ``torch.``.
        count: Number of elements as torch counts them.
        trt_type: Name of the ``tensorrt.DataType``.
        trt_count: Number of elements as TensorRT counts them.
        shape: Sizes where somebody knows them; TensorRT does not.
    """

    name: str
    dtype: str
    count: int
    trt_type: str
    trt_count: int
    shape: tuple[int, ...] | None = None


def fact_of_trt(name: str, data_type: Any, count: int) -> WeightFact:
    """The fact that TensorRT's own words for a weight amount to.

    Args:
        name: Name of the weight.
        data_type: A ``tensorrt.DataType``.
        count: Number of its elements.

    Raises:
        NotRefittableError: torch has no such type.
    """
    kind = data_type.name
    if kind in _TWO_IN_A_BYTE:
        return WeightFact(name, "uint8", (count + 1) // 2, kind, count)
    if kind not in _TORCH_NAME:
        problem = Problem(name, "dtype", f"TensorRT's {kind}", f"one of {sorted(_TORCH_NAME)}")
        raise NotRefittableError("torch has no such type of weights.", problems=[problem])
    return WeightFact(name, _TORCH_NAME[kind], count, kind, count)


def fact_of_slot(slot: Slot) -> WeightFact | None:
    """The fact that a slot amounts to; None where TensorRT has no such type."""
    kind = _TRT_NAME.get(slot.dtype)
    if kind is None:
        return None
    return WeightFact(slot.name, slot.dtype, slot.count, kind, slot.count, slot.shape)


# MERGED trtlog: What TensorRT says, kept to be told in an error instead of on stderr.

_MAKING = ForkedLock()
_KEPT = 20
_NOISE = "differs from one already registered"
"""Said of every logger but a process's first, as torch_tensorrt's is."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python's garbage collector off while a refitter or a runtime is made.

    TensorRT holds a lock of the whole process while it makes one, and calls our logger under it.
    A collection that starts in the logger can free another refitter or runtime that was garbage.
    Its destructor takes the same lock, so the thread would wait for itself for ever.
    """
    with _MAKING.held:
        was_on = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_on:
                gc.enable()


class Listener:
    """Hears what one refitter or runtime has to say.

    Attributes:
        logger: A ``tensorrt.ILogger`` to make it with.
        recorder: A ``tensorrt.IErrorRecorder`` to assign to it: with one, errors come here even
            where TensorRT prefers another logger. Both have to live as long as it does.
    """

    def __init__(self, trt: Any) -> None:
        """Make both. TensorRT demands subclasses, of classes that exist only once it is imported.

        Args:
            trt: The package ``tensorrt``.
        """
        self._said: deque[str] = deque(maxlen=_KEPT)
        self.logger: Any = _logger_class(trt)(self._said)
        self.recorder: Any = _recorder_class(trt)(self._said)

    def take(self) -> tuple[str, ...]:
        """What was said since the last time."""
        said = tuple(self._said)
        self._said.clear()
        return said

    def quote(self) -> str:
        """What was said, as the end of a sentence."""
        said = self.take()
        return f"; TensorRT says: {' | '.join(said)}" if said else "; TensorRT gives no reason"


def _logger_class(trt: Any) -> type:
    severe = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING)

    class Logger(trt.ILogger):  # type: ignore[misc] # of a package without types
        def __init__(self, said: deque[str]) -> None:
            trt.ILogger.__init__(self)
            self._said = said

        def log(self, severity: Any, msg: str) -> None:
            if severity in severe and _NOISE not in msg:
                self._said.append(msg)

    return Logger


def _recorder_class(trt: Any) -> type:
    class Recorder(trt.IErrorRecorder):  # type: ignore[misc] # of a package without types
        def __init__(self, said: deque[str]) -> None:
            trt.IErrorRecorder.__init__(self)
            self._said = said

        def report_error(self, code: Any, desc: str) -> bool:  # noqa: ARG002 - TensorRT's
            self._said.append(desc)
            return True

        def num_errors(self) -> int:
            return len(self._said)

        def get_error_desc(self, index: int) -> str:
            return self._said[index]

        def get_error_code(self, index: int) -> Any:  # noqa: ARG002 - TensorRT's
            return trt.ErrorCodeTRT.UNSPECIFIED_ERROR

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self._said.clear()

    return Recorder
