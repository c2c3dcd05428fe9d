"""Read files that ``torch.save`` wrote: a state_dict, or a dictionary that contains some.

Since torch 1.6 this is a zip file. Its records are the bytes of storages, and a pickle, which
``torch.load`` reads with ``weights_only=True``: no code in the file runs. The module hides how
tensors are read on demand, which ``torch.load`` cannot do without mapping the file (see ``reading``
for why refitkit maps nothing):

1. ``torch.load`` reads the pickle with ``map_location="meta"``, so without data. Torch then notes
   the offset of each storage in the file (``_checkpoint_offset`` in ``torch/serialization.py``,
   2.11 to 2.14).
2. The offsets are checked against the records of the zip file (``_load_without_data``).
3. ``TorchFile`` reads the bytes of a tensor when it is requested.

Files for which this does not work are read as a whole (``LoadedTorchFile``).
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import sys
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.weights.objects import flattened
from refitkit.builtin.weights.reading import FileStream, OpenFile
from refitkit.errors import Problem, SourceError, raise_if_resource
from refitkit.model import TensorInfo
from refitkit.program.dtypes import dtype_name, unusable_dtype
from refitkit.recipe import TensorMap
from refitkit.recipe.sources import LARGE, describe_tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path
    from typing import IO

    from refitkit.protocols import WeightSource

_READ_AHEAD = 512
"""Bytes that a stream reads ahead. Headers and pickles are short, and the rest is tensors."""

_LOCAL_HEADER = 30
"""Bytes before the name of a record. The last four are the lengths of its name and extra field
(APPNOTE.TXT of the zip format, 4.3.7)."""
_SIGNATURE = b"PK\3\4"
_ENCRYPTED, _FOLDER = 0x1, 0x10

_TAR_MARK = 257
"""Offset of ``ustar`` in a tar file (POSIX, ``ustar`` interchange format)."""

_MAX_GROWTH, _ALWAYS_ALLOWED = 64, 1 << 26
"""Most bytes that all records may unpack to: so many times the size of the file, or so many bytes.

Weights compress to a half at best, and nearly all-zero weights to a fiftieth.
"""

_WHOLE_HINT = "Check that it was written or downloaded completely, and is not a pointer to a file."
_NOT_ALLOWED = re.compile(r"GLOBAL (\S+) was not an allowed global")
"""How torch names a class or function that it does not load from a file."""
_SAVE_HINT = "Save tensors alone: torch.save(model.state_dict(), path), or use safetensors."


def open_torch_file(path: Path) -> WeightSource:
    """Return a source that reads tensors on demand, or that has read all of them.

    All tensors are read now from files older than torch 1.6, and from files with tensors that
    cannot be loaded without data (sparse and quantized ones).

    Raises:
        SourceError: The file is missing or truncated, or holds something other than tensors.
    """
    label = f"{str(path)!r}"
    try:
        file = OpenFile(path, label)
    except OSError as exc:
        raise_if_resource(exc, f"{label} cannot be read")
        raise SourceError(f"{label} cannot be read: {exc}.") from exc
    with _stream(file) as stream, archive_in(stream) as archive:
        if archive is not None:
            _require_readable(archive, label)
            require_bounded(archive, file.size, label)
        lazy = None if archive is None else _load_without_data(file, archive)
    state = flattened(_load(file, label, "cpu"), label) if lazy is None else lazy
    _require_state_dict(state, label)
    if lazy is not None:
        return TorchFile(file, lazy, label)
    file.require_unchanged()  # the last chance: nothing is read from the file any more
    return LoadedTorchFile(file, state, label)


class TorchFile:
    """A source of a state_dict in a zip file. Tensors are read on demand."""

    def __init__(self, file: OpenFile, state: Mapping[str, Any], description: str) -> None:
        """Create a source.

        Args:
            file: The open file.
            state: Content of the file, flat, with tensors on the device ``meta``.
            description: Label for reports and messages.
        """
        self.description = description
        self._file, self._state = file, state
        self._names = TensorMap(state).names()

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""
        return self._names

    def info(self, fqn: str) -> TensorInfo:
        """Return dtype and shape, from the pickle in the file."""
        value = self._state[fqn]
        if _offset(value) is None:
            return describe_tensor(value)
        dtype = dtype_name(value.dtype)
        unusable = unusable_dtype(dtype)
        return TensorInfo(dtype=dtype, shape=tuple(value.shape), unusable=unusable)

    def get(self, fqn: str) -> torch.Tensor:
        """Return the tensor on the CPU, with the strides that it was saved with.

        Raises:
            KeyError: The file has no such name.
            SourceError: The entry is unusable, or the file was changed or cannot be read.
        """
        value, unusable = self._state[fqn], self.info(fqn).unusable
        offset = _offset(value)
        if offset is None or unusable:
            raise SourceError(f"{self.description}: {fqn!r} is {unusable}.")
        size = value.itemsize
        raw = self._file.read(offset + value.storage_offset() * size, _extent(value) * size)
        flat = raw.view(value.dtype)
        if value.is_conj():
            flat = flat.conj()
        if value.is_neg():
            flat = torch._neg_view(flat)  # noqa: SLF001 - torch has no public function for it
        return flat.as_strided(value.shape, value.stride())

    def ties(self) -> Collection[tuple[str, ...]]:
        """Return names that share bytes in the file; see ``refitkit.protocols.KnowsTies``."""
        classes: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for name in self._names:
            value, offset = self._state[name], _offset(self._state[name])
            if offset is not None and value.numel():
                first = offset + value.storage_offset() * value.itemsize
                bits = value.is_conj(), value.is_neg()
                classes[(first, value.dtype, value.shape, value.stride(), bits)].append(name)
        return [tuple(names) for names in classes.values() if len(names) > 1]

    def pieces(self, fqn: str, into: torch.Tensor | None = None) -> Iterator[torch.Tensor] | None:
        """Return pieces of a contiguous entry; see ``refitkit.protocols.GivesPieces``."""
        value, start = self._state[fqn], self._start_of(fqn)
        if start is None or (into is None and value.nbytes < LARGE):
            return None
        return self._file.pieces(start, value.nbytes, value.dtype, into)

    def has_bits(self, fqn: str, tensor: torch.Tensor) -> bool | None:
        """Compare digests; see ``refitkit.protocols.KnowsBits``."""
        value, start = self._state[fqn], self._start_of(fqn)
        if start is None or tensor.dtype != value.dtype or tensor.nbytes != value.nbytes:
            return None
        return self._file.has_bits(start, tensor)

    def _start_of(self, fqn: str) -> int | None:
        """Return where the bytes of a contiguous entry begin; None if it lies in another way."""
        value, offset = self._state[fqn], _offset(self._state[fqn])
        if offset is None or not value.is_contiguous():
            return None
        if value.is_conj() or value.is_neg() or unusable_dtype(dtype_name(value.dtype)):
            return None
        return int(offset + value.storage_offset() * value.itemsize)

    def require_unchanged(self) -> None:
        """Check that the file was not changed; see ``refitkit.protocols.MayChange``."""
        self._file.require_unchanged()

    def reread(self) -> None:
        """Compare digests with a second read; see ``refitkit.protocols.SupportsReread``."""
        self._file.reread()


class LoadedTorchFile(TensorMap):
    """A source of a state_dict that was read as a whole.

    Later changes of the file do not matter, so it has no ``require_unchanged``.
    """

    def __init__(self, file: OpenFile, state: Mapping[str, Any], description: str) -> None:
        """Create a source.

        Args:
            file: The open file, for ``reread``.
            state: Content of the file, flat.
            description: Label for reports and messages.
        """
        super().__init__(state, description)
        self._file = file

    def reread(self) -> None:
        """Compare digests with a second read; see ``refitkit.protocols.SupportsReread``."""
        self._file.reread()


# -- what may be read -------------------------------------------------------------------------


@contextmanager
def archive_in(stream: IO[bytes]) -> Iterator[zipfile.ZipFile | None]:
    """Yield a stream as a zip file; None if it is not one, or is damaged.

    ``torch.load`` then says what is wrong.
    """
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(stream))
        except Exception as exc:  # noqa: BLE001 - a damaged file may raise anything
            raise_if_resource(exc, "The file cannot be read")
            archive = None
        yield archive


def require_bounded(archive: zipfile.ZipFile, size: int, label: str) -> None:
    """Check that a file does not unpack to far more bytes than it has, before anything is unpacked.

    Records can be compressed, by deflate to a thousandth, and several can share their bytes.

    Args:
        archive: The file as a zip file.
        size: Size of the file in bytes.
        label: Label of the file for the error.

    Raises:
        SourceError: The file would unpack to more. The error has both sizes.
    """
    limit = max(_ALWAYS_ALLOWED, _MAX_GROWTH * size)
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > limit:
        problem = Problem("records", "unpacked", f"{unpacked} bytes", f"at most {limit}")
        message = f"{label} has {size} bytes, and its records would unpack to {unpacked}."
        hint = "If you trust the file, load it with torch.load and pass its tensors."
        raise SourceError(message, problems=[problem], hint=hint)


def _require_readable(archive: zipfile.ZipFile, label: str) -> None:
    """Check that torch reads all records.

    Torch 2.14 does not read a record whose two sizes differ, or that is a folder by its attributes.
    It returns uninitialized memory instead of raising.

    Raises:
        SourceError: Torch does not read some records. The error lists them.
    """
    problems = [
        Problem(entry.filename, "damaged", f"{entry.compress_size} bytes of {entry.file_size}")
        for entry in archive.infolist()
        if entry.compress_type == zipfile.ZIP_STORED
        and not entry.filename.endswith("/")  # is_dir() raises for an empty name
        and (entry.compress_size != entry.file_size or entry.external_attr & _FOLDER)
    ]
    if problems:
        raise SourceError(f"{label} is a damaged zip file.", problems=problems, hint=_WHOLE_HINT)


def _require_state_dict(state: Any, label: str) -> None:
    """Check that the content of a file is a mapping from names to tensors.

    Raises:
        SourceError: It is not. The error lists all other entries.
    """
    if not isinstance(state, Mapping):
        raise SourceError(f"{label} holds a {type(state).__name__}, not a state_dict.")
    problems = [
        Problem(str(name), "not a tensor", _text(value))
        for name, value in state.items()
        if not isinstance(name, str)
        or (not isinstance(value, torch.Tensor) and name.rpartition(".")[2] != "_extra_state")
    ]
    if problems:
        message = f"{label} holds more than the tensors of a state_dict."
        raise SourceError(message, problems=problems)


def _text(value: object) -> str:
    size = f" of {len(value)} entries" if isinstance(value, Mapping) else ""
    return f"a {type(value).__name__}{size}"


# -- loading ----------------------------------------------------------------------------------


def _load(file: OpenFile, label: str, device: str) -> Any:
    """Load a file with ``torch.load``.

    Raises:
        SourceError: Torch cannot load it, or it holds more than tensors.
    """
    try:
        with _stream(file) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old formats, which are valid
            return torch.load(stream, map_location=device, weights_only=True, mmap=False)
    except pickle.UnpicklingError as exc:
        raise_if_resource(exc, f"{label} cannot be read")
        if not _is_torch_file(file):
            raise SourceError(f"{label} is not a file of torch.save.", hint=_WHOLE_HINT) from exc
        message = f"{label} holds more than tensors, and refitkit runs no code from files"
        found = _NOT_ALLOWED.search(str(exc))
        if found is None:
            reason = str(exc).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
            raise SourceError(f"{message}: {reason.strip(' .')}.", hint=_SAVE_HINT) from exc
        hint = f"{_SAVE_HINT} If you trust it: torch.serialization.add_safe_globals([{found[1]}])."
        raise SourceError(f"{message}: it has {found[1]}.", hint=hint) from exc
    except Exception as exc:
        # weights_only runs no code of the file, so any exception means that it cannot be read.
        raise_if_resource(exc, f"{label} cannot be read")
        if not _is_torch_file(file):
            raise SourceError(f"{label} is not a file of torch.save.", hint=_WHOLE_HINT) from exc
        why = str(exc) or type(exc).__name__
        raise SourceError(
            f"{label} cannot be read with torch.load: {why}.", hint=_SAVE_HINT
        ) from exc


def _is_torch_file(file: OpenFile) -> bool:
    """Return whether a file begins as a zip file, a pickle or a tar file: torch wrote all three."""
    with _stream(file) as stream:
        start = stream.read(_TAR_MARK + 5)
    return start[:2] == b"PK" or start[:1] == b"\x80" or start[_TAR_MARK:] == b"ustar"


def _stream(file: OpenFile) -> IO[bytes]:
    """Return a new stream at the beginning of a file."""
    return io.BufferedReader(FileStream(file), _READ_AHEAD)


def _load_without_data(file: OpenFile, archive: zipfile.ZipFile) -> Any:
    """Return the content of a file, flat, with tensors on the device ``meta``.

    Returns:
        None if the file must be read as a whole: torch's offsets cannot be trusted, or some tensors
        have none.
    """
    try:
        records = _records(file, archive)
        if records is None or not _storages_are_in_order(archive):
            return None
        content = flattened(_load(file, "", "meta"), "")
    except Exception as exc:  # noqa: BLE001 - reading it as a whole reports what is wrong
        raise_if_resource(exc, "The file cannot be read")
        return None
    values = content.values() if isinstance(content, Mapping) else ()
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return content if all(_is_in_record(value, records) for value in tensors) else None


def _records(file: OpenFile, archive: zipfile.ZipFile) -> dict[int, int] | None:
    """Return the size of each record by the offset at which its data begins.

    Returns:
        None if some bytes are not those of storages: records are compressed or encrypted, or have
        the byte order of another machine.
    """
    records: dict[int, int] = {}
    names = {entry.filename.rpartition("/")[2] for entry in archive.infolist()}
    # Without a byteorder record torch 2.14 would swap the bytes of meta tensors, and crash.
    if "byteorder" not in names and torch.serialization.get_default_load_endianness() is not None:
        return None
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
            return None
        if entry.filename.rpartition("/")[2] == "byteorder":
            order = archive.read(entry).decode()
            if order != sys.byteorder:
                return None
        # The central directory does not say where data begins: the local header has an extra field
        # of its own length.
        header = bytes(file.read(entry.header_offset, _LOCAL_HEADER).tolist())
        if not header.startswith(_SIGNATURE):
            return None  # the file is damaged, and torch.load reports it
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:], "little")
        records[entry.header_offset + _LOCAL_HEADER + lengths] = entry.file_size
    return records


def _storages_are_in_order(archive: zipfile.ZipFile) -> bool:
    """Return whether storages lie in the order in which the pickle refers to them, without gaps.

    Without data, torch does not look up the offset of a storage. It adds up sizes in the order of
    the pickle (``_get_offset`` in ``torch/serialization.py``). In a file that another tool wrote,
    the sum may be the offset of another storage.
    """
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    names = [entry.filename.partition("/")[2] for entry in entries]
    (pickled,) = (entry for entry, name in zip(entries, names, strict=True) if name == "data.pkl")
    storages = [name for name in names if name.startswith("data/")]
    return storages == [f"data/{key}" for key in _storage_keys(archive.read(pickled))]


def _storage_keys(pickled: bytes) -> list[str]:
    """Return keys of storages in the order in which a pickle first refers to them.

    The pickle is parsed, not run. A reference is ``("storage", type, key, location, number of
    elements)``, as ``persistent_id`` in ``torch/serialization.py`` writes it.

    Raises:
        ValueError: A reference has another form.
    """
    # The stack need not be exact: only the tuple before BINPERSID is read, and torch's
    # pickler pushes its five items right before, from constants or from the memo.
    pushed: list[Any] = []
    memo: dict[Any, Any] = {}
    found: dict[str, None] = {}
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in {"BINPUT", "LONG_BINPUT"}:
            memo[argument] = pushed[-1] if pushed else None
        elif opcode.name in {"BINGET", "LONG_BINGET"}:
            pushed.append(memo[argument])
        elif opcode.name == "BINPERSID":
            kind, _, key, _, _ = pushed[-6:-1]
            if kind != "storage" or not isinstance(key, str):
                raise ValueError("a reference to a storage has an unknown form")
            found[key] = None
        else:
            pushed.append(argument if opcode.stack_after else None)
    return list(found)


def _is_in_record(value: torch.Tensor, records: Mapping[int, int]) -> bool:
    """Return whether a tensor without data lies in one record of the file."""
    if value.layout is not torch.strided or value.is_nested:
        return False
    offset = _offset(value)
    end = (value.storage_offset() + _extent(value)) * value.itemsize
    return offset is not None and bool(end <= records.get(offset, -1))


def _offset(value: Any) -> int | None:
    """Return the offset of a tensor's storage in its file; None for any other value."""
    if not isinstance(value, torch.Tensor) or not value.is_meta:
        return None
    offset = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    return None if offset is None else int(offset)


def _extent(value: torch.Tensor) -> int:
    """Return the number of elements in a storage from a tensor's first to its last."""
    if not value.numel():
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
