"""Weights in what ``torch.save`` wrote of a state_dict, or of a dictionary with some in it.

Since torch 1.6 that is a zip file whose records are the bytes of storages, and a pickle, which
``torch.load`` reads with ``weights_only=True``: nothing in it is run. It is loaded without data
(``map_location="meta"``), where each storage is told its place in the file (``_checkpoint_offset``;
``torch/serialization.py``, 2.11 to 2.14). torch can map the file, too, but see ``reading``.
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

_BUFFER = 512
"""Bytes that a stream reads ahead: headers and pickles are short, and tensors are not wanted."""

_LOCAL_HEADER = 30
"""Bytes before the name of a record, the last four of which are two lengths (APPNOTE, 4.3.7)."""
_SIGNATURE = b"PK\3\4"
_ENCRYPTED, _FOLDER = 0x1, 0x10

_TAR_MARK = 257
"""Where a tar file says that it is one (POSIX, ``ustar`` interchange format)."""

_GROWTH, _ALWAYS = 64, 1 << 26
"""The most bytes that all records may unpack to: times the size of the file, or this many.

Weights shrink to a half at the most, and weights of which all but a few are zeros to a fiftieth.
"""

_WHOLE = "Check that it was written or downloaded completely, and is no pointer to a file."
_NOT_ALLOWED = re.compile(r"GLOBAL (\S+) was not an allowed global")
"""How torch names a class or function that it does not use for a file."""
_HINT = "Save tensors alone: torch.save(model.state_dict(), path), or use safetensors."


def open_torch_file(path: Path) -> WeightSource:
    """Open it.

    Files older than torch 1.6, and those with tensors of kinds that cannot be loaded without data
    (sparse and quantized ones), are read as a whole.

    Raises:
        SourceError: It is missing, truncated or holds something else.
    """
    what = f"{str(path)!r}"
    try:
        file = OpenFile(path, what)
    except OSError as exc:
        raise_if_resource(exc, f"{what} cannot be read")
        raise SourceError(f"{what} cannot be read: {exc}.") from exc
    with _stream(file) as stream, archive_in(stream) as archive:
        if archive is not None:
            _require_readable(archive, what)
            require_bounded(archive, file.size, what)
        placed = None if archive is None else _without_data(file, archive)
    state = flattened(_load(file, what, "cpu"), what) if placed is None else placed
    _require_state_dict(state, what)
    if placed is not None:
        return TorchFile(file, placed, what)
    file.require_unchanged()  # nothing is read from it any more
    return LoadedTorchFile(file, state, what)


class LoadedTorchFile(TensorMap):
    """A state_dict that was read as a whole. Nobody asks any more whether the file is unchanged."""

    def __init__(self, file: OpenFile, state: Mapping[str, Any], description: str) -> None:
        """Keep the tensors, and the file for ``reread``."""
        super().__init__(state, description)
        self._file = file

    def reread(self) -> None:
        """See ``refitkit.protocols.SupportsReread``."""
        self._file.reread()


class TorchFile:
    """A state_dict in a zip file; tensors are read on demand."""

    def __init__(self, file: OpenFile, state: Mapping[str, Any], description: str) -> None:
        """Keep the file, and its state_dict without data."""
        self.description = description
        self._file, self._state = file, state
        self._names = TensorMap(state).names()

    def names(self) -> Collection[str]:
        """All names."""
        return self._names

    def info(self, fqn: str) -> TensorInfo:
        """Dtype and shape, as the file says."""
        value = self._state[fqn]
        if _place(value) is None:
            return describe_tensor(value)
        dtype = dtype_name(value.dtype)
        unusable = unusable_dtype(dtype)
        return TensorInfo(dtype=dtype, shape=tuple(value.shape), unusable=unusable)

    def get(self, fqn: str) -> torch.Tensor:
        """The tensor, on the CPU, in memory of its own, with the strides that it was saved with."""
        value, place, unusable = self._state[fqn], _place(self._state[fqn]), self.info(fqn).unusable
        if place is None or unusable:
            raise SourceError(f"{self.description}: {fqn!r} is {unusable}.")
        size = value.itemsize
        raw = self._file.read(place + value.storage_offset() * size, _extent(value) * size)
        flat = raw.view(value.dtype)
        if value.is_conj():
            flat = flat.conj()
        if value.is_neg():
            flat = torch._neg_view(flat)  # noqa: SLF001 - there is no other way
        return flat.as_strided(value.shape, value.stride())

    def ties(self) -> Collection[tuple[str, ...]]:
        """Names that the file has one piece of data for; see ``refitkit.protocols.KnowsTies``."""
        classes: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for name in self._names:
            value, place = self._state[name], _place(self._state[name])
            if place is not None and value.numel():
                first = place + value.storage_offset() * value.itemsize
                bits = value.is_conj(), value.is_neg()
                classes[(first, value.dtype, value.shape, value.stride(), bits)].append(name)
        return [tuple(names) for names in classes.values() if len(names) > 1]

    def pieces(self, fqn: str) -> Iterator[torch.Tensor] | None:
        """See ``refitkit.protocols.GivesPieces``."""
        value, place = self._state[fqn], _place(self._state[fqn])
        if place is None or value.nbytes < LARGE or not value.is_contiguous():
            return None
        if value.is_conj() or value.is_neg() or unusable_dtype(dtype_name(value.dtype)):
            return None
        start = place + value.storage_offset() * value.itemsize
        return self._file.pieces(start, value.nbytes, value.dtype)

    def require_unchanged(self) -> None:
        """See ``refitkit.protocols.MayChange``."""
        self._file.require_unchanged()

    def reread(self) -> None:
        """See ``refitkit.protocols.SupportsReread``."""
        self._file.reread()


@contextmanager
def archive_in(stream: IO[bytes]) -> Iterator[zipfile.ZipFile | None]:
    """A file as a zip file; None where it is none, or damaged, as torch.load will say."""
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(stream))
        except Exception as exc:  # noqa: BLE001 - damaged ones raise anything
            raise_if_resource(exc, "The file cannot be read")
            archive = None
        yield archive


def _without_data(file: OpenFile, archive: zipfile.ZipFile) -> Any:
    """What a file holds, flat, on the device ``meta``; None where it has to be read as a whole."""
    try:
        records = _records(file, archive)
        if records is None or not _lie_in_order(archive):
            return None
        found = flattened(_load(file, "", "meta"), "")
    except Exception as exc:  # noqa: BLE001 - who reads all of it will say what is wrong
        raise_if_resource(exc, "The file cannot be read")
        return None
    values = found.values() if isinstance(found, Mapping) else ()
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return found if all(_is_at(value, records) for value in tensors) else None


def _require_readable(archive: zipfile.ZipFile, what: str) -> None:
    """Refuse records that torch does not read, and for which it gives what memory happens to hold.

    Those are of two sizes, or folders by their attributes (seen with 2.14).

    Raises:
        SourceError: There are some; lists them.
    """
    problems = [
        Problem(entry.filename, "damaged", f"{entry.compress_size} bytes of {entry.file_size}")
        for entry in archive.infolist()
        if entry.compress_type == zipfile.ZIP_STORED
        and not entry.filename.endswith("/")  # is_dir() fails of no name
        and (entry.compress_size != entry.file_size or entry.external_attr & _FOLDER)
    ]
    if problems:
        raise SourceError(f"{what} is a damaged zip file.", problems=problems, hint=_WHOLE)


def require_bounded(archive: zipfile.ZipFile, size: int, what: str) -> None:
    """Refuse a file that would take far more memory than it has bytes, before any is unpacked.

    Records can be compressed, a thousand times by deflate, and several can share their bytes.

    Raises:
        SourceError: It would; says how much.
    """
    unpacked, most = sum(e.file_size for e in archive.infolist()), max(_ALWAYS, _GROWTH * size)
    if unpacked > most:
        problem = Problem("records", "unpacked", f"{unpacked} bytes", f"at most {most}")
        message = f"{what} has {size} bytes, and its records would unpack to {unpacked}."
        hint = "If you trust the file, load it with torch.load and pass its tensors."
        raise SourceError(message, problems=[problem], hint=hint)


def _records(file: OpenFile, archive: zipfile.ZipFile) -> dict[int, int] | None:
    """Bytes of records by the places where they begin; None where those are not storages' own.

    Records may be compressed, or of a machine that has the bytes of a number the other way round.
    """
    records: dict[int, int] = {}
    told = {entry.filename.rpartition("/")[2] for entry in archive.infolist()}
    if "byteorder" not in told and torch.serialization.get_default_load_endianness() is not None:
        return None  # torch would turn bytes round that are not there, and crash (2.14)
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
            return None
        if entry.filename.rpartition("/")[2] == "byteorder":
            order = archive.read(entry).decode()
            if order != sys.byteorder:
                return None
        header = bytes(file.read(entry.header_offset, _LOCAL_HEADER).tolist())
        if not header.startswith(_SIGNATURE):
            return None  # it is damaged, as torch will say
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:], "little")
        records[entry.header_offset + _LOCAL_HEADER + lengths] = entry.file_size
    return records


def _lie_in_order(archive: zipfile.ZipFile) -> bool:
    """Whether storages lie in the order in which the pickle asks for them, and nothing between.

    torch does not look their places up without data, but counts them up in that order
    (``_get_offset`` in ``torch/serialization.py``): of a file that another tool has put together
    that may be another storage's place.
    """
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    names = [entry.filename.partition("/")[2] for entry in entries]
    (pickled,) = (entry for entry, name in zip(entries, names, strict=True) if name == "data.pkl")
    storages = [name for name in names if name.startswith("data/")]
    return storages == [f"data/{key}" for key in _keys(archive.read(pickled))]


def _keys(pickled: bytes) -> list[str]:
    """Keys of storages in the order in which a pickle first asks for them; nothing is run.

    They are the third of five in ``("storage", type, key, location, number of elements)``, as
    ``persistent_id`` in ``torch/serialization.py`` writes it.

    Raises:
        ValueError: It does not ask as torch's do.
    """
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
                raise ValueError("a storage is asked for in another way")
            found[key] = None
        else:
            pushed.append(argument if opcode.stack_after else None)
    return list(found)


def _is_at(value: torch.Tensor, records: Mapping[int, int]) -> bool:
    """Whether a tensor without data is one of the file's."""
    if value.layout is not torch.strided or value.is_nested:
        return False
    place = _place(value)
    last = (value.storage_offset() + _extent(value)) * value.itemsize
    return place is not None and bool(last <= records.get(place, -1))


def _place(value: Any) -> int | None:
    """Where the bytes of a tensor's storage begin; None for what is no tensor or has no data."""
    if not isinstance(value, torch.Tensor) or not value.is_meta:
        return None
    place = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    return None if place is None else int(place)


def _extent(value: torch.Tensor) -> int:
    """Elements from the first to the last of a tensor in its storage."""
    if not value.numel():
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))


def _load(file: OpenFile, what: str, device: str) -> Any:
    try:
        with _stream(file) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the file's age, which is no fault
            return torch.load(stream, map_location=device, weights_only=True, mmap=False)
    except pickle.UnpicklingError as exc:
        raise_if_resource(exc, f"{what} cannot be read")
        if not _is_torchs(file):
            raise SourceError(f"{what} is no file of torch.save.", hint=_WHOLE) from exc
        message = f"{what} holds more than tensors, and refitkit runs no code from files"
        found = _NOT_ALLOWED.search(str(exc))
        if found is None:
            said = str(exc).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
            raise SourceError(f"{message}: {said.strip(' .')}.", hint=_HINT) from exc
        hint = f"{_HINT} If you trust it: torch.serialization.add_safe_globals([{found[1]}])."
        raise SourceError(f"{message}: it has {found[1]}.", hint=hint) from exc
    except Exception as exc:  # no code of the file runs: whatever is raised, it cannot be read
        raise_if_resource(exc, f"{what} cannot be read")
        if not _is_torchs(file):
            raise SourceError(f"{what} is no file of torch.save.", hint=_WHOLE) from exc
        why = str(exc) or type(exc).__name__
        raise SourceError(f"{what} cannot be read with torch.load: {why}.", hint=_HINT) from exc


def _is_torchs(file: OpenFile) -> bool:
    """Whether it begins as a zip file, a pickle or a tar file does: all that torch ever wrote."""
    with _stream(file) as stream:
        start = stream.read(_TAR_MARK + 5)
    return start[:2] == b"PK" or start[:1] == b"\x80" or start[_TAR_MARK:] == b"ustar"


def _stream(file: OpenFile) -> IO[bytes]:
    """The open file as a stream from its beginning."""
    return io.BufferedReader(FileStream(file), _BUFFER)


def _require_state_dict(state: Any, what: str) -> None:
    if not isinstance(state, Mapping):
        raise SourceError(f"{what} holds a {type(state).__name__}, not a state_dict.")
    problems = [
        Problem(str(name), "not a tensor", _shown(value))
        for name, value in state.items()
        if not isinstance(name, str)
        or (not isinstance(value, torch.Tensor) and name.rpartition(".")[2] != "_extra_state")
    ]
    if problems:
        message = f"{what} holds more than the tensors of a state_dict."
        raise SourceError(message, problems=problems)


def _shown(value: object) -> str:
    size = f" of {len(value)} entries" if isinstance(value, Mapping) else ""
    return f"a {type(value).__name__}{size}"
