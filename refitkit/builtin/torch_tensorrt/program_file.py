"""Files of ``torch_tensorrt.save``: what they hold, found out without loading them.

Such a file is a package of ``torch.export.save``: an uncompressed zip archive in whose one folder
lie the graph (``models/NAME.json``), tensors as raw bytes (``data/weights``, ``data/constants``),
the engines, each a pickle of its own (``data/constants/opaque_obj_0``; of the C++ runtime of 2.11
and 2.12 ``custom_obj_0``, which C++ reads), and what users add (``extra``).

Loading one runs code of whoever made it. torch unpickles without restrictions, evaluates symbolic
sizes and guards, and calls whatever below ``torch`` the graph names
(``torch/export/pt2_archive/_package.py``, ``torch/_export/serde/serialize.py`` of 2.14); TensorRT
deserializes the engines. ``ProgramFile.check`` refuses all pickles but those that upstream writes,
and so keeps out damage and the plainest of attacks, no more.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from refitkit.builtin.torch_tensorrt.children import EngineInfo, parse_info
from refitkit.builtin.torch_tensorrt.metadata import Metadata, read_metadata
from refitkit.errors import UnsupportedTargetError, raise_if_resource
from refitkit.files.plain_pickle import Instance, PickleRefusedError, read_pickle
from refitkit.recipe import Archive, ArchiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

T = TypeVar("T")

ATTACHMENTS = "refitkit/attachments/"
"""Prefix of the extra files that refitkit adds; their content is in base64."""

_ZIP_MAGIC = b"PK"
_TEXT_LIMIT = 1 << 28
_MEMBER_LIMIT = 1 << 36
_DAMAGES = (ArchiveError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
_EXTRA = "/extra/" + ATTACHMENTS
_CONSTANTS = "/data/constants/"
_OPERATOR = b"torch.ops.tensorrt."
_AOTINDUCTOR = "/data/aotinductor/"
_MADE_BY = ("torch_tensorrt.dynamo.runtime._TRTEngine", "_reconstruct_trt_engine")


class ProgramFile:
    """A file of ``torch_tensorrt.save``, open for reading."""

    def __init__(self, archive: Archive, path: Path) -> None:
        """Made by ``open_program_file``."""
        self._archive = archive
        self._path = path

    def attachments(self) -> Mapping[str, bytes]:
        """What refitkit keeps in it, by name."""
        found = {}
        for name in self._archive.names():
            _, marker, key = name.partition(_EXTRA)
            if marker:
                found[key] = self._decoded(name)
        return found

    def engines(self) -> Mapping[str, tuple[EngineInfo, Metadata]]:
        """Its engines by name; those of the C++ runtime of 2.11 and 2.12 are left out.

        Raises:
            UnsupportedTargetError: A pickle in it is not upstream's.
        """
        found = {}
        for name, path, _ in self._payload(_CONSTANTS):
            if "opaque_obj_" in path:
                found[name.removesuffix("_engine").removesuffix(".engine")] = self._engine(path)
        return found

    def check(self) -> None:
        """Check every pickle that loading the file would run.

        Raises:
            UnsupportedTargetError: One is not what upstream writes.
        """
        self.engines()
        for path in self._pickles():
            self._check_tensors(path)

    def _pickles(self) -> Iterator[str]:
        """Members that torch reads with ``torch.load``."""
        for folder in (_CONSTANTS, "/data/weights/"):
            for _, path, pickled in self._payload(folder):
                if pickled and "custom_obj_" not in path and "opaque_obj_" not in path:
                    yield path
        yield from (name for name in self._archive.names() if name.endswith(".pt"))

    def _payload(self, folder: str) -> Iterator[tuple[str, str, bool]]:
        """Name, member, and whether it is a pickle, of all that a folder's list tells of."""
        for name in self._archive.names():
            root, found, rest = name.partition(folder)
            if not (found and rest.endswith("_config.json")):
                continue
            for key, entry in self._json(name)["config"].items():
                yield key, f"{root}{folder}{entry['path_name']}", bool(entry["use_pickle"])

    def _json(self, member: str) -> Any:
        return json.loads(self._archive.read(member, _TEXT_LIMIT))

    def _engine(self, member: str) -> tuple[EngineInfo, Metadata]:
        data = self._archive.read(member, _MEMBER_LIMIT)
        try:
            made = read_pickle(data, {_MADE_BY})
        except PickleRefusedError as exc:
            raise self._refused(member, str(exc)) from exc
        call = isinstance(made, Instance) and not made.kwargs and made.state is None
        if not (call and len(made.args) == 1 and isinstance(made.args[0], list)):
            raise self._refused(member, "it is no engine")
        info = parse_info(made.args[0], member)
        return info, read_metadata(info.metadata, member)

    def _check_tensors(self, member: str) -> None:
        data = self._archive.read(member, _MEMBER_LIMIT)
        if not data:
            return
        try:
            torch.load(io.BytesIO(data), weights_only=True, map_location="meta")
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as exc:
            raise_if_resource(exc, f"{str(self._path)!r} cannot be read")
            text = str(exc).partition("\n")[0]
            raise self._refused(member, f"it holds more than tensors: {text}") from exc

    def _decoded(self, member: str) -> bytes:
        try:
            return base64.b64decode(self._archive.read(member, _MEMBER_LIMIT), validate=True)
        except (binascii.Error, ValueError) as exc:
            raise ArchiveError(f"member {member!r} is damaged: {exc}") from exc

    def _refused(self, member: str, why: str) -> UnsupportedTargetError:
        return UnsupportedTargetError(
            f"{str(self._path)!r} is refused: its member {member!r}: {why}.",
            hint="Nothing of it was run. Do not load it with torch either, unless you trust "
            "whoever made it.",
        )


def is_program_file(archive: Archive) -> bool:
    """Whether an archive holds a program with engines of Torch-TensorRT."""
    names = list(archive.names())
    if any(_AOTINDUCTOR in name for name in names):
        return False
    models = [name for name in names if "/models/" in name and name.endswith(".json")]
    return any(_OPERATOR in archive.read(name, _TEXT_LIMIT) for name in models)


def read_program_file(path: Path, reader: Callable[[ProgramFile], T]) -> T | None:
    """What ``reader`` makes of a file of this kind; None where it is of another.

    Raises:
        UnsupportedTargetError: It is of this kind, and damaged.
    """
    with path.open("rb") as file:
        if file.read(2) != _ZIP_MAGIC:
            return None
    try:
        with Archive(path) as archive:
            return reader(ProgramFile(archive, path)) if is_program_file(archive) else None
    except _DAMAGES as exc:
        raise UnsupportedTargetError(f"{str(path)!r} is damaged: {exc}") from exc


def extra_files(attachments: Mapping[str, bytes]) -> dict[str, str]:
    """Attachments in the form that ``torch.export.save`` takes."""
    return {
        f"{ATTACHMENTS}{name}": base64.b64encode(data).decode()
        for name, data in attachments.items()
    }
