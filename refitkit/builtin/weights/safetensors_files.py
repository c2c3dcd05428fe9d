"""Weights in a ``.safetensors`` file.

The format is that of https://github.com/huggingface/safetensors, "Format" in its README: the length
of the header in 8 bytes, the header as JSON, and the tensors, one after another without gaps. It is
read here because safetensors itself maps the file: see ``reading``.
"""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from refitkit.builtin.weights.reading import OpenFile
from refitkit.errors import SourceError
from refitkit.model import TensorInfo
from refitkit.program.dtypes import dtype_of
from refitkit.recipe.pieces import LARGE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

_DTYPES = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
    "F4": ("", 4),
    "F6_E2M3": ("", 6),
    "F6_E3M2": ("", 6),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F32": ("float32", 32),
    "F64": ("float64", 64),
    "C64": ("complex64", 64),
}
"""torch's names, where it has them, and bits of the dtypes (``safetensors/src/tensor.rs``, 0.8)."""

_LIMIT = 100_000_000
"""Bytes of a header: the limit of the format."""

_LENGTH = 8
_MOST = 2**63 - 1  # elements that torch can count
_LONGEST = 2**62 - 1  # of a dimension, even of a tensor without elements


class _Entry(NamedTuple):
    info: TensorInfo
    start: int
    nbytes: int


class SafetensorsFile:
    """One ``.safetensors`` file: its header is read now, tensors on demand."""

    def __init__(self, path: Path) -> None:
        """Open and check it.

        Raises:
            SourceError: It is missing, truncated or not of this format.
        """
        self.description = f"{str(path)!r}"
        try:
            self._file = OpenFile(path, self.description)
            self._entries = _entries(self._file)
        except (OSError, ValueError, RecursionError) as exc:
            raise SourceError(
                f"{self.description} cannot be read as safetensors: {exc}.",
                hint="Check that it was written or downloaded completely.",
            ) from exc

    def names(self) -> Collection[str]:
        """All names in the file."""
        return self._entries.keys()

    def info(self, fqn: str) -> TensorInfo:
        """Dtype and shape, from the header."""
        return self._entries[fqn].info

    def get(self, fqn: str) -> torch.Tensor:
        """The tensor, on the CPU, in memory of its own."""
        info, start, nbytes = self._entries[fqn]
        if info.unusable:
            raise SourceError(f"{self.description}: {fqn!r} cannot be read: {info.unusable}.")
        raw = self._file.read(start, nbytes)
        return raw.view(dtype_of(info.dtype)).reshape(info.shape)

    def pieces(self, fqn: str) -> Iterator[torch.Tensor] | None:
        """See ``refitkit.protocols.GivesPieces``."""
        info, start, nbytes = self._entries[fqn]
        if nbytes < LARGE or info.unusable:
            return None
        return self._file.pieces(start, nbytes, dtype_of(info.dtype))

    def require_unchanged(self) -> None:
        """See ``refitkit.protocols.MayChange``."""
        self._file.require_unchanged()

    def reread(self) -> None:
        """See ``refitkit.protocols.SupportsReread``."""
        self._file.reread()


def _entries(file: OpenFile) -> dict[str, _Entry]:
    """Everything that a header names.

    Raises:
        ValueError: It is none, or does not describe the file.
    """
    if file.size < _LENGTH:
        raise ValueError("it is too short for a header")
    length = int.from_bytes(file.read(0, _LENGTH).numpy().tobytes(), "little")
    begin = _LENGTH + length
    if length > _LIMIT or begin > file.size:
        raise ValueError(f"a header of {length} bytes, in a file of {file.size}")
    text = file.read(_LENGTH, length).numpy().tobytes()
    if not text.startswith(b"{"):
        raise ValueError("the header is no JSON object")
    header = _header(text.decode())
    entries = {name: _entry(name, found, begin) for name, found in header.items()}
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            raise ValueError(f"{name!r} begins at {entry.start}, what is before it ends at {end}")
        end += entry.nbytes
    if end != file.size:
        raise ValueError(f"tensors end at {end}, the file at {file.size}")
    return entries


def _header(text: str) -> dict[str, Any]:
    """What it says of tensors."""
    header: dict[str, Any] = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    told = header.pop("__metadata__", None)
    told = {} if told is None else told
    if not isinstance(told, dict) or not all(isinstance(text, str) for text in told.values()):
        raise ValueError("its metadata is no map of texts")
    for name in header:
        name.encode()  # JSON can escape halves of characters, which nobody could print
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _entry(name: str, found: Any, begin: int) -> _Entry:
    match found:
        case {"dtype": str(text), "shape": list(shape), "data_offsets": [first, last]}:
            pass
        case _:
            raise ValueError(f"{name!r} has no dtype, shape and place")
    if text not in _DTYPES:
        raise ValueError(f"{name!r} is of the unknown dtype {text!r}")
    sizes = (*shape, first, last)
    odd = any(type(size) is not int or size < 0 for size in sizes)
    odd = odd or any(size > _LONGEST for size in shape)
    if odd or prod(size or 1 for size in shape) > _MOST:
        raise ValueError(f"{name!r} has an odd shape or place")
    dtype, width = _DTYPES[text]
    if prod(shape) * width != (last - first) * 8:
        raise ValueError(f"{name!r}: {last - first} bytes for {shape} of {text}")
    usable = bool(dtype) and hasattr(torch, dtype)
    return _Entry(
        TensorInfo(
            dtype=dtype if usable else text,
            shape=tuple(shape),
            unusable="" if usable else f"dtype {text}, which torch does not have",
        ),
        begin + first,
        last - first,
    )
