"""``tensorrt.Refitter`` kept for the life of an engine, and TensorRT's bytes, dtypes and messages.

A new refitter compiles its own kernels at its first refit, which takes seconds. The next refit
takes milliseconds. So each engine keeps one refitter. Its names are set once, to buffers that stay
at their addresses, and each refit reads the present content of these buffers.

The rules of refitters are from ``NvInfer.h``, class ``IRefitter`` (TensorRT 10 to 11, TensorRT-RTX
1.4 to 1.7).

Reading order: ``PersistentRefitter``, then the dtypes of weights (``WeightSpec``), then engines as
bytes (``serialize_engine``, ``DeserializedEngine``), then TensorRT's messages (``MessageLog``).
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


_EXPECTED_COUNT = re.compile(r"prototype count (\d+)")
_CANDIDATE_TYPES = ("FLOAT", "HALF", "BF16", "INT32", "INT64", "INT8", "FP8", "BOOL")


class PersistentRefitter:
    """Wraps ``tensorrt.Refitter``: checks every result and puts TensorRT's messages into errors.

    Attributes:
        engine: ``ICudaEngine`` that it refits.
    """

    def __init__(self, engine: Any, trt: Any, device: torch.device) -> None:
        """Create the refitter. This is fast; the first ``refit`` is slow.

        Args:
            engine: Live ``ICudaEngine``.
            trt: The package ``tensorrt``.
            device: Device of the engine and of the buffers.

        Raises:
            NotRefittableError: The engine was built without the flag ``REFIT``.
        """
        self.engine = engine
        self._trt = trt
        self._device = device
        self._log = MessageLog(trt)
        if not engine.refittable:
            raise NotRefittableError(
                "The engine was built without TensorRT's flag REFIT.",
                hint="Compile it with immutable_weights=False.",
            )
        with current_device(device), collector_disabled():
            self._refitter = trt.Refitter(engine, self._log.logger)
        self._refitter.error_recorder = self._log.recorder
        self._refitter.weights_validation = True  # TensorRT refuses wrong dtypes and counts
        self._bound: dict[str, torch.Tensor] = {}
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch's

    def names(self) -> tuple[str, ...]:
        """Names of all weights that can be refitted."""
        return tuple(self._refitter.get_all_weights())

    # -- specs ------------------------------------------------------------------------------

    def specs(self, known: Mapping[str, Slot]) -> dict[str, WeightSpec]:
        """Dtype and number of elements of every weight, as the engine reports them.

        Args:
            known: Slots by name, from a plan. They add shapes. If this TensorRT has no prototypes,
                they also give dtypes and counts.

        Returns:
            One spec per weight, by name.

        Raises:
            NotRefittableError: Some dtypes and counts are unknown; lists these weights.
        """
        found = {name: self._spec(name, known.get(name)) for name in self.names()}
        unknown = [
            Problem(name, "unknown dtype and count") for name, spec in found.items() if spec is None
        ]
        if unknown:
            raise NotRefittableError(
                "This version of TensorRT does not report dtypes and counts of weights.",
                problems=unknown,
                hint="Open the module with the plan that was made when it was compiled.",
            )
        return {name: spec for name, spec in found.items() if spec is not None}

    def _spec(self, name: str, slot: Slot | None) -> WeightSpec | None:
        spec = self._prototype(name)
        if spec is None:
            return spec_of_slot(slot) if slot is not None else self._probed_spec(name)
        fits = slot is not None and (slot.dtype, slot.count) == (spec.dtype, spec.count)
        return replace(spec, shape=slot.shape) if slot is not None and fits else spec

    def _prototype(self, name: str) -> WeightSpec | None:
        # older versions of TensorRT have no get_weights_prototype
        if not hasattr(self._refitter, "get_weights_prototype"):
            return None
        weights = self._refitter.get_weights_prototype(name)
        if weights.size < 0:  # TensorRT has no prototype of this name
            return None
        return spec_of_trt(name, weights.dtype, weights.size)

    def _probed_spec(self, name: str) -> WeightSpec | None:
        """Find dtype and count of a weight by setting weights of each type; None if it fails.

        Refusals name the expected count. Some versions also accept wrong types with a warning. So
        a type counts only if it is the only one that TensorRT accepts without a message.
        """
        count = self._probed_count(name)
        if count is None:
            return None
        silent = [
            kind
            for kind in self._candidate_types()
            if self._accepts(name, kind, count) == (True, "")
        ]
        if len(silent) != 1:
            return None
        return spec_of_trt(name, getattr(self._trt.DataType, silent[0]), count)

    def _probed_count(self, name: str) -> int | None:
        for kind in self._candidate_types():
            accepted, message = self._accepts(name, kind, 1)
            expected = _EXPECTED_COUNT.search(message)
            if accepted or expected:
                return int(expected[1]) if expected else 1
        return None

    def _candidate_types(self) -> list[str]:
        return [kind for kind in _CANDIDATE_TYPES if hasattr(self._trt.DataType, kind)]

    def _accepts(self, name: str, kind: str, count: int) -> tuple[bool, str]:
        """Whether TensorRT accepts weights of a type and count, and its messages."""
        # TensorRT reads no weights before a refit, and `bind` sets other ones before that. So one
        # element of memory is enough for any count.
        memory = torch.zeros(1, dtype=torch.int64)
        data_type = getattr(self._trt.DataType, kind)
        address = memory.data_ptr() if count else 0
        self._log.take()
        accepted = self._set(name, self._trt.Weights(data_type, address, count))
        return accepted, " ".join(self._log.take())

    # -- binding ----------------------------------------------------------------------------

    def bind(self, specs: Mapping[str, WeightSpec], buffers: Mapping[str, torch.Tensor]) -> None:
        """Set each name to the buffer that later refits read. Call it once.

        Args:
            specs: Spec of each weight, by name.
            buffers: Contiguous tensor of each weight, by name, on the device or the host. The
                refitter keeps them alive.

        Raises:
            EngineError: TensorRT refuses or misses some weights; lists all of them.
        """
        self._log.take()
        self._bound = dict(buffers)  # TensorRT keeps only the addresses
        refused = []
        for name, buffer in buffers.items():
            spec = specs[name]
            data_type = getattr(self._trt.DataType, spec.trt_type)
            address = buffer.data_ptr() if spec.count else 0
            weights = self._trt.Weights(data_type, address, spec.trt_count)
            if not self._set(name, weights, buffer.device.type):
                refused.append(Problem(name, "refused", f"{spec.trt_count} x {spec.trt_type}"))
        # TensorRT merges some weights: if one of a group is set, it requires all of them
        refused += [Problem(n, "missing") for n in self._refitter.get_missing_weights()]
        if refused:
            reason = self._log.reason()
            raise EngineError(
                f"TensorRT does not accept the buffers of the weights{reason}.", problems=refused
            )

    @contextmanager
    def bound(
        self, specs: Mapping[str, WeightSpec], buffers: Mapping[str, torch.Tensor]
    ) -> Iterator[None]:
        """Set each name to a buffer for the refits inside the context; see ``bind``."""
        try:
            self.bind(specs, buffers)
            yield
        finally:
            self.unbind()

    def unbind(self) -> None:
        """Free the buffers. Set others before the next refit: only that reads them."""
        self._bound = {}

    def _set(self, name: str, weights: Any, device_type: str = "cpu") -> bool:
        location = self._trt.TensorLocation
        where = location.DEVICE if device_type == "cuda" else location.HOST
        return bool(self._refitter.set_named_weights(name, weights, where))

    # -- refitting --------------------------------------------------------------------------

    def refit(self, *, idle: bool = False) -> None:
        """Write the content of the buffers into the engine, and wait until that is done.

        The refit first waits for all work on the device: TensorRT does not define the results of
        calls that run meanwhile. That wait takes up to two milliseconds even on an idle device.

        Args:
            idle: Whether no call of the engine can be pending. If True, the refit waits only for
                the current stream.

        Raises:
            EngineError: TensorRT failed; the engine may hold a mixture of old and new weights.
        """
        self._log.take()
        with current_device(self._device):
            done = self._run(idle=idle)
        if not done:
            missing = self._refitter.get_missing_weights()
            raise EngineError(
                f"TensorRT failed to refit the engine{self._log.reason()}.",
                problems=[Problem(name, "missing") for name in missing],
            )

    def _run(self, *, idle: bool) -> bool:
        if self._stream is None:
            return bool(self._refitter.refit_cuda_engine())
        wait_for_calls(self._device, idle=idle)
        try:
            return bool(self._refitter.refit_cuda_engine_async(self._stream.cuda_stream))
        finally:
            self._stream.synchronize()


def wait_for_calls(device: torch.device, *, idle: bool) -> None:
    """Wait for work on a device.

    Args:
        device: The device.
        idle: Whether no call can be pending, so that only the current stream is waited for.
    """
    if device.type != "cuda":
        return
    if idle:
        torch.cuda.current_stream(device).synchronize()
    else:
        torch.cuda.synchronize(device)


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which a device is current, as all calls of TensorRT require."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# -- dtypes of weights --------------------------------------------------------------------------

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
_FOUR_BIT_TYPES = {"INT4", "FP4"}
"""Types that torch keeps as ``uint8``, two elements to a byte. TensorRT counts the elements."""


@dataclass(frozen=True)
class WeightSpec:
    """Dtype and size that an engine requires of one weight.

    Attributes:
        name: The engine's own name of the weight.
        dtype: Name of the torch dtype without ``torch.``.
        count: Number of elements as torch counts them.
        trt_type: Name of the ``tensorrt.DataType``.
        trt_count: Number of elements as TensorRT counts them.
        shape: Shape from a plan; None if it is unknown. TensorRT does not report shapes.
    """

    name: str
    dtype: str
    count: int
    trt_type: str
    trt_count: int
    shape: tuple[int, ...] | None = None


def torch_name(kind: str) -> str | None:
    """Name of the torch dtype that holds a ``tensorrt.DataType``; None if torch has none.

    Args:
        kind: Name of the ``tensorrt.DataType``, such as ``HALF``.
    """
    return "uint8" if kind in _FOUR_BIT_TYPES else _TORCH_NAME.get(kind)


def spec_of_trt(name: str, data_type: Any, count: int) -> WeightSpec:
    """The spec of a weight that TensorRT describes.

    Args:
        name: Name of the weight.
        data_type: A ``tensorrt.DataType``.
        count: Number of elements as TensorRT counts them.

    Raises:
        NotRefittableError: torch has no dtype for this type.
    """
    kind = data_type.name
    if kind in _FOUR_BIT_TYPES:
        return WeightSpec(name, "uint8", (count + 1) // 2, kind, count)
    if kind not in _TORCH_NAME:
        problem = Problem(name, "dtype", f"TensorRT's {kind}", f"one of {sorted(_TORCH_NAME)}")
        raise NotRefittableError("torch has no dtype for this type.", problems=[problem])
    return WeightSpec(name, _TORCH_NAME[kind], count, kind, count)


def spec_of_slot(slot: Slot) -> WeightSpec | None:
    """The spec of a weight that a slot describes; None if TensorRT has no type for its dtype."""
    kind = _TRT_NAME.get(slot.dtype)
    if kind is None:
        return None
    return WeightSpec(slot.name, slot.dtype, slot.count, kind, slot.count, slot.shape)


# -- engines as bytes ---------------------------------------------------------------------------


def serialize_engine(engine: Any, trt: Any) -> bytes:
    """Bytes of a live engine with its present weights. The bytes can be refitted again.

    Args:
        engine: Live ``ICudaEngine``.
        trt: The package ``tensorrt``.

    Raises:
        EngineError: TensorRT refuses a flag or fails.
    """
    flags = trt.SerializationFlag
    config = engine.create_serialization_config()
    config.clear_flag(flags.EXCLUDE_WEIGHTS)
    refusals = [] if not config.get_flag(flags.EXCLUDE_WEIGHTS) else ["EXCLUDE_WEIGHTS"]
    # Without INCLUDE_REFIT (since TensorRT 10.14) a loaded engine cannot be refitted.
    include = getattr(flags, "INCLUDE_REFIT", None)
    if include is not None and not config.set_flag(include):
        refusals.append("INCLUDE_REFIT")
    data = None if refusals else engine.serialize_with_config(config)
    if data is None:
        cause = f": it refuses the flags {', '.join(refusals)}" if refusals else ""
        raise EngineError(f"TensorRT failed to serialize the refitted engine{cause}.")
    return bytes(data)


class DeserializedEngine:
    """An engine that refitkit itself deserialized, with the runtime that it needs.

    Attributes:
        engine: The ``ICudaEngine``.
    """

    def __init__(self, data: bytes, trt: Any) -> None:
        """Deserialize the engine on the current device.

        Args:
            data: Serialized engine.
            trt: The package ``tensorrt``.

        Raises:
            EngineError: TensorRT refuses the bytes.
        """
        self._log = MessageLog(trt)  # the log and the runtime have to outlive the engine
        with collector_disabled():
            self._runtime = trt.Runtime(self._log.logger)
        self._runtime.error_recorder = self._log.recorder
        self.engine = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise EngineError(f"TensorRT cannot read the engine's bytes{self._log.reason()}.")


# -- messages of TensorRT -----------------------------------------------------------------------

_COLLECTOR_LOCK = ForkedLock()
_MESSAGE_LIMIT = 20
_NOISE = "differs from one already registered"
"""TensorRT logs this for every logger after a process's first, which is torch_tensorrt's."""


@contextmanager
def collector_disabled() -> Iterator[None]:
    """Disable Python's garbage collector while a refitter or a runtime is created.

    TensorRT holds a process-wide lock while it creates one, and calls the logger under this lock.
    A collection that starts in the logger can free another refitter or runtime. Its destructor
    takes the same lock, so the thread would wait for itself forever.
    """
    with _COLLECTOR_LOCK.held:
        was_on = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_on:
                gc.enable()


class MessageLog:
    """Collects the messages of one refitter or runtime, for errors instead of stderr.

    Attributes:
        logger: ``tensorrt.ILogger`` to create the refitter or runtime with.
        recorder: ``tensorrt.IErrorRecorder`` to assign to the refitter or runtime. With a recorder,
            errors arrive here even if TensorRT prefers another logger. Logger and recorder have to
            outlive the refitter or runtime.
    """

    def __init__(self, trt: Any) -> None:
        """Create logger and recorder.

        Args:
            trt: The package ``tensorrt``.
        """
        self._messages: deque[str] = deque(maxlen=_MESSAGE_LIMIT)
        self.logger: Any = _logger_class(trt)(self._messages)
        self.recorder: Any = _recorder_class(trt)(self._messages)

    def take(self) -> tuple[str, ...]:
        """Return the messages since the last call, at most the latest 20, and forget them."""
        messages = tuple(self._messages)
        self._messages.clear()
        return messages

    def reason(self) -> str:
        """The messages since the last ``take``, as the end of a sentence."""
        messages = self.take()
        return f"; TensorRT reports: {' | '.join(messages)}" if messages else "; no reason is given"


# TensorRT requires subclasses of its own classes, which exist only once it is imported.


def _logger_class(trt: Any) -> type:
    severe = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING)

    class Logger(trt.ILogger):  # type: ignore[misc] # of a package without types
        def __init__(self, messages: deque[str]) -> None:
            trt.ILogger.__init__(self)
            self._messages = messages

        def log(self, severity: Any, msg: str) -> None:
            if severity in severe and _NOISE not in msg:
                self._messages.append(msg)

    return Logger


def _recorder_class(trt: Any) -> type:
    class Recorder(trt.IErrorRecorder):  # type: ignore[misc] # of a package without types
        def __init__(self, messages: deque[str]) -> None:
            trt.IErrorRecorder.__init__(self)
            self._messages = messages

        def report_error(self, code: Any, desc: str) -> bool:  # noqa: ARG002 - TensorRT's
            self._messages.append(desc)
            return True

        def num_errors(self) -> int:
            return len(self._messages)

        def get_error_desc(self, index: int) -> str:
            return self._messages[index]

        def get_error_code(self, index: int) -> Any:  # noqa: ARG002 - TensorRT's
            return trt.ErrorCodeTRT.UNSPECIFIED_ERROR

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self._messages.clear()

    return Recorder
