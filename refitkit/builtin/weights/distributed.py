"""Checkpoints of ``torch.distributed.checkpoint``, read by one process, however they were sharded.

A folder holds ``.metadata``, a pickle that says which piece of which tensor lies in which file, and
the files, in which each piece is what ``torch.save`` wrote of it
(``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py``, 2.11 to 2.14). torch unpickles
the metadata; here it is read as data, and nothing that it names is looked up or called.
"""

from __future__ import annotations

import io
from collections import defaultdict
from dataclasses import dataclass
from itertools import takewhile
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.weights.files import is_file
from refitkit.builtin.weights.reading import Folder, OpenFile
from refitkit.builtin.weights.torch_files import archive_in, require_bounded
from refitkit.errors import Problem, SourceError, raise_if_resource, raised_as
from refitkit.files.plain_pickle import Global, Instance, PickleRefusedError, read_pickle
from refitkit.model import TensorInfo
from refitkit.model.slot import ITEM_BYTES
from refitkit.program.dtypes import dtype_name, dtype_of, unusable_dtype
from refitkit.recipe.sources import describe_tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

METADATA = ".metadata"
"""Name of the file that says what is where."""

_LIMIT = 1 << 28
_TABLE = "torch.distributed.checkpoint.metadata"
_FILES = "torch.distributed.checkpoint.filesystem"
_DTYPES = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
_TENSOR = Global(_TABLE, "TensorStorageMetadata")
_ADMITTED = frozenset(
    {
        *(
            (_TABLE, name)
            for name in (
                *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties"),
                *("ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
            )
        ),
        *((_FILES, name) for name in ("_StorageInfo", "_StoragePrefix")),
        *(("torch", name) for name in (*_DTYPES, "Size", "strided")),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        *(("pathlib", name) for name in ("PosixPath", "PurePosixPath", "Path")),
    }
)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor, and where it lies."""

    offsets: Shape
    sizes: Shape
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class _Entry:
    info: TensorInfo
    pieces: tuple[_Piece, ...] = ()


class DistributedCheckpoint:
    """A folder that ``torch.distributed.checkpoint.save`` wrote; tensors are made when asked for.

    Names are those of its flattened state_dict: ``model.layer.weight`` where a training loop saved
    ``{"model": ...}``. What is no tensor (a step, a learning rate) has no name here.
    """

    def __init__(self, folder: Path) -> None:
        """Read what is where, and check that it is there.

        Raises:
            SourceError: It is damaged, or pieces are missing; lists all of them.
        """
        self.description = f"{str(folder)!r}"
        self._folder = Folder(folder, self.description)
        self._folder.note(METADATA)
        self._metadata, table = _read(folder / METADATA, self.description)
        try:
            self._entries = dict(_entries(table))
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            what = f"{self.description} is no distributed checkpoint that is known here"
            raise SourceError(f"{what}: {type(exc).__name__}: {exc}.") from exc
        problems = [
            problem
            for name, entry in self._entries.items()
            for problem in _problems(name, entry, folder)
        ]
        if problems:
            raise SourceError(
                f"{self.description} is not whole.",
                problems=problems,
                hint="Check that every process wrote its files, and that all were copied.",
            )
        self._files: dict[str, OpenFile] = {}
        for file in {piece.file for entry in self._entries.values() for piece in entry.pieces}:
            self._folder.note(file)
            with raised_as(SourceError, f"{self.description} cannot be read"):
                self._files[file] = OpenFile(folder / file, self.description, hold=False)

    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._entries.keys()

    def info(self, fqn: str) -> TensorInfo:
        """Dtype and shape of the whole tensor."""
        return self._entries[fqn].info

    def get(self, fqn: str) -> torch.Tensor:
        """The whole tensor, on the CPU."""
        entry = self._entries[fqn]
        if entry.info.unusable:
            raise SourceError(f"{self.description}: {fqn!r} is {entry.info.unusable}.")
        dtype = dtype_of(entry.info.dtype)
        pieces = [piece for piece in entry.pieces if prod(piece.sizes)]
        if len(pieces) == 1 and pieces[0].sizes == entry.info.shape:
            return self._read(fqn, pieces[0], dtype)
        whole = torch.empty(entry.info.shape, dtype=dtype)
        for piece in pieces:
            part = whole
            for dim, (offset, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
                part = part.narrow(dim, offset, size)
            part.copy_(self._read(fqn, piece, dtype))
        return whole

    def require_unchanged(self) -> None:
        """Check that all files are what they were; see ``refitkit.protocols.MayChange``."""
        self._folder.require_unchanged()
        for file in (self._metadata, *self._files.values()):
            file.require_unchanged()

    def reread(self) -> None:
        """Read all files again; see ``refitkit.protocols.SupportsReread``."""
        for file in (self._metadata, *self._files.values()):
            file.reread()

    def _read(self, fqn: str, piece: _Piece, dtype: torch.dtype) -> torch.Tensor:
        what = f"{self.description}: {fqn!r} in {piece.file!r}"
        content = self._files[piece.file].read_bytes(piece.start, piece.length)
        with archive_in(io.BytesIO(content)) as archive:
            if archive is not None:
                require_bounded(archive, len(content), what)
        try:
            value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as exc:  # no code of the file runs: whatever is raised, it cannot be read
            raise_if_resource(exc, f"{what} cannot be read")
            raise SourceError(f"{what} cannot be read: {exc}.") from exc
        found, wanted = (
            describe_tensor(value),
            TensorInfo(dtype=dtype_name(dtype), shape=piece.sizes),
        )
        if found != wanted:
            shown = found.unusable or f"{found.dtype} {found.shape}"
            kind = "another piece than announced"
            problem = Problem(fqn, kind, shown, f"{wanted.dtype} {wanted.shape}")
            raise SourceError(f"{what} is damaged.", problems=[problem])
        tensor: torch.Tensor = value.detach()
        return tensor


def _read(path: Path, what: str) -> tuple[OpenFile, Any]:
    try:
        file = OpenFile(path, what, hold=False)
        if file.size > _LIMIT:
            raise SourceError(f"{what}: {METADATA} has more than {_LIMIT} bytes.")
        return file, read_pickle(file.read_bytes(0, file.size), _ADMITTED)
    except OSError as exc:
        raise_if_resource(exc, f"{what} cannot be read")
        raise SourceError(f"{what} cannot be read: {exc}.") from exc
    except PickleRefusedError as exc:
        raise SourceError(
            f"{what}: {METADATA} is refused: {exc}.",
            hint="refitkit runs no code from files. If torch wrote this one, please report it.",
        ) from exc


def _entries(table: Instance) -> Iterator[tuple[str, _Entry]]:
    state = _state(table)
    places: dict[str, dict[Shape, Mapping[str, Any]]] = defaultdict(dict)
    for index, place in state["storage_data"].items():
        key = _state(index)
        offset = key.get("offset")
        places[key["fqn"]][() if offset is None else _size(offset)] = _state(place)
    for name, found in state["state_dict_metadata"].items():
        if isinstance(found, Instance) and found.of == _TENSOR:
            yield name, _entry(_state(found), places[name])


def _entry(found: Mapping[str, Any], places: Mapping[Shape, Mapping[str, Any]]) -> _Entry:
    dtype = found["properties"].state[0].name
    pieces = tuple(_piece(_state(chunk), places) for chunk in found["chunks"])
    how = "compressed or otherwise changed on its way to the file"
    changed = any(place.get("transform_descriptors") for place in places.values())
    shape, unusable = _size(found["size"]), unusable_dtype(dtype)
    info = TensorInfo(dtype=dtype, shape=shape, unusable=how if changed else unusable)
    return _Entry(info, pieces)


def _piece(chunk: Mapping[str, Any], places: Mapping[Shape, Mapping[str, Any]]) -> _Piece:
    offsets, sizes = _size(chunk["offsets"]), _size(chunk["sizes"])
    place = places.get(offsets, {})
    start, length = (int(place.get(key, 0)) for key in ("offset", "length"))
    if start < 0 or length < 0:
        raise ValueError(f"a piece of {length} bytes at {start}")
    return _Piece(offsets, sizes, str(place.get("relative_path", "")), start, length)


def _state(value: Any) -> Mapping[str, Any]:
    """Attributes of an object; a dataclass has them all in its state."""
    state = value.state
    if isinstance(state, tuple):  # slots, or nothing but slots
        state = state[0] or state[1]
    return dict(state or {})


def _size(value: Any) -> Shape:
    """What a ``torch.Size`` was made of."""
    sizes = value.args[0] if isinstance(value, Instance) else value
    if any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError(f"{sizes!r} is no shape")
    return tuple(sizes)


def _problems(name: str, entry: _Entry, folder: Path) -> Iterator[Problem]:
    """What is wrong with a tensor: pieces nowhere, outside, cut off, or too few."""
    shape = entry.info.shape
    for piece in entry.pieces:
        if not _is_inside(piece, shape):
            yield Problem(name, "a piece outside of it", f"{piece.sizes} at {piece.offsets}")
        if not piece.file or not {"/", "\\", "\0"}.isdisjoint(piece.file) or piece.file == "..":
            yield Problem(name, "a piece is nowhere", repr(piece.file), "a file of the folder")
        elif not is_file(folder / piece.file):
            yield Problem(name, "missing", wanted=f"the file {piece.file!r}")
        elif (folder / piece.file).stat().st_size < piece.start + piece.length:
            yield Problem(name, "cut off", hint=f"{piece.file!r} is too short")
        elif piece.length < prod(piece.sizes) * ITEM_BYTES.get(entry.info.dtype, 0):
            yield Problem(name, "cut off", f"{piece.length} bytes for {piece.sizes}")
    covered = sum(prod(piece.sizes) for piece in entry.pieces)
    if covered != prod(shape) or _overlap(entry.pieces):
        yield Problem(name, "pieces do not make it up", f"{covered} elements", f"{prod(shape)}")


def _is_inside(piece: _Piece, shape: Shape) -> bool:
    return len(piece.sizes) == len(piece.offsets) == len(shape) and all(
        offset + size <= whole
        for offset, size, whole in zip(piece.offsets, piece.sizes, shape, strict=True)
    )


def _overlap(pieces: tuple[_Piece, ...]) -> bool:
    """Whether two pieces share an element: then as many elements as it has do not cover it.

    Pieces are compared with those that begin before they end, in the dimension that was cut most.
    """
    solid = [p for p in pieces if prod(p.sizes) and len(p.sizes) == len(p.offsets)]
    dims = range(min((len(p.sizes) for p in solid), default=0))
    dim = max(dims, key=lambda d: len({p.offsets[d] for p in solid}), default=None)
    if dim is None:
        return len(solid) > 1
    solid.sort(key=lambda p: p.offsets[dim])
    return any(
        _share(one, other)
        for number, one in enumerate(solid)
        for other in _before(solid[number + 1 :], dim, one.offsets[dim] + one.sizes[dim])
    )


def _before(pieces: list[_Piece], dim: int, end: int) -> Iterator[_Piece]:
    """Those that begin before a place; they are sorted."""
    return takewhile(lambda piece: piece.offsets[dim] < end, pieces)


def _share(a: _Piece, b: _Piece) -> bool:
    return all(
        p < q + m and q < p + n
        for p, n, q, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=False)
    )
