"""The list in which Torch-TensorRT packs an engine and what is known of it.

The order of its fields is the same in 2.11 to 2.14, which only add to its end:
``core/runtime/runtime.h`` and ``torch_tensorrt/dynamo/runtime/_serialized_engine_layout.py``.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from refitkit.errors import UnsupportedTargetError

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def is_upstreams(value: object, name: str) -> bool:
    """Whether an object is of a class of this name of upstream's runtime, or of one below it."""
    classes = type(value).__mro__
    return any(one.__name__ == name and one.__module__.startswith(_RUNTIME) for one in classes)


def is_python_engine(value: object) -> bool:
    """Whether an object is an engine of the Python runtime of 2.13 and 2.14."""
    return is_upstreams(value, "TRTEngine")


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
    return is_upstreams(value, "EngineSerializer")


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
