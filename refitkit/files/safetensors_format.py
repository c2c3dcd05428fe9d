"""Read and write the safetensors format, one tensor at a time.

This module hides the format. A file has the length of the header in 8 bytes, the header as JSON,
and the tensors one after another, without gaps (https://github.com/huggingface/safetensors, section
"Format" of the README). The safetensors library maps files into memory. If a page of a mapped
file is lost, the process ends with SIGBUS (``mmap(2)``). So refitkit reads and writes the format
itself, tensor by tensor and without a copy of the whole.
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
"""Bytes from which on memory comes from the system, not from malloc."""
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
"""torch's name, empty if it has none, and bits of an element, by dtype of the format
(``safetensors/src/tensor.rs``, 0.8)."""

_FORMAT_NAMES = {dtype: name for name, (dtype, _) in _DTYPES.items() if dtype in ITEM_BYTES}

_HEADER_LIMIT = 100_000_000  # bytes, set by the format
_LENGTH_BYTES = 8
_ALIGNMENT = 8  # bytes: the format requires the first tensor to begin at a multiple
_MAX_ELEMENTS = 2**63 - 1  # that torch can count
_MAX_DIMENSION = 2**62 - 1  # limits tensors without elements, too


class TensorEntry(NamedTuple):
    """One tensor of a file.

    Attributes:
        info: Dtype and shape.
        start: Offset of the tensor's first byte in the file.
        nbytes: Size of the tensor in bytes.
    """

    info: TensorInfo
    start: int
    nbytes: int


# -- reading ------------------------------------------------------------------------------------


def read_entries(size: int, read: Callable[[int, int], bytes]) -> dict[str, TensorEntry]:
    """All tensors in a file, by name, from its header.

    Args:
        size: Size of the file in bytes.
        read: Returns a range of bytes, given its offset and length. Ranges are within the file.

    Raises:
        ValueError: The file has no header, or the header does not describe the file.
        RecursionError: The header is nested too deeply.
    """
    text = _header_text(size, read)
    data_start = _LENGTH_BYTES + len(text)
    header, _ = _header(text.decode())
    entries = {name: _entry(name, value, data_start) for name, value in header.items()}
    # tensors must follow one another: the format allows no gaps and no overlaps
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            raise ValueError(f"{name!r} begins at {entry.start}, but the data before ends at {end}")
        end += entry.nbytes
    if end != size:
        raise ValueError(f"the tensors end at {end}, but the file ends at {size}")
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a file: texts by key.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file has no header, or the header is damaged.
        RecursionError: The header is nested too deeply.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return _header(_header_text(size, lambda _, count: file.read(count)).decode())[1]


def _header_text(size: int, read: Callable[[int, int], bytes]) -> bytes:
    if size < _LENGTH_BYTES:
        raise ValueError("it is too short for a header")
    length = int.from_bytes(read(0, _LENGTH_BYTES), "little")
    if length > _HEADER_LIMIT or _LENGTH_BYTES + length > size:
        raise ValueError(f"a header of {length} bytes in a file of {size} bytes")
    text = read(_LENGTH_BYTES, length)
    if len(text) != length or not text.startswith(b"{"):
        raise ValueError("the header is not a JSON object")
    return text


def _header(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensor entries and metadata in the text of a header."""
    header: dict[str, Any] = json.loads(
        text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
    )
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    is_dict = isinstance(metadata, dict)
    if not is_dict or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not a map of texts")
    for name in header:
        name.encode()  # raises for lone surrogates: JSON can escape them, but no one can print them
    return header, metadata


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) != len(pairs):
        raise ValueError("a name is given twice")
    return items


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")  # NaN and Infinity, which Python's parser accepts


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    match value:
        case {"dtype": str(text), "shape": list(shape), "data_offsets": [first, last]}:
            pass
        case _:
            raise ValueError(f"{name!r} has no dtype, shape and offsets")
    if text not in _DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {text!r}")
    sizes = (*shape, first, last)
    # exact types: True and False are not sizes, although bool is a subclass of int
    is_invalid = any(type(size) is not int or size < 0 for size in sizes)
    is_invalid = is_invalid or any(size > _MAX_DIMENSION for size in shape)
    # sizes of 0 count as 1: they must not hide others that torch cannot multiply
    if is_invalid or prod(size or 1 for size in shape) > _MAX_ELEMENTS:
        raise ValueError(f"{name!r} has an invalid shape or invalid offsets")
    dtype, width = _DTYPES[text]
    if prod(shape) * width != (last - first) * 8:
        raise ValueError(f"{name!r}: {last - first} bytes for {shape} of {text}")
    dtype = dtype or text
    if dtype.endswith("_x2") and shape and shape[-1] % 2 == 0:
        shape = [*shape[:-1], shape[-1] // 2]  # an element of torch holds two of the format
    info = TensorInfo(dtype=dtype, shape=tuple(shape), unusable=unusable_dtype(dtype))
    return TensorEntry(info, data_start + first, last - first)


class ArchivedTensors:
    """Names and tensors of a ``.safetensors`` member of an archive, read one at a time."""

    def __init__(self, archive: Archive, member: str) -> None:
        """Read the header.

        Args:
            archive: An open archive. It must stay open while tensors are read.
            member: Name of the member.

        Raises:
            ArchiveError: The archive has no such member, or it is damaged.
        """
        self._archive, self._member = archive, member
        try:
            with archive.open(member) as stream:
                self._entries = read_entries(archive.size(member), lambda _, n: stream.read(n))
        except (ValueError, RecursionError) as exc:
            raise ArchiveError(f"member {member!r} is damaged: {exc}") from exc

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of each tensor, by name."""
        return {name: entry.info for name, entry in self._entries.items()}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors in the order of the file. Each tensor has its own memory.

        The checksum of the member is compared after its last byte is read.

        Raises:
            ArchiveError: The member is damaged, or torch does not have a dtype.
        """
        entries = sorted(self._entries.items(), key=lambda one: (one[1].start, one[1].nbytes))
        with self._archive.open(self._member) as stream:
            position = 0
            for name, entry in entries:
                if entry.info.unusable:
                    raise ArchiveError(f"member {self._member!r}: {name!r}: {entry.info.unusable}")
                stream.read(entry.start - position)  # the header, before the first tensor
                raw = _memory(entry.nbytes)
                stream.fill(raw.numpy().data)
                position = entry.start + entry.nbytes
                yield name, raw.view(dtype_of(entry.info.dtype)).reshape(entry.info.shape)


def _memory(nbytes: int) -> torch.Tensor:
    """A flat uint8 tensor to read into."""
    # large blocks come from mmap, which returns them to the system when they are freed; malloc
    # would keep them
    if nbytes < _LARGE:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


# -- writing ------------------------------------------------------------------------------------


def streamed(tensors: Mapping[str, torch.Tensor]) -> Streamed:
    """The content of a ``.safetensors`` file with these tensors, to write into an archive.

    Tensors are copied to the CPU while the archive is written, one at a time.

    Args:
        tensors: Tensors by name, on any device and in any layout.

    Raises:
        RefitError: The format does not have a dtype. Lists all tensors of these dtypes.
    """
    problems = unwritable(tensors)
    if problems:
        message = "The safetensors format does not have these dtypes."
        raise RefitError(message, problems=problems)
    # wide elements first, as the safetensors library does: this aligns every tensor
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, start = {}, 0
    for name in names:
        tensor, end = tensors[name], start + _nbytes(tensors[name])
        dtype = _FORMAT_NAMES[dtype_name(tensor.dtype)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return Streamed(
        _LENGTH_BYTES + len(text) + start, _chunks(text, [tensors[name] for name in names])
    )


def unwritable(tensors: Mapping[str, torch.Tensor]) -> list[Problem]:
    """A problem for each tensor whose dtype the format lacks: ``complex32``, ``complex128``."""
    return [
        Problem(name, "dtype", dtype_name(tensor.dtype))
        for name, tensor in sorted(tensors.items())
        if dtype_name(tensor.dtype) not in _FORMAT_NAMES
    ]


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _chunks(header: bytes, tensors: list[torch.Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(_LENGTH_BYTES, "little") + header
    for tensor in tensors:
        if tensor.numel():
            plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            yield plain.reshape(-1).view(torch.uint8).numpy().data
