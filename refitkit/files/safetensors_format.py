"""The safetensors format, read and written piece by piece.

The format is that of https://github.com/huggingface/safetensors, "Format" in its README: the length
of the header in 8 bytes, the header as JSON, and the tensors, one after another without gaps.
safetensors itself maps files, and a page of a mapped file that is no longer there ends the process
with SIGBUS (``mmap(2)``). So refitkit reads and writes the format itself: tensor by tensor, without
a copy of the whole.
"""

from __future__ import annotations

import json
import mmap
import os
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from refitkit.errors import Problem, RefitError
from refitkit.files.archive import Archive, ArchiveError, Streamed
from refitkit.model import TensorInfo
from refitkit.model.slot import ITEM_BYTES
from refitkit.program.dtypes import dtype_name, dtype_of, unusable_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path


_LARGE = 1 << 20
"""Bytes from which on memory is asked of the system itself."""
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
    "F4": ("float4_e2m1fn_x2", 4),
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

_NAMES = {dtype: name for name, (dtype, _) in _DTYPES.items() if dtype in ITEM_BYTES}

_LIMIT = 100_000_000
"""Bytes of a header: the limit of the format."""

_LENGTH = 8
_ALIGNMENT = 8  # bytes: where the format wants the first tensor to begin
_MOST = 2**63 - 1  # elements that torch can count
_LONGEST = 2**62 - 1  # of a dimension, even of a tensor without elements


class Entry(NamedTuple):
    """One tensor of a file.

    Attributes:
        info: Dtype and shape.
        start: Where its bytes begin, counted from the beginning of the file.
        nbytes: Their number.
    """

    info: TensorInfo
    start: int
    nbytes: int


# -- reading ------------------------------------------------------------------------------------


def read_entries(size: int, read: Callable[[int, int], bytes]) -> dict[str, Entry]:
    """All tensors that the header of a file names.

    Args:
        size: Bytes of the file.
        read: Reads a range: where it begins, and its length. It is called for ranges in the file.

    Raises:
        ValueError: There is no header, or it does not describe the file.
        RecursionError: The header is nested too deeply.
    """
    text = _header_text(size, read)
    begin = _LENGTH + len(text)
    header, _ = _header(text.decode())
    entries = {name: _entry(name, found, begin) for name, found in header.items()}
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            raise ValueError(f"{name!r} begins at {entry.start}, what is before it ends at {end}")
        end += entry.nbytes
    if end != size:
        raise ValueError(f"tensors end at {end}, the file at {size}")
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that the header of a file holds beside its tensors.

    Raises:
        OSError: It cannot be read.
        ValueError: There is no header, or it is damaged.
        RecursionError: The header is nested too deeply.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return _header(_header_text(size, lambda _, count: file.read(count)).decode())[1]


def _header_text(size: int, read: Callable[[int, int], bytes]) -> bytes:
    if size < _LENGTH:
        raise ValueError("it is too short for a header")
    length = int.from_bytes(read(0, _LENGTH), "little")
    if length > _LIMIT or _LENGTH + length > size:
        raise ValueError(f"a header of {length} bytes, in a file of {size}")
    text = read(_LENGTH, length)
    if len(text) != length or not text.startswith(b"{"):
        raise ValueError("the header is no JSON object")
    return text


def _header(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries of tensors, and the texts beside them."""
    header: dict[str, Any] = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    told = header.pop("__metadata__", None)
    told = {} if told is None else told
    if not isinstance(told, dict) or not all(isinstance(text, str) for text in told.values()):
        raise ValueError("its metadata is no map of texts")
    for name in header:
        name.encode()  # JSON can escape halves of characters, which nobody could print
    return header, told


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _entry(name: str, found: Any, begin: int) -> Entry:
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
    dtype = dtype or text
    if dtype.endswith("_x2") and shape and shape[-1] % 2 == 0:
        shape = [*shape[:-1], shape[-1] // 2]  # torch counts pairs
    info = TensorInfo(dtype=dtype, shape=tuple(shape), unusable=unusable_dtype(dtype))
    return Entry(info, begin + first, last - first)


class ArchivedTensors:
    """The tensors of a ``.safetensors`` member of an archive, read one at a time."""

    def __init__(self, archive: Archive, member: str) -> None:
        """Read the header.

        Raises:
            ArchiveError: There is no such member, or it is damaged.
        """
        self._archive, self._member = archive, member
        try:
            with archive.open(member) as stream:
                self._entries = read_entries(archive.size(member), lambda _, n: stream.read(n))
        except (ValueError, RecursionError) as exc:
            raise ArchiveError(f"member {member!r} is damaged: {exc}") from exc

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Dtypes and shapes, by name."""
        return {name: entry.info for name, entry in self._entries.items()}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors in the order of the file, each in memory of its own.

        The checksum of the member is compared when its last byte is read.

        Raises:
            ArchiveError: The member is damaged, or torch lacks a dtype.
        """
        listed = sorted(self._entries.items(), key=lambda one: (one[1].start, one[1].nbytes))
        with self._archive.open(self._member) as stream:
            done = 0
            for name, entry in listed:
                if entry.info.unusable:
                    raise ArchiveError(f"member {self._member!r}: {name!r}: {entry.info.unusable}")
                stream.read(entry.start - done)  # the header: tensors have no gaps between them
                raw = _memory(entry.nbytes)
                stream.fill(raw.numpy().data)
                done = entry.start + entry.nbytes
                yield name, raw.view(dtype_of(entry.info.dtype)).reshape(entry.info.shape)


def _memory(nbytes: int) -> torch.Tensor:
    """Bytes to read into. The system gets large ones back at once: malloc would keep them."""
    if nbytes < _LARGE:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


# -- writing ------------------------------------------------------------------------------------


def streamed(tensors: Mapping[str, torch.Tensor]) -> Streamed:
    """The content of a ``.safetensors`` file with these tensors, as a member of an archive.

    Tensors are read when the archive is written, one at a time.

    Raises:
        RefitError: The format has no name for a dtype.
    """
    problems = unwritable(tensors)
    if problems:
        message = "The safetensors format has no such dtypes, so the weights cannot be saved."
        raise RefitError(message, problems=problems)
    # wide elements first, as safetensors does it: then every tensor is aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, start = {}, 0
    for name in names:
        tensor, end = tensors[name], start + _nbytes(tensors[name])
        dtype = _NAMES[dtype_name(tensor.dtype)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return Streamed(_LENGTH + len(text) + start, _chunks(text, [tensors[name] for name in names]))


def unwritable(tensors: Mapping[str, torch.Tensor]) -> list[Problem]:
    """Tensors of dtypes that the format has no name for: ``complex32``, ``complex128``."""
    return [
        Problem(name, "dtype", dtype_name(tensor.dtype))
        for name, tensor in sorted(tensors.items())
        if dtype_name(tensor.dtype) not in _NAMES
    ]


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _chunks(header: bytes, tensors: list[torch.Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(_LENGTH, "little") + header
    for tensor in tensors:
        if tensor.numel():
            plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            yield plain.reshape(-1).view(torch.uint8).numpy().data
