"""Read checkpoints of ``torch.distributed.checkpoint`` in one process, with any sharding.

The folder holds ``.metadata``, a pickle that says which piece of which tensor is in which file, and
these files. Each piece is what ``torch.save`` wrote of it
(``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py``, 2.11 to 2.14). Torch unpickles
the metadata. Here it is parsed as data, and nothing that it names is imported or called.

Read ``DistributedCheckpoint`` first. Then come the metadata, the check of all pieces, and the proof
that pieces do not overlap.
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

    Shape = tuple[int, ...]

METADATA = ".metadata"
"""Name of the file that says where each piece is."""

_MAX_METADATA = 1 << 28  # bytes
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_STORAGE_MODULE = "torch.distributed.checkpoint.filesystem"
_DTYPES = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
_TENSOR = Global(_METADATA_MODULE, "TensorStorageMetadata")
_ALLOWED = frozenset(
    {
        *(
            (_METADATA_MODULE, name)
            for name in (
                *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties"),
                *("ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
            )
        ),
        *((_STORAGE_MODULE, name) for name in ("_StorageInfo", "_StoragePrefix")),
        *(("torch", name) for name in (*_DTYPES, "Size", "strided")),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        *(("pathlib", name) for name in ("PosixPath", "PurePosixPath", "Path")),
    }
)
"""Names that the pickle may contain: those that torch writes."""


class DistributedCheckpoint:
    """A source of a folder that ``torch.distributed.checkpoint.save`` wrote.

    Tensors are assembled from their pieces when they are read. Names are those of the flattened
    state_dict: ``model.layer.weight`` if a training loop saved ``{"model": ...}``. Values that are
    not tensors (a step, a learning rate) have no name here.
    """

    def __init__(self, folder: Path) -> None:
        """Read the metadata, and check that all pieces exist.

        Args:
            folder: Folder with a ``.metadata`` file.

        Raises:
            SourceError: The metadata is damaged, or pieces are missing, truncated or overlapping.
                The error lists all problems.
        """
        self.description = f"{str(folder)!r}"
        self._folder = Folder(folder, self.description)
        self._folder.record(METADATA)
        self._metadata, metadata = _read_metadata(folder / METADATA, self.description)
        try:
            self._entries = dict(_entries(metadata))
        # The pickle is well-formed, but may hold anything.
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            message = f"{self.description} is not a distributed checkpoint that refitkit can read"
            raise SourceError(f"{message}: {type(exc).__name__}: {exc}.") from exc
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
            self._folder.record(file)
            with raised_as(SourceError, f"{self.description} cannot be read"):
                # There may be more files than descriptors: one for each process of the training.
                self._files[file] = OpenFile(folder / file, self.description, keep_open=False)

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""
        return self._entries.keys()

    def info(self, fqn: str) -> TensorInfo:
        """Return dtype and shape of the whole tensor."""
        return self._entries[fqn].info

    def get(self, fqn: str) -> torch.Tensor:
        """Return the whole tensor, on the CPU.

        Raises:
            KeyError: The checkpoint has no such name.
            SourceError: The entry is unusable, or a piece is damaged or was changed.
        """
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
        """Check that no file was changed; see ``refitkit.protocols.MayChange``."""
        self._folder.require_unchanged()
        for file in (self._metadata, *self._files.values()):
            file.require_unchanged()

    def reread(self) -> None:
        """Compare digests with a second read; see ``refitkit.protocols.SupportsReread``."""
        for file in (self._metadata, *self._files.values()):
            file.reread()

    def _read(self, fqn: str, piece: _Piece, dtype: torch.dtype) -> torch.Tensor:
        """Read one piece.

        Raises:
            SourceError: The piece cannot be read, or has another dtype or shape than the metadata
                says.
        """
        label = f"{self.description}: {fqn!r} in {piece.file!r}"
        content = self._files[piece.file].read_bytes(piece.start, piece.length)
        with archive_in(io.BytesIO(content)) as archive:
            if archive is not None:
                require_bounded(archive, len(content), label)
        try:
            value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as exc:
            # weights_only runs no code of the file, so any exception means that it cannot be read.
            raise_if_resource(exc, f"{label} cannot be read")
            raise SourceError(f"{label} cannot be read: {exc}.") from exc
        found = describe_tensor(value)
        wanted = TensorInfo(dtype=dtype_name(dtype), shape=piece.sizes)
        if found != wanted:
            text = found.unusable or f"{found.dtype} {found.shape}"
            kind = "not the piece in the metadata"
            problem = Problem(fqn, kind, text, f"{wanted.dtype} {wanted.shape}")
            raise SourceError(f"{label} is damaged.", problems=[problem])
        tensor: torch.Tensor = value.detach()
        return tensor


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor.

    Attributes:
        offsets: Index of its first element in the tensor, one number for each dimension.
        sizes: Shape of the piece.
        file: Name of the file that holds it, in the folder.
        start: Offset in the file, in bytes.
        length: Number of bytes in the file.
    """

    offsets: Shape
    sizes: Shape
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class _Entry:
    """A tensor: its header and its pieces."""

    info: TensorInfo
    pieces: tuple[_Piece, ...] = ()


# -- the metadata -----------------------------------------------------------------------------


def _read_metadata(path: Path, label: str) -> tuple[OpenFile, Any]:
    """Return the open file and its pickle as plain data.

    Raises:
        SourceError: The file cannot be read, is too large, or its pickle names something else than
            torch writes.
    """
    try:
        file = OpenFile(path, label, keep_open=False)
        if file.size > _MAX_METADATA:
            raise SourceError(f"{label}: {METADATA} has more than {_MAX_METADATA} bytes.")
        return file, read_pickle(file.read_bytes(0, file.size), _ALLOWED)
    except OSError as exc:
        raise_if_resource(exc, f"{label} cannot be read")
        raise SourceError(f"{label} cannot be read: {exc}.") from exc
    except PickleRefusedError as exc:
        raise SourceError(
            f"{label}: {METADATA} is refused: {exc}.",
            hint="refitkit runs no code from files. If torch wrote this one, please report it.",
        ) from exc


def _entries(metadata: Instance) -> Iterator[tuple[str, _Entry]]:
    """Yield each tensor of a ``Metadata`` object.

    ``storage_data`` maps (name, offsets) to a place in a file; ``state_dict_metadata`` maps a name
    to its header and chunks.
    """
    attributes = _attributes(metadata)
    places: dict[str, dict[Shape, Mapping[str, Any]]] = defaultdict(dict)
    for index, place in attributes["storage_data"].items():
        key = _attributes(index)
        offset = key.get("offset")
        places[key["fqn"]][() if offset is None else _shape(offset)] = _attributes(place)
    for name, found in attributes["state_dict_metadata"].items():
        if isinstance(found, Instance) and found.of == _TENSOR:
            yield name, _entry(_attributes(found), places[name])


def _entry(found: Mapping[str, Any], places: Mapping[Shape, Mapping[str, Any]]) -> _Entry:
    dtype = found["properties"].state[0].name
    pieces = tuple(_piece(_attributes(chunk), places) for chunk in found["chunks"])
    # Extensions such as compression are in ``_StorageInfo.transform_descriptors``.
    transformed = any(place.get("transform_descriptors") for place in places.values())
    reason = "compressed or otherwise transformed in its file"
    shape, unusable = _shape(found["size"]), unusable_dtype(dtype)
    info = TensorInfo(dtype=dtype, shape=shape, unusable=reason if transformed else unusable)
    return _Entry(info, pieces)


def _piece(chunk: Mapping[str, Any], places: Mapping[Shape, Mapping[str, Any]]) -> _Piece:
    offsets, sizes = _shape(chunk["offsets"]), _shape(chunk["sizes"])
    place = places.get(offsets, {})
    start, length = (int(place.get(key, 0)) for key in ("offset", "length"))
    if start < 0 or length < 0:
        raise ValueError(f"a piece of {length} bytes at {start}")
    return _Piece(offsets, sizes, str(place.get("relative_path", "")), start, length)


def _attributes(value: Any) -> Mapping[str, Any]:
    """Return the attributes of a pickled object: a dataclass has all of them in its state."""
    state = value.state
    if isinstance(state, tuple):  # (attributes or None, slots), see object.__reduce_ex__
        state = state[0] or state[1]
    return dict(state or {})


def _shape(value: Any) -> Shape:
    """Return a pickled ``torch.Size`` as a tuple.

    Raises:
        ValueError: It does not consist of non-negative integers.
    """
    sizes = value.args[0] if isinstance(value, Instance) else value
    if any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError(f"{sizes!r} is not a shape")
    return tuple(sizes)


# -- checking pieces --------------------------------------------------------------------------


def _problems(name: str, entry: _Entry, folder: Path) -> Iterator[Problem]:
    """Yield what is wrong with the pieces of a tensor: outside, missing, truncated, or too few."""
    shape = entry.info.shape
    for piece in entry.pieces:
        if not _is_inside(piece, shape):
            yield Problem(name, "a piece outside of it", f"{piece.sizes} at {piece.offsets}")
        # A checkpoint must not name files elsewhere on the machine.
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
    """Return whether two pieces share an element.

    If none do, and the pieces have as many elements as the tensor, they cover it.
    """
    solid = [p for p in pieces if prod(p.sizes) and len(p.sizes) == len(p.offsets)]
    dims = range(min((len(p.sizes) for p in solid), default=0))
    dim = max(dims, key=lambda d: len({p.offsets[d] for p in solid}), default=None)
    if dim is None:
        return len(solid) > 1
    # Comparing all pairs would be quadratic. Sorted along the dimension with most cuts, each piece
    # is compared only with those that begin before it ends.
    solid.sort(key=lambda p: p.offsets[dim])
    return any(
        _intersect(one, other)
        for index, one in enumerate(solid)
        for other in _before(solid[index + 1 :], dim, one.offsets[dim] + one.sizes[dim])
    )


def _before(pieces: list[_Piece], dim: int, end: int) -> Iterator[_Piece]:
    """Return the pieces that begin before an index. They must be sorted along the dimension."""
    return takewhile(lambda piece: piece.offsets[dim] < end, pieces)


def _intersect(a: _Piece, b: _Piece) -> bool:
    return all(
        p < q + m and q < p + n
        for p, n, q, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=False)
    )
