"""How literals of calls are written in a plan: numbers, lists, dtypes, layouts, memory formats."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from refitkit.model import Number, TorchName
from refitkit.model.slot import ITEM_BYTES
from refitkit.recipe.operands import is_reference

if TYPE_CHECKING:
    from refitkit.model import Argument
    from refitkit.model.recipe import Atom

_LAYOUTS = {str(kind).removeprefix("torch."): kind for kind in (torch.strided,)}
_FORMATS = {
    str(kind).removeprefix("torch."): kind
    for kind in (
        torch.contiguous_format,
        torch.preserve_format,
        torch.channels_last,
        torch.channels_last_3d,
    )
}
_DTYPES = {name: getattr(torch, name) for name in ITEM_BYTES if hasattr(torch, name)}
_CONSTANTS: dict[str, Any] = {**_DTYPES, **_LAYOUTS, **_FORMATS}
_NAME_OF = {id(constant): name for name, constant in _CONSTANTS.items()}


def encode_literal(value: object) -> Argument:
    """A literal of a call as the manifest has it.

    References to tensors (:data:`refitkit.model.Value`) and what is encoded already stay as they
    are.

    Raises:
        TypeError: There is no way to write it: a device, a symbolic number, a list in a list.
    """
    if isinstance(value, list | tuple):
        return tuple(_encode_atom(item) for item in value)
    return _encode_atom(value)


def _encode_atom(value: object) -> Atom:
    if is_reference(value) or isinstance(value, TorchName | Number):
        return value
    if value is None or type(value) in {bool, int, str}:
        return value  # type: ignore[return-value]  # of one of these types, none of a subclass
    if type(value) is float:
        return value if math.isfinite(value) else Number(text=repr(value))
    if type(value) is complex:
        return Number(text=repr(value))
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        if id(value) in _NAME_OF:
            return TorchName(name=_NAME_OF[id(value)])
        raise TypeError(f"{value} does not occur in recipes")
    raise TypeError(f"a {type(value).__name__} does not occur in recipes")


def decode_literal(argument: Argument) -> Any:
    """A literal from the manifest; lists come as lists, references to tensors as they are.

    Raises:
        ValueError: It names a constant that torch does not have, or is no number.
    """
    if isinstance(argument, tuple):
        return [decode_literal(item) for item in argument]
    if isinstance(argument, TorchName):
        if argument.name not in _CONSTANTS:
            raise ValueError(f"torch has no constant {argument.name!r}")
        return _CONSTANTS[argument.name]
    if isinstance(argument, Number):
        return _number(argument.text)
    return argument


def _number(text: str) -> float | complex:
    """``inf``, ``-inf``, ``nan``, or what ``repr`` writes for a complex number."""
    if text in {"inf", "-inf", "nan"}:
        return float(text)
    if not text.endswith(("j", "j)")):
        raise ValueError(f"{text!r} is no number of a recipe")
    return complex(text)
