"""The metadata that Torch-TensorRT keeps in an engine: a pickle in base64, read without unpickling.

Upstream unpickles it as it is, on loading (``torch_tensorrt/dynamo/runtime/_TRTEngine.py``) and
whenever an engine is traced (``meta_ops/register_meta_ops.py``). So what is admitted here is
admitted for upstream too: calls of the listed classes, with arguments that are data. Strings in
symbolic shapes are refused, because ``sympy`` evaluates them.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from refitkit.errors import NotRefittableError, UnsupportedTargetError
from refitkit.files.plain_pickle import (
    Global,
    Instance,
    PickleRefusedError,
    read_pickle,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_LIMIT = 1 << 26
_SETTINGS = ("torch_tensorrt.dynamo._settings", "CompilationSettings")
_DEVICE = ("torch_tensorrt._Device", "Device")
_ENUMS = frozenset(
    ("torch_tensorrt._enums", name)
    for name in ("EngineCapability", "DeviceType", "dtype", "Platform")
)
_DTYPES = frozenset(
    ("torch", name)
    for name in (
        *("float32", "float64", "float16", "bfloat16", "bool", "complex32", "complex64"),
        *("complex128", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    )
)
_SYMBOL = ("sympy.core.symbol", "Symbol")
_NUMBERS = frozenset(
    ("sympy.core.numbers", name)
    for name in ("Integer", "Rational", "One", "NegativeOne", "Zero", "Half")
)
_FUNCTIONS = frozenset(
    {
        ("sympy.core.add", "Add"),
        ("sympy.core.mul", "Mul"),
        ("sympy.core.power", "Pow"),
        *(
            ("torch.utils._sympy.functions", name)
            for name in (
                *("FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv", "FloatTrueDiv", "Mod"),
                *("PythonMod", "ModularIndexing", "Max", "Min", "CeilToInt", "FloorToInt"),
                *("TruncToInt", "RoundToInt", "ToFloat", "PowByNatural", "Identity"),
            )
        ),
    }
)
ALLOWED_GLOBALS = (
    frozenset({_SETTINGS, _DEVICE, _SYMBOL}) | _ENUMS | _DTYPES | _NUMBERS | _FUNCTIONS
)
"""All that metadata of Torch-TensorRT 2.11 to 2.14 names."""

_RECOMPILE = "Recompile the model with Torch-TensorRT 2.11 or later and immutable_weights=False."


@dataclass(frozen=True)
class EnumValue:
    """A member of one of upstream's enumerations.

    Attributes:
        enum: Name of the class in ``torch_tensorrt``.
        value: The member's value.
    """

    enum: str
    value: int


@dataclass(frozen=True)
class DeviceValue:
    """What upstream's ``Device`` holds: numbers, and flags."""

    fields: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Metadata:
    """What an engine tells of its compilation, as plain data.

    Attributes:
        settings: Fields of its compilation settings, by name: scalars, containers of scalars,
            :class:`EnumValue`, :class:`DeviceValue`, and names of dtypes (``torch.float16``).
        symbolic_shapes: Symbolic shapes of inputs and outputs, expressions as text; may be None.
        outputs_unowned: Whether outputs are made anew for every call.
        weight_name_map: The cached map of torch-tensorrt 2.11 and 2.12; None where there is none.
    """

    settings: Mapping[str, Any]
    symbolic_shapes: Any = None
    outputs_unowned: bool = False
    weight_name_map: Mapping[str, Any] | None = field(default=None)


def read_metadata(encoded: str | bytes, engine: str) -> Metadata:
    """Read the metadata of an engine. Nothing that it names is imported or called.

    Args:
        encoded: As the engine holds it.
        engine: Name of the engine, for messages.

    Raises:
        NotRefittableError: There is none.
        UnsupportedTargetError: It is damaged, hostile, or of a version that is not known.
    """
    if not encoded:
        raise NotRefittableError(
            f"The engine {engine!r} has no metadata: nobody knows how it was compiled.",
            hint=_RECOMPILE,
        )
    try:
        return _parsed(read_pickle(_decoded(encoded), ALLOWED_GLOBALS))
    except PickleRefusedError as exc:
        raise UnsupportedTargetError(
            f"The metadata of the engine {engine!r} is refused: {exc}.",
            hint="Nothing of it was run. Do not load this model with torch_tensorrt either, unless "
            "you trust whoever made it.",
        ) from exc


def _decoded(encoded: str | bytes) -> bytes:
    if not isinstance(encoded, (str, bytes)):
        raise PickleRefusedError(f"it is of type {type(encoded).__name__}")
    if len(encoded) > _LIMIT:
        raise PickleRefusedError(f"it has {len(encoded)} bytes, at most {_LIMIT} are read")
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise PickleRefusedError(f"it is no base64: {exc}") from exc


def _parsed(value: Any) -> Metadata:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise PickleRefusedError("it is no mapping by name")
    settings = value.get("settings")
    if not isinstance(settings, Instance) or _key(settings.of) != _SETTINGS:
        raise PickleRefusedError("it has no compilation settings")
    unowned = value.get("output_tensors_are_unowned", False)
    if not isinstance(unowned, bool):
        raise PickleRefusedError("output_tensors_are_unowned is no bool")
    names = value.get("weight_name_map")
    if names is not None and not isinstance(names, dict):
        raise PickleRefusedError("weight_name_map is no mapping")
    others = value.keys() - {"settings", "inout_symexprs", "weight_name_map"}
    for name in others:
        _plain(value[name])
    return Metadata(
        settings=_fields(settings),
        symbolic_shapes=_plain(value.get("inout_symexprs")),
        outputs_unowned=unowned,
        weight_name_map=_plain(names),
    )


def _fields(instance: Instance) -> dict[str, Any]:
    """The state of an object whose class has no say in how it is made."""
    state = instance.state
    if instance.args or instance.kwargs or not isinstance(state, dict):
        raise PickleRefusedError(f"{instance.of} is made in a way that is not upstream's")
    if not all(isinstance(name, str) for name in state):
        raise PickleRefusedError(f"{instance.of} has fields without names")
    return {name: _plain(value) for name, value in state.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Global):
        return _dtype(value)
    if isinstance(value, Instance):
        return _made(value)
    if isinstance(value, dict):
        return {_plain_key(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset)):
        return frozenset(_plain_key(one) for one in value)
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(one) for one in value)
    return value


def _plain_key(value: Any) -> Any:
    """As ``_plain``, of something that has to be hashed."""
    plain = _plain(value)
    if isinstance(plain, DeviceValue):
        raise PickleRefusedError("it has a device for a key")
    return plain


def _dtype(value: Global) -> str:
    if _key(value) not in _DTYPES:
        raise PickleRefusedError(f"it holds {value} where a value should be")
    return str(value)


def _made(value: Instance) -> Any:
    key = _key(value.of)
    if key in _ENUMS:
        return _enum(value)
    if key == _DEVICE:
        return DeviceValue(tuple(sorted(_fields(value).items())))
    if key == _SETTINGS or key in _DTYPES:
        raise PickleRefusedError(f"it has {value.of} where that cannot be")
    return _expression(value)


def _enum(value: Instance) -> EnumValue:
    if value.kwargs or value.state or len(value.args) != 1 or type(value.args[0]) is not int:
        raise PickleRefusedError(f"{value.of} is made in a way that is not upstream's")
    return EnumValue(value.of.name, value.args[0])


def _expression(value: Any) -> str:
    """A symbolic size as text. Only a symbol's name may be a string: sympy evaluates others."""
    if type(value) is int:
        return str(value)
    if not isinstance(value, Instance) or value.state:
        raise PickleRefusedError("a symbolic shape holds what is no expression")
    key = _key(value.of)
    if key == _SYMBOL:
        return _symbol(value)
    if value.kwargs or key not in _NUMBERS | _FUNCTIONS:
        raise PickleRefusedError(f"{value.of} is no part of a symbolic shape")
    return f"{value.of.name}({', '.join(_expressions(value.args))})"


def _expressions(values: Iterable[Any]) -> list[str]:
    return [_expression(value) for value in values]


def _symbol(value: Instance) -> str:
    named = len(value.args) == 1 and isinstance(value.args[0], str)
    flags = all(isinstance(key, str) for key in value.kwargs)
    if not named or not flags or not all(isinstance(f, bool) for f in value.kwargs.values()):
        raise PickleRefusedError("a symbol is made in a way that is not sympy's")
    return str(value.args[0])


def _key(of: Global) -> tuple[str, str]:
    return (of.module, of.name)
