"""The engines in a target, each behind an :class:`~.handles.EngineHandle`.

Three kinds of holders: upstream's ``TorchTensorRTModule`` (2.11 to 2.14, either runtime), its
``PythonTorchTensorRTModule`` (2.11 and 2.12), and plain attributes, where an exported or retraced
program keeps its engines.
"""

from __future__ import annotations

import base64
import binascii
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.metadata import read_metadata
from refitkit.builtin.torch_tensorrt.settings import settings_from
from refitkit.builtin.torch_tensorrt.stale import Stored, watch_child, watch_engine
from refitkit.errors import EngineError, UnsupportedTargetError, raised_as

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, MutableMapping, Sequence


_CARRIED = ("use_pre_allocated_outputs", "use_output_allocator_outputs")
"""What users set on a live engine and upstream does not store."""


class _Handle:
    """What all handles have in common: bytes that are stored, and may be stale."""

    _stored: Stored

    def prepare(self, engine_bytes: bytes) -> Any:
        """Make another engine."""
        raise NotImplementedError

    def put(self, engine: Any) -> None:
        """Put an engine in place."""
        raise NotImplementedError

    def replace(self, engine_bytes: bytes) -> None:
        """Put another engine in its place."""
        with self._stored.replaced():
            self.put(self.prepare(engine_bytes))

    def on_stale(self, flush: Callable[[], bytes] | None) -> None:
        """Note that the stored bytes are stale."""
        self._stored.clear() if flush is None else self._stored.mark(flush)


class _ChildEngine(_Handle):
    """The engine of a child module of upstream's."""

    name: str
    child: Any
    _parts: tuple[str, ...]
    """Attributes of the child that belong to one engine."""

    @property
    def settings(self) -> Any:
        """Its ``CompilationSettings``."""
        return self.child.settings

    def set_up(self) -> None:
        """Have upstream deserialize the engine, where that was put off."""
        if self.child.engine is None:
            _set_up(self.child, self.name)

    def engine_bytes(self) -> bytes:
        """The stored engine."""
        self._stored.flush()
        return bytes(self.child.serialized_engine)

    def present(self) -> dict[str, Any]:
        """What is in place."""
        self._stored.flush()
        return _held(self.child, self._parts)


class ModuleEngine(_ChildEngine):
    """The engine of a ``TorchTensorRTModule``; see :class:`~.handles.EngineHandle`."""

    _parts = ("serialized_engine", "engine")

    def __init__(self, name: str, child: Any) -> None:
        """Found by ``find_engines``."""
        self.name = name
        self.child = child
        self._stored = Stored(self._store, self._watch)

    @property
    def runtime(self) -> Runtime:
        """Which runtime holds it, or will once it is set up."""
        if self.child.engine is not None:
            return "python" if is_python_engine(self.child.engine) else "cpp"
        features = upstream.torch_tensorrt().ENABLED_FEATURES
        return "cpp" if features.torch_tensorrt_runtime else "python"

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of its inputs, in order."""
        return tuple(self.child.input_binding_names)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of its outputs, in order."""
        return tuple(self.child.output_binding_names)

    @property
    def weight_name_map(self) -> Any:
        """The cached map of 2.11 and 2.12."""
        return getattr(self.child, "weight_name_map", None)

    def cuda_engine(self) -> Any:
        """The live ``ICudaEngine`` of the Python runtime, set up on first need."""
        if self.runtime == "cpp":
            return None
        self.set_up()
        return self.child.engine.cuda_engine

    def prepare(self, engine_bytes: bytes) -> dict[str, Any]:
        """Make another engine, unless upstream has put that off."""
        self._stored.flush()
        engine = self.child.engine
        if engine is None:
            return {"serialized_engine": engine_bytes}
        with raised_as(EngineError, f"torch_tensorrt refuses the engine for {self.name!r}"):
            twin = _twin(self.child, serialized_engine=engine_bytes, engine=None)
            twin.setup_engine()
            _carry_over(engine, twin.engine)
        return _held(twin, self._parts)

    def put(self, engine: dict[str, Any]) -> None:
        """Put an engine in place."""
        with self._stored.replaced():
            vars(self.child).update(engine)

    def part_from(self, other: ModuleEngine) -> None:
        """Have an engine object of its own, where a copy shares the original's.

        Raises:
            EngineError: torch_tensorrt refuses the bytes.
        """
        if self.child.engine is not None and self.child.engine is other.child.engine:
            self.replace(other.engine_bytes())

    def drop_captured(self) -> None:
        """Drop captured CUDA graphs."""
        if self.child.engine is not None:
            _drop_captured(self.child.engine)

    def _store(self, engine_bytes: bytes) -> None:
        self.child.serialized_engine = engine_bytes
        if is_python_engine(self.child.engine):
            _store_in_engine(self.child.engine, engine_bytes)

    def _watch(self, stored: Stored) -> Callable[[], None]:
        ends = [watch_child(self.child, stored)]
        if is_python_engine(self.child.engine):
            ends.append(watch_engine(self.child.engine, stored))
        return lambda: _call_all(ends)


class PythonModuleEngine(_ChildEngine):
    """The engine of a ``PythonTorchTensorRTModule``; see :class:`~.handles.EngineHandle`."""

    _parts = ("serialized_engine", "engine", "context")
    runtime: Runtime = "python"

    def __init__(self, name: str, child: Any) -> None:
        """Found by ``find_engines``."""
        self.name = name
        self.child = child
        self._stored = Stored(self._store, lambda stored: watch_child(child, stored))

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of its inputs, in order."""
        return tuple(self.child.input_names)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of its outputs, in order."""
        return tuple(self.child.output_names)

    @property
    def weight_name_map(self) -> Any:
        """The cached map of 2.11 and 2.12."""
        return self.child.weight_name_map

    def cuda_engine(self) -> Any:
        """The live ``ICudaEngine``, set up on first need."""
        self.set_up()
        return self.child.engine

    def prepare(self, engine_bytes: bytes) -> dict[str, Any]:
        """Make another engine, unless upstream has put that off."""
        self._stored.flush()
        if self.child.engine is None:
            return {"serialized_engine": engine_bytes}
        with raised_as(EngineError, f"torch_tensorrt refuses the engine for {self.name!r}"):
            twin = _twin(self.child, serialized_engine=engine_bytes)
            twin.setup_engine()
        return _held(twin, self._parts)

    def put(self, engine: dict[str, Any]) -> None:
        """Put an engine in place."""
        with self._stored.replaced():
            vars(self.child).update(engine)
            if self.child.engine is not None:
                self.drop_captured()

    def drop_captured(self) -> None:
        """Drop captured CUDA graphs."""
        _drop_captured(self.child)

    def _store(self, engine_bytes: bytes) -> None:
        self.child.serialized_engine = engine_bytes


@dataclass(frozen=True)
class EngineLocation:
    """Where somebody keeps an engine.

    Attributes:
        of: An object's ``__dict__`` or a mapping.
        key: Its name there.
    """

    of: MutableMapping[str, Any]
    key: str


class AttributeEngine(_Handle):
    """An engine that is kept as it is, without a child; see :class:`~.handles.EngineHandle`."""

    def __init__(self, name: str, places: Iterable[EngineLocation]) -> None:
        """Found by ``find_engines``.

        Args:
            name: Name of the engine.
            places: All that keep it; at least one.

        Raises:
            NotRefittableError: It has no metadata.
            UnsupportedTargetError: Its metadata is refused.
        """
        self.name = name
        self._places = tuple(places)
        info = info_of(self.engine, name)
        metadata = read_metadata(info.metadata, name)
        self.settings = settings_from(metadata.settings, name)
        self.weight_name_map = metadata.weight_name_map
        self.input_names = info.input_names
        self.output_names = info.output_names
        self._stored = Stored(
            lambda engine_bytes: _store_in_engine(self.engine, engine_bytes),
            lambda stored: watch_engine(self.engine, stored),
        )

    @property
    def engine(self) -> Any:
        """Upstream's engine."""
        return self._places[0].of[self._places[0].key]

    @property
    def runtime(self) -> Runtime:
        """Which runtime holds it."""
        return "python" if is_python_engine(self.engine) else "cpp"

    def set_up(self) -> None:
        """Nothing: an engine without a child is always set up."""

    def engine_bytes(self) -> bytes:
        """The stored engine."""
        self._stored.flush()
        return info_of(self.engine, self.name).engine_bytes

    def cuda_engine(self) -> Any:
        """The live ``ICudaEngine`` of the Python runtime."""
        return self.engine.cuda_engine if self.runtime == "python" else None

    def prepare(self, engine_bytes: bytes) -> Any:
        """Make another engine."""
        self._stored.flush()
        old = self.engine
        with raised_as(EngineError, f"torch_tensorrt refuses the engine for {self.name!r}"):
            new = _remade(old, info_of(old, self.name).holding(engine_bytes))
            _carry_over(old, new)
        return new

    def present(self) -> Any:
        """What is in place."""
        self._stored.flush()
        return self.engine

    def put(self, engine: Any) -> None:
        """Put an engine in place, wherever it is kept."""
        with self._stored.replaced():
            for place in self._places:
                place.of[place.key] = engine

    def drop_captured(self) -> None:
        """Drop captured CUDA graphs."""
        _drop_captured(self.engine)


def _twin(child: Any, **other: Any) -> Any:
    """A second child with the same attributes, but for these."""
    twin = object.__new__(type(child))
    vars(twin).update({**vars(child), **other})
    return twin


def _held(child: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: vars(child)[name] for name in names if name in vars(child)}


def _set_up(child: Any, name: str) -> None:
    if not upstream.has_gpu():
        raise UnsupportedTargetError(
            f"The engine {name!r} is not set up, and that needs a GPU.",
            hint="Without a GPU, plan and build with backend='tensorrt_network'.",
        )
    with raised_as(EngineError, f"torch_tensorrt cannot set up the engine {name!r}"):
        child.setup_engine()


def _remade(engine: Any, info: EngineInfo) -> Any:
    if is_python_engine(engine):
        return type(engine)(info.packed())
    return torch.classes.tensorrt.Engine(info.packed())


def _carry_over(old: Any, new: Any) -> None:
    """Give a new engine what users set on the old one and its bytes do not tell."""
    for name in _CARRIED:
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    new.set_output_tensors_as_unowned(old.are_output_tensors_unowned())


def _store_in_engine(engine: Any, engine_bytes: bytes) -> None:
    engine.serialized_info[ENGINE] = engine_bytes
    engine.serialized_engine = engine_bytes


def _drop_captured(holder: Any) -> None:
    """Drop a captured graph, and have the next call capture again.

    The Python runtimes capture only when something changed, and replay what is not there otherwise
    (``TorchTRTRuntimeStates`` in ``_PythonTorchTensorRTModule.py`` of 2.11, ``_TRTEngine.py`` of
    2.14).
    """
    reset = getattr(holder, "reset_captured_graph", None)
    (reset or holder._reset_captured_graph)()  # noqa: SLF001 - the name that 2.11 has for it
    with suppress(AttributeError):
        holder.runtime_states.context_changed = True


def _call_all(functions: Iterable[Callable[[], None]]) -> None:
    for function in functions:
        function()


# MERGED handles: What a TensorRT engine inside somebody's module offers, whichever runtime holds
# it.

Runtime = Literal["python", "cpp"]


@dataclass(frozen=True)
class Binding:
    """One input or output of an engine.

    Attributes:
        name: Its name.
        dtype: torch's name without the ``torch.``.
        shape: Sizes; -1 where they are dynamic.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


class EngineHandle(Protocol):
    """One TensorRT engine in a target.

    The Python runtime holds a live ``ICudaEngine``, which a refitter changes in place. The C++
    runtime keeps its engine to itself: it is refitted by way of its bytes.
    """

    @property
    def name(self) -> str:
        """Name of the child that it is, such as ``_run_on_acc_0``."""

    @property
    def runtime(self) -> Runtime:
        """Which runtime holds it."""

    @property
    def settings(self) -> Any:
        """Its ``torch_tensorrt.dynamo.CompilationSettings``."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of its inputs, in the order of its call."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of its outputs, in order."""

    @property
    def weight_name_map(self) -> Any:
        """The cached map of torch-tensorrt 2.11 and 2.12; None where there is none."""

    def engine_bytes(self) -> bytes:
        """The engine as it is stored in the target. Flushes what ``on_stale`` left pending."""

    def cuda_engine(self) -> Any:
        """The live ``ICudaEngine``; None where the C++ runtime holds it."""

    def prepare(self, engine_bytes: bytes) -> Any:
        """Make another engine, which takes long, and put it nowhere yet.

        Raises:
            EngineError: The runtime refuses the bytes.
        """

    def present(self) -> Any:
        """What is in place, live and stored, to be put back later."""

    def put(self, engine: Any) -> None:
        """Put what ``prepare`` or ``present`` gave in place, live and stored. Fast.

        What was stale about the engine that goes is forgotten.
        """

    def replace(self, engine_bytes: bytes) -> None:
        """Put another engine in its place: ``prepare`` and ``put`` in one.

        Raises:
            EngineError: The runtime refuses the bytes; the old engine is still in place.
        """

    def on_stale(self, flush: Callable[[], bytes] | None) -> None:
        """Note that the live engine was refitted in place, so that the stored bytes are stale.

        Args:
            flush: Serializes the live engine. Called, once, before anybody reads the stored bytes:
                ``engine_bytes``, a deepcopy, a pickle, a save. None: they are right as they are.
        """

    def drop_captured(self) -> None:
        """Drop CUDA graphs that were captured with the old weights."""


# MERGED engine_info: The list in which Torch-TensorRT packs an engine and what is known of it.
#
# The order of its fields is the same in 2.11 to 2.14, which only add to its end:
# ``core/runtime/runtime.h`` and ``torch_tensorrt/dynamo/runtime/_serialized_engine_layout.py``.

NAME, ENGINE, INPUTS, OUTPUTS, METADATA = 1, 3, 4, 5, 7
_LEAST = 11
_MOST = 32
_DELIMITER = "%"
_CPP_ENGINE = "__torch__.torch.classes.tensorrt.Engine"
_RUNTIME = "torch_tensorrt.dynamo.runtime."


@dataclass(frozen=True)
class EngineInfo:
    """A packed engine.

    Attributes:
        fields: Text, in upstream's order; the engine's field is empty.
        engine_bytes: The engine.
    """

    fields: tuple[str, ...]
    engine_bytes: bytes

    @property
    def metadata(self) -> str:
        """Its metadata, encoded."""
        return self.fields[METADATA]

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of its inputs, in order."""
        return _names(self.fields[INPUTS])

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of its outputs, in order."""
        return _names(self.fields[OUTPUTS])

    def holding(self, engine_bytes: bytes) -> EngineInfo:
        """The same, with another engine."""
        return replace(self, engine_bytes=engine_bytes)

    def packed(self) -> list[str | bytes]:
        """As upstream's engine classes take it."""
        fields: list[str | bytes] = list(self.fields)
        fields[ENGINE] = self.engine_bytes
        return fields


def parse_info(fields: Sequence[Any], name: str) -> EngineInfo:
    """Read what an engine packs itself into.

    Args:
        fields: As upstream has them; the engine as bytes, or as text in base64.
        name: Name of the engine, for messages.

    Raises:
        UnsupportedTargetError: They are not what upstream packs.
    """
    if not _LEAST <= len(fields) <= _MOST:
        raise _broken(name, f"it has {len(fields)} fields")
    texts = [_text(one, name) for position, one in enumerate(fields) if position != ENGINE]
    texts.insert(ENGINE, "")
    return EngineInfo(tuple(texts), _engine(fields[ENGINE], name))


def _text(field: Any, name: str) -> str:
    if isinstance(field, bytes):
        field = field.decode("utf-8", errors="replace")
    if not isinstance(field, str):
        raise _broken(name, f"it has a field of type {type(field).__name__}")
    return field


def _engine(field: Any, name: str) -> bytes:
    if isinstance(field, (bytes, bytearray)):
        return bytes(field)
    try:
        return base64.b64decode(field, validate=True)
    except (binascii.Error, ValueError, TypeError) as exc:
        raise _broken(name, f"the engine is no base64: {exc}") from exc


def _broken(name: str, why: str) -> UnsupportedTargetError:
    return UnsupportedTargetError(f"What the engine {name!r} is packed into is damaged: {why}.")


def _names(joined: str) -> tuple[str, ...]:
    return tuple(joined.split(_DELIMITER)) if joined else ()


def is_runtime_instance(value: object, name: str) -> bool:
    """Whether an object is of a class of this name of upstream's runtime, or of one below it."""
    classes = type(value).__mro__
    return any(one.__name__ == name and one.__module__.startswith(_RUNTIME) for one in classes)


def is_python_engine(value: object) -> bool:
    """Whether an object is an engine of the Python runtime of 2.13 and 2.14."""
    return is_runtime_instance(value, "TRTEngine")


def is_cpp_engine(value: object) -> bool:
    """Whether an object is an engine of the C++ runtime."""
    kind = getattr(value, "_type", None)
    if kind is None or isinstance(value, type):
        return False
    try:
        return bool(kind().qualified_name() == _CPP_ENGINE)
    except Exception:  # noqa: BLE001 - it may be anybody's object
        return False


def is_packed_engine(value: object) -> bool:
    """Whether an object is what ``torch_tensorrt.save`` puts in an engine's place."""
    return is_runtime_instance(value, "EngineSerializer")


def is_engine(value: object) -> bool:
    """Whether an object is an engine that can run."""
    return is_python_engine(value) or is_cpp_engine(value)


def info_of(engine: Any, name: str) -> EngineInfo:
    """What an engine packs itself into.

    Raises:
        UnsupportedTargetError: It is not what upstream packs.
    """
    if is_python_engine(engine):
        return parse_info(list(engine.serialized_info), name)
    return parse_info(engine.__getstate__()[0], name)
