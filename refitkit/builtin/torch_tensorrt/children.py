"""The engines in a target, each behind an :class:`EngineHandle`.

This module hides which object stores an engine and which runtime runs it. There are three kinds
of handles:

* :class:`ModuleEngine`: upstream's ``TorchTensorRTModule`` (2.11 to 2.14, either runtime);
* :class:`PythonModuleEngine`: upstream's ``PythonTorchTensorRTModule`` (2.11 and 2.12);
* :class:`AttributeEngine`: a plain attribute, where an exported or retraced program keeps engines.

Read :class:`EngineHandle` first: it describes the methods that all handles share. Packed engines
(:class:`EngineInfo`) are at the end.
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
from refitkit.builtin.torch_tensorrt.stale import StoredBytes, watch_child, watch_engine
from refitkit.errors import EngineError, UnsupportedTargetError, raised_as

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, MutableMapping, Sequence


Runtime = Literal["python", "cpp"]


class EngineHandle(Protocol):
    """One TensorRT engine in a target.

    The Python runtime holds a live ``ICudaEngine``, which a refitter changes in place. The C++
    runtime does not expose its engine, so a refit goes through the engine bytes.
    """

    @property
    def name(self) -> str:
        """Name of the engine's child module, for example ``_run_on_acc_0``."""

    @property
    def runtime(self) -> Runtime:
        """The runtime that holds the engine."""

    @property
    def settings(self) -> Any:
        """The engine's ``torch_tensorrt.dynamo.CompilationSettings``."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the engine's inputs, in the order of its call."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the engine's outputs, in order."""

    @property
    def weight_name_map(self) -> Any:
        """The map that torch-tensorrt 2.11 and 2.12 cache; None if there is none."""

    def engine_bytes(self) -> bytes:
        """The engine bytes that the target stores, flushed first if they are stale."""

    def cuda_engine(self) -> Any:
        """The live ``ICudaEngine``; None in the C++ runtime."""

    def prepare(self, engine_bytes: bytes) -> Any:
        """Create another engine without installing it. This takes long.

        Raises:
            EngineError: The runtime refuses the bytes.
        """

    def cuda_engine_of(self, engine: Any) -> Any:
        """The ``ICudaEngine`` of a result of ``prepare``; None if the runtime shows none."""

    def present(self) -> Any:
        """The installed engine, live and stored, so that ``put`` can restore it later."""

    def put(self, engine: Any) -> None:
        """Install a result of ``prepare`` or ``present``, live and stored. This is fast.

        It also clears the stale mark of the engine that is replaced.
        """

    def replace(self, engine_bytes: bytes) -> None:
        """Create and install another engine: ``prepare``, then ``put``.

        Raises:
            EngineError: The runtime refuses the bytes; the old engine is still installed.
        """

    def on_stale(self, flush: Callable[[], bytes] | None) -> None:
        """Mark the stored bytes as stale, because the live engine was refitted in place.

        Args:
            flush: Serializes the live engine. It is called once, before the next read of the
                stored bytes, for example by ``engine_bytes``, a deepcopy or a pickle. None clears
                the mark.
        """

    def drop_captured(self) -> None:
        """Drop CUDA graphs that were captured with the old weights."""


# -- the three kinds of handles ------------------------------------------------------------------

_RUNTIME_FLAGS = ("use_pre_allocated_outputs", "use_output_allocator_outputs")
"""Flags that users set on a live engine and that upstream does not store with it."""


class _StoredEngine:
    """Common base of the handles: an engine whose stored bytes may be stale."""

    _stored: StoredBytes

    def prepare(self, engine_bytes: bytes) -> Any:
        """Create another engine; see :meth:`EngineHandle.prepare`."""
        raise NotImplementedError

    def cuda_engine_of(self, engine: Any) -> Any:
        """The ``ICudaEngine`` of a result of ``prepare``; see :class:`EngineHandle`."""
        holder = engine.get("engine") if isinstance(engine, dict) else engine
        return getattr(holder, "cuda_engine", None if is_cpp_engine(holder) else holder)

    def put(self, engine: Any) -> None:
        """Install an engine; see :meth:`EngineHandle.put`."""
        raise NotImplementedError

    def replace(self, engine_bytes: bytes) -> None:
        """Create another engine and install it; see :meth:`EngineHandle.replace`."""
        with self._stored.replaced():
            self.put(self.prepare(engine_bytes))

    def on_stale(self, flush: Callable[[], bytes] | None) -> None:
        """Mark the stored bytes as stale; see :meth:`EngineHandle.on_stale`."""
        self._stored.clear() if flush is None else self._stored.mark(flush)


class _ChildEngine(_StoredEngine):
    """The engine of one of upstream's child modules."""

    name: str
    child: Any
    _engine_attributes: tuple[str, ...]
    """Attributes of the child that are replaced together with the engine."""

    @property
    def settings(self) -> Any:
        """The ``CompilationSettings`` of the engine."""
        return self.child.settings

    def set_up(self) -> None:
        """Have upstream deserialize the engine, if it has not done so yet.

        Raises:
            UnsupportedTargetError: There is no GPU.
            EngineError: torch_tensorrt cannot set up the engine.
        """
        if self.child.engine is None:
            _set_up(self.child, self.name)

    def engine_bytes(self) -> bytes:
        """The stored engine bytes, flushed first if they are stale."""
        self._stored.flush()
        return bytes(self.child.serialized_engine)

    def present(self) -> dict[str, Any]:
        """The installed engine; see :meth:`EngineHandle.present`."""
        # ``put`` clears pending flushes, so what it restores later has to be complete now
        self._stored.flush()
        return _attributes_of(self.child, self._engine_attributes)


class ModuleEngine(_ChildEngine):
    """The engine of a ``TorchTensorRTModule``; see :class:`EngineHandle`."""

    _engine_attributes = ("serialized_engine", "engine")

    def __init__(self, name: str, child: Any) -> None:
        """Create a handle.

        Args:
            name: Name of the engine.
            child: A ``TorchTensorRTModule`` that stores engine bytes.
        """
        self.name = name
        self.child = child
        self._stored = StoredBytes(self._store, self._watch)

    @property
    def runtime(self) -> Runtime:
        """The runtime that holds the engine, or will hold it after setup."""
        if self.child.engine is not None:
            return "python" if is_python_engine(self.child.engine) else "cpp"
        # not set up yet: upstream chooses the runtime by this flag
        features = upstream.torch_tensorrt().ENABLED_FEATURES
        return "cpp" if features.torch_tensorrt_runtime else "python"

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the engine's inputs, in order."""
        return tuple(self.child.input_binding_names)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the engine's outputs, in order."""
        return tuple(self.child.output_binding_names)

    @property
    def weight_name_map(self) -> Any:
        """The weight name map that 2.11 and 2.12 cache; None if there is none."""
        return getattr(self.child, "weight_name_map", None)

    def cuda_engine(self) -> Any:
        """The live ``ICudaEngine``; None in the C++ runtime.

        The first call sets up the engine; see :meth:`set_up` for the errors.
        """
        if self.runtime == "cpp":
            return None
        self.set_up()
        return self.child.engine.cuda_engine

    def prepare(self, engine_bytes: bytes) -> dict[str, Any]:
        """Create another engine; see :meth:`EngineHandle.prepare`.

        Before setup this only stores the bytes, as upstream does.
        """
        # a stale child has a temporary class (``stale.watch_child``), which _twin would copy
        self._stored.flush()
        engine = self.child.engine
        if engine is None:
            return {"serialized_engine": engine_bytes}
        with raised_as(EngineError, f"torch_tensorrt refuses the engine for {self.name!r}"):
            # upstream sets up an engine only inside a child, so a second child lends its method
            twin = _twin(self.child, serialized_engine=engine_bytes, engine=None)
            twin.setup_engine()
            _copy_runtime_flags(engine, twin.engine)
        return _attributes_of(twin, self._engine_attributes)

    def put(self, engine: dict[str, Any]) -> None:
        """Install an engine; see :meth:`EngineHandle.put`."""
        with self._stored.replaced():
            vars(self.child).update(engine)

    def part_from(self, other: ModuleEngine) -> None:
        """Give this handle its own engine object, if it shares the object of ``other``.

        Args:
            other: Handle of the module that this handle's module was copied from.

        Raises:
            EngineError: torch_tensorrt refuses the bytes.
        """
        if self.child.engine is not None and self.child.engine is other.child.engine:
            self.replace(other.engine_bytes())

    def drop_captured(self) -> None:
        """Drop captured CUDA graphs."""
        if self.child.engine is not None:
            _drop_captured_graph(self.child.engine)

    def _store(self, engine_bytes: bytes) -> None:
        self.child.serialized_engine = engine_bytes
        if is_python_engine(self.child.engine):
            _store_in_engine(self.child.engine, engine_bytes)

    def _watch(self, stored: StoredBytes) -> Callable[[], None]:
        # the engine object has a copy of the bytes, which readers can reach without the child
        ends = [watch_child(self.child, stored)]
        if is_python_engine(self.child.engine):
            ends.append(watch_engine(self.child.engine, stored))
        return lambda: _call_all(ends)


class PythonModuleEngine(_ChildEngine):
    """The engine of a ``PythonTorchTensorRTModule``; see :class:`EngineHandle`."""

    _engine_attributes = ("serialized_engine", "engine", "context")
    runtime: Runtime = "python"

    def __init__(self, name: str, child: Any) -> None:
        """Create a handle.

        Args:
            name: Name of the engine.
            child: A ``PythonTorchTensorRTModule`` that stores engine bytes.
        """
        self.name = name
        self.child = child
        self._stored = StoredBytes(self._store, lambda stored: watch_child(child, stored))

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the engine's inputs, in order."""
        return tuple(self.child.input_names)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the engine's outputs, in order."""
        return tuple(self.child.output_names)

    @property
    def weight_name_map(self) -> Any:
        """The weight name map that 2.11 and 2.12 cache."""
        return self.child.weight_name_map

    def cuda_engine(self) -> Any:
        """The live ``ICudaEngine``.

        The first call sets up the engine; see :meth:`set_up` for the errors.
        """
        self.set_up()
        return self.child.engine

    def prepare(self, engine_bytes: bytes) -> dict[str, Any]:
        """Create another engine; see :meth:`EngineHandle.prepare`.

        Before setup this only stores the bytes, as upstream does.
        """
        self._stored.flush()
        if self.child.engine is None:
            return {"serialized_engine": engine_bytes}
        with raised_as(EngineError, f"torch_tensorrt refuses the engine for {self.name!r}"):
            twin = _twin(self.child, serialized_engine=engine_bytes)
            twin.setup_engine()
        return _attributes_of(twin, self._engine_attributes)

    def put(self, engine: dict[str, Any]) -> None:
        """Install an engine and drop captured CUDA graphs; see :meth:`EngineHandle.put`."""
        with self._stored.replaced():
            vars(self.child).update(engine)
            # this runtime keeps captured graphs in the child, where they outlive the engine
            if self.child.engine is not None:
                self.drop_captured()

    def drop_captured(self) -> None:
        """Drop captured CUDA graphs."""
        _drop_captured_graph(self.child)

    def _store(self, engine_bytes: bytes) -> None:
        self.child.serialized_engine = engine_bytes


@dataclass(frozen=True)
class EngineLocation:
    """A reference to an engine in an object or a mapping.

    Attributes:
        namespace: ``__dict__`` of an object, or a mapping, that contains the engine.
        key: Key of the engine in ``namespace``.
    """

    namespace: MutableMapping[str, Any]
    key: str


class AttributeEngine(_StoredEngine):
    """An engine in a plain attribute, without a child module; see :class:`EngineHandle`."""

    def __init__(self, name: str, locations: Iterable[EngineLocation]) -> None:
        """Read the engine's metadata.

        Args:
            name: Name of the engine.
            locations: All references to the engine; at least one.

        Raises:
            NotRefittableError: The engine has no metadata.
            UnsupportedTargetError: The engine or its metadata is damaged or refused.
        """
        self.name = name
        self._locations = tuple(locations)
        info = info_of(self.engine, name)
        metadata = read_metadata(info.metadata, name)
        self.settings = settings_from(metadata.settings, name)
        self.weight_name_map = metadata.weight_name_map
        self.input_names = info.input_names
        self.output_names = info.output_names
        self._stored = StoredBytes(
            lambda engine_bytes: _store_in_engine(self.engine, engine_bytes),
            lambda stored: watch_engine(self.engine, stored),
        )

    @property
    def engine(self) -> Any:
        """Upstream's engine object."""
        return self._locations[0].namespace[self._locations[0].key]

    @property
    def runtime(self) -> Runtime:
        """The runtime that holds the engine."""
        return "python" if is_python_engine(self.engine) else "cpp"

    def set_up(self) -> None:
        """Do nothing: an engine without a child is always set up."""

    def engine_bytes(self) -> bytes:
        """The stored engine bytes, flushed first if they are stale."""
        self._stored.flush()
        return info_of(self.engine, self.name).engine_bytes

    def cuda_engine(self) -> Any:
        """The live ``ICudaEngine``; None in the C++ runtime."""
        return self.engine.cuda_engine if self.runtime == "python" else None

    def prepare(self, engine_bytes: bytes) -> Any:
        """Create another engine; see :meth:`EngineHandle.prepare`."""
        self._stored.flush()
        old = self.engine
        with raised_as(EngineError, f"torch_tensorrt refuses the engine for {self.name!r}"):
            new = _recreated(old, info_of(old, self.name).with_engine(engine_bytes))
            _copy_runtime_flags(old, new)
        return new

    def present(self) -> Any:
        """The installed engine; see :meth:`EngineHandle.present`."""
        self._stored.flush()
        return self.engine

    def put(self, engine: Any) -> None:
        """Install an engine in all locations; see :meth:`EngineHandle.put`."""
        with self._stored.replaced():
            # the module and its program refer to one engine, and both must get the new one
            for location in self._locations:
                location.namespace[location.key] = engine

    def drop_captured(self) -> None:
        """Drop captured CUDA graphs."""
        _drop_captured_graph(self.engine)


def _twin(child: Any, **other: Any) -> Any:
    """A second child with the same attributes, except those in ``other``."""
    # a copy or a constructor call would deserialize the old engine again
    twin = object.__new__(type(child))
    vars(twin).update({**vars(child), **other})
    return twin


def _attributes_of(child: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: vars(child)[name] for name in names if name in vars(child)}


def _set_up(child: Any, name: str) -> None:
    if not upstream.has_gpu():
        raise UnsupportedTargetError(
            f"The engine {name!r} is not set up yet, and setup needs a GPU.",
            hint="Without a GPU, plan and build with backend='tensorrt_network'.",
        )
    with raised_as(EngineError, f"torch_tensorrt cannot set up the engine {name!r}"):
        child.setup_engine()


def _recreated(engine: Any, info: EngineInfo) -> Any:
    if is_python_engine(engine):
        return type(engine)(info.packed())
    return torch.classes.tensorrt.Engine(info.packed())


def _copy_runtime_flags(old: Any, new: Any) -> None:
    """Copy the flags that users set on an engine: its bytes do not contain them."""
    for name in _RUNTIME_FLAGS:  # the versions differ in the flags that they have
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    new.set_output_tensors_as_unowned(old.are_output_tensors_unowned())


def _store_in_engine(engine: Any, engine_bytes: bytes) -> None:
    # ``TRTEngine`` pickles the list, and sets itself up from the attribute
    engine.serialized_info[ENGINE] = engine_bytes
    engine.serialized_engine = engine_bytes


def _drop_captured_graph(holder: Any) -> None:
    """Drop a captured graph, and make the next call capture again.

    The Python runtimes capture only if something changed. Otherwise they replay the graph, which
    no longer exists (``TorchTRTRuntimeStates`` in ``_PythonTorchTensorRTModule.py`` of 2.11,
    ``_TRTEngine.py`` of 2.14).
    """
    if getattr(holder, "cudagraph", None) is not None and torch.cuda.is_available():
        # a call may still replay it; the current stream waits for all calls
        torch.cuda.current_stream().synchronize()
    reset = getattr(holder, "reset_captured_graph", None)
    (reset or holder._reset_captured_graph)()  # noqa: SLF001 - its name in 2.11
    # only the Python runtimes have such states
    with suppress(AttributeError):
        holder.runtime_states.context_changed = True


def _call_all(functions: Iterable[Callable[[], None]]) -> None:
    for function in functions:
        function()


# -- packed engines -------------------------------------------------------------------------------

# Positions in the packed list. Versions 2.11 to 2.14 keep this order and only append fields
# (``core/runtime/runtime.h``, ``torch_tensorrt/dynamo/runtime/_serialized_engine_layout.py``).

NAME, ENGINE, INPUTS, OUTPUTS, METADATA = 1, 3, 4, 5, 7
# The upper limit leaves room for versions that append fields.
_MIN_FIELDS = 11
_MAX_FIELDS = 32
_DELIMITER = "%"
_CPP_ENGINE = "__torch__.torch.classes.tensorrt.Engine"
_RUNTIME = "torch_tensorrt.dynamo.runtime."


@dataclass(frozen=True)
class EngineInfo:
    """A packed engine.

    Attributes:
        fields: The packed fields as text, in upstream's order; the engine's own field is empty.
        engine_bytes: The serialized engine.
    """

    fields: tuple[str, ...]
    engine_bytes: bytes

    @property
    def metadata(self) -> str:
        """The engine's metadata, encoded; see ``metadata.read_metadata``."""
        return self.fields[METADATA]

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the engine's inputs, in order."""
        return _names(self.fields[INPUTS])

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the engine's outputs, in order."""
        return _names(self.fields[OUTPUTS])

    def with_engine(self, engine_bytes: bytes) -> EngineInfo:
        """A copy with other engine bytes."""
        return replace(self, engine_bytes=engine_bytes)

    def packed(self) -> list[str | bytes]:
        """The list of fields that upstream's engine classes accept."""
        fields: list[str | bytes] = list(self.fields)
        fields[ENGINE] = self.engine_bytes
        return fields


def parse_info(fields: Sequence[Any], name: str) -> EngineInfo:
    """Parse the fields of a packed engine.

    Args:
        fields: Fields as upstream packs them; the engine is bytes, or text in base64.
        name: Name of the engine, for error messages.

    Raises:
        UnsupportedTargetError: Upstream does not pack such fields.
    """
    if not _MIN_FIELDS <= len(fields) <= _MAX_FIELDS:
        raise _malformed(name, f"it has {len(fields)} fields")
    # the engine is binary data of many megabytes, so it is not decoded as text
    texts = [_text(one, name) for position, one in enumerate(fields) if position != ENGINE]
    texts.insert(ENGINE, "")
    return EngineInfo(tuple(texts), _engine(fields[ENGINE], name))


def _text(field: Any, name: str) -> str:
    if isinstance(field, bytes):
        field = field.decode("utf-8", errors="replace")
    if not isinstance(field, str):
        raise _malformed(name, f"a field has the type {type(field).__name__}")
    return field


def _engine(field: Any, name: str) -> bytes:
    if isinstance(field, (bytes, bytearray)):
        return bytes(field)
    try:
        return base64.b64decode(field, validate=True)
    except (binascii.Error, ValueError, TypeError) as exc:
        raise _malformed(name, f"the engine is not valid base64: {exc}") from exc


def _malformed(name: str, why: str) -> UnsupportedTargetError:
    return UnsupportedTargetError(f"The packed engine {name!r} is damaged: {why}.")


def _names(joined: str) -> tuple[str, ...]:
    return tuple(joined.split(_DELIMITER)) if joined else ()


def is_runtime_instance(value: object, name: str) -> bool:
    """Whether the object's class or a base class is the named class of upstream's runtime."""
    # compares names, so that nothing has to import torch_tensorrt
    classes = type(value).__mro__
    return any(one.__name__ == name and one.__module__.startswith(_RUNTIME) for one in classes)


def is_python_engine(value: object) -> bool:
    """Whether the object is an engine of the Python runtime of 2.13 and 2.14."""
    return is_runtime_instance(value, "TRTEngine")


def is_cpp_engine(value: object) -> bool:
    """Whether the object is an engine of the C++ runtime."""
    # torch.ScriptObject has no Python class of its own; its type names the C++ class
    kind = getattr(value, "_type", None)
    if kind is None or isinstance(value, type):
        return False
    try:
        return bool(kind().qualified_name() == _CPP_ENGINE)
    except Exception:  # noqa: BLE001 - the object may raise anything
        return False


def is_packed_engine(value: object) -> bool:
    """Whether the object is the placeholder that ``torch_tensorrt.save`` writes for an engine."""
    return is_runtime_instance(value, "EngineSerializer")


def is_engine(value: object) -> bool:
    """Whether the object is an engine that can run."""
    return is_python_engine(value) or is_cpp_engine(value)


def info_of(engine: Any, name: str) -> EngineInfo:
    """The packed fields of an engine object.

    Raises:
        UnsupportedTargetError: Upstream does not pack such fields.
    """
    if is_python_engine(engine):
        return parse_info(list(engine.serialized_info), name)
    # the C++ class shows its fields only in the state that it pickles
    return parse_info(engine.__getstate__()[0], name)
