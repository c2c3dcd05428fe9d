"""Reads the metadata of an engine, a pickle in base64, without unpickling it.

Upstream unpickles the metadata without restrictions, when it loads an engine
(``torch_tensorrt/dynamo/runtime/_TRTEngine.py``) and when it traces one
(``meta_ops/register_meta_ops.py``). This module therefore decides for upstream too what is safe. It
allows calls of the classes in ``ALLOWED_GLOBALS`` with plain data as arguments. It refuses strings
in symbolic shapes, because ``sympy`` evaluates them.
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

_MAX_ENCODED_SIZE = 1 << 26
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
"""Module and name of all classes in the metadata of Torch-TensorRT 2.11 to 2.14."""

_RECOMPILE = "Recompile the model with Torch-TensorRT 2.11 or later and immutable_weights=False."


@dataclass(frozen=True)
class EnumValue:
    """A member of one of upstream's enumerations.

    Attributes:
        enum: Name of the enumeration class in ``torch_tensorrt``.
        value: Value of the member.
    """

    enum: str
    value: int


@dataclass(frozen=True)
class DeviceValue:
    """An instance of upstream's ``Device``.

    Attributes:
        fields: Names and values of its fields, sorted by name.
    """

    fields: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Metadata:
    """The compilation metadata of an engine, as plain data.

    Attributes:
        settings: Fields of the compilation settings by name: scalars, containers of scalars,
            :class:`EnumValue`, :class:`DeviceValue`, and names of dtypes (``torch.float16``).
        symbolic_shapes: Symbolic shapes of inputs and outputs, with expressions as text; None if
            there are none.
        outputs_unowned: Whether the engine allocates its outputs anew in every call.
        weight_name_map: The map that torch-tensorrt 2.11 and 2.12 cache; None if there is none.
    """

    settings: Mapping[str, Any]
    symbolic_shapes: Any = None
    outputs_unowned: bool = False
    weight_name_map: Mapping[str, Any] | None = field(default=None)


def read_metadata(encoded: str | bytes, engine: str) -> Metadata:
    """Read the metadata of an engine. Nothing that it names is imported or called.

    Args:
        encoded: The pickle in base64, as the engine stores it; at most 64 MiB.
        engine: Name of the engine, for error messages.

    Raises:
        NotRefittableError: ``encoded`` is empty.
        UnsupportedTargetError: The metadata is damaged, hostile, or of an unknown version.
    """
    if not encoded:
        raise NotRefittableError(
            f"The engine {engine!r} has no metadata, so its compilation settings are unknown.",
            hint=_RECOMPILE,
        )
    try:
        return _metadata_of(read_pickle(_decoded(encoded), ALLOWED_GLOBALS))
    except PickleRefusedError as exc:
        raise UnsupportedTargetError(
            f"The metadata of the engine {engine!r} is refused: {exc}.",
            hint="No code in the metadata was run. Load this model with torch_tensorrt only if you "
            "trust its author.",
        ) from exc


def _decoded(encoded: str | bytes) -> bytes:
    if not isinstance(encoded, (str, bytes)):
        raise PickleRefusedError(f"it is of type {type(encoded).__name__}")
    # before decoding, because decoding needs memory of the same size
    if len(encoded) > _MAX_ENCODED_SIZE:
        raise PickleRefusedError(f"it has {len(encoded)} bytes; the limit is {_MAX_ENCODED_SIZE}")
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise PickleRefusedError(f"it is not valid base64: {exc}") from exc


def _metadata_of(value: Any) -> Metadata:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise PickleRefusedError("it is not a mapping with names as keys")
    settings = value.get("settings")
    if not isinstance(settings, Instance) or _qualified_name(settings.of) != _SETTINGS:
        raise PickleRefusedError("it has no compilation settings")
    unowned = value.get("output_tensors_are_unowned", False)
    if not isinstance(unowned, bool):
        raise PickleRefusedError("output_tensors_are_unowned is not a bool")
    names = value.get("weight_name_map")
    if names is not None and not isinstance(names, dict):
        raise PickleRefusedError("weight_name_map is not a mapping")
    # fields of other versions are not used here, but upstream unpickles them too
    others = value.keys() - {"settings", "inout_symexprs", "weight_name_map"}
    for name in others:
        _plain_value(value[name])
    return Metadata(
        settings=_fields(settings),
        symbolic_shapes=_plain_value(value.get("inout_symexprs")),
        outputs_unowned=unowned,
        weight_name_map=_plain_value(names),
    )


def _fields(instance: Instance) -> dict[str, Any]:
    """The fields of an instance that was pickled by its state alone, without arguments."""
    state = instance.state
    # with arguments, the class itself would decide what they mean
    if instance.args or instance.kwargs or not isinstance(state, dict):
        raise PickleRefusedError(f"{instance.of} is constructed in another way than upstream does")
    if not all(isinstance(name, str) for name in state):
        raise PickleRefusedError(f"{instance.of} has fields whose names are not strings")
    return {name: _plain_value(value) for name, value in state.items()}


def _plain_value(value: Any) -> Any:
    """A pickled value as plain data."""
    if isinstance(value, Global):
        return _dtype_name(value)
    if isinstance(value, Instance):
        return _plain_instance(value)
    if isinstance(value, dict):
        return {_plain_key(key): _plain_value(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset)):
        return frozenset(_plain_key(one) for one in value)
    if isinstance(value, (list, tuple)):
        return type(value)(_plain_value(one) for one in value)
    return value


def _plain_key(value: Any) -> Any:
    """Like ``_plain_value``, for a dict key or a set member, which must be hashable."""
    plain = _plain_value(value)
    # its fields may be unhashable, so hashing it could raise an unexpected error
    if isinstance(plain, DeviceValue):
        raise PickleRefusedError("a device is used as a key")
    return plain


def _dtype_name(value: Global) -> str:
    # a class without a call is data only if it is a dtype; torch pickles dtypes by name
    if _qualified_name(value) not in _DTYPES:
        raise PickleRefusedError(f"{value} stands in place of a value")
    return str(value)


def _plain_instance(value: Instance) -> Any:
    """An enum member, a device or a symbolic expression as plain data."""
    key = _qualified_name(value.of)
    if key in _ENUMS:
        return _enum_value(value)
    if key == _DEVICE:
        return DeviceValue(tuple(sorted(_fields(value).items())))
    # both are allowed elsewhere: settings at the top, and dtypes without a call
    if key == _SETTINGS or key in _DTYPES:
        raise PickleRefusedError(f"{value.of} is not allowed at this place")
    return _expression(value)


def _enum_value(value: Instance) -> EnumValue:
    if value.kwargs or value.state or len(value.args) != 1 or type(value.args[0]) is not int:
        raise PickleRefusedError(f"{value.of} is constructed in another way than upstream does")
    return EnumValue(value.of.name, value.args[0])


def _expression(value: Any) -> str:
    """A symbolic size as text. Only symbol names may be strings: sympy evaluates other ones."""
    if type(value) is int:  # not isinstance, because a bool is not a size
        return str(value)
    if not isinstance(value, Instance) or value.state:
        raise PickleRefusedError("a symbolic shape contains something that is not an expression")
    key = _qualified_name(value.of)
    if key == _SYMBOL:
        return _symbol(value)
    if value.kwargs or key not in _NUMBERS | _FUNCTIONS:
        raise PickleRefusedError(f"{value.of} is not allowed in a symbolic shape")
    return f"{value.of.name}({', '.join(_expressions(value.args))})"


def _expressions(values: Iterable[Any]) -> list[str]:
    return [_expression(value) for value in values]


def _symbol(value: Instance) -> str:
    named = len(value.args) == 1 and isinstance(value.args[0], str)
    # assumptions of the symbol, such as integer=True
    flags = all(isinstance(key, str) for key in value.kwargs)
    if not named or not flags or not all(isinstance(f, bool) for f in value.kwargs.values()):
        raise PickleRefusedError("a symbol is constructed in another way than sympy does")
    return str(value.args[0])


def _qualified_name(of: Global) -> tuple[str, str]:
    return (of.module, of.name)
