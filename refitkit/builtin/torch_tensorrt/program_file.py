"""Reads files of ``torch_tensorrt.save`` without loading them.

The format is the package of ``torch.export.save``, an uncompressed zip archive with one top folder:

* ``models/NAME.json``: the graph;
* ``data/weights`` and ``data/constants``: tensors as raw bytes;
* ``data/constants/opaque_obj_0`` and so on: engines, one pickle each. The C++ runtime of 2.11 and
  2.12 writes ``custom_obj_0`` instead, a format that only C++ code reads;
* ``extra``: files that users add.

Loading a file can run code that its author chose. torch unpickles without restrictions, evaluates
symbolic sizes and guards, and calls any function below ``torch`` that the graph names
(``torch/export/pt2_archive/_package.py``, ``torch/_export/serde/serialize.py`` of 2.14). TensorRT
deserializes the engines. ``ProgramFile.check`` refuses pickles that upstream does not write. This
keeps out damaged files and simple attacks, and nothing more.
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
"""Prefix of the extra files that refitkit adds; their content is base64 text."""

_ZIP_MAGIC = b"PK"
_MAX_TEXT_SIZE = 1 << 28
_MAX_MEMBER_SIZE = 1 << 36
_MALFORMED = (ArchiveError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
_ATTACHMENT_FOLDER = "/extra/" + ATTACHMENTS
_CONSTANTS = "/data/constants/"
_OPERATOR_NAMESPACE = b"torch.ops.tensorrt."
_AOTINDUCTOR = "/data/aotinductor/"
_RECONSTRUCT = ("torch_tensorrt.dynamo.runtime._TRTEngine", "_reconstruct_trt_engine")


class ProgramFile:
    """A file of ``torch_tensorrt.save``, open for reading."""

    def __init__(self, archive: Archive, path: Path) -> None:
        """Use ``read_program_file`` instead.

        Args:
            archive: The open archive.
            path: Path of the archive, for error messages.
        """
        self._archive = archive
        self._path = path

    def attachments(self) -> Mapping[str, bytes]:
        """The attachments that refitkit added, by name.

        Raises:
            ArchiveError: An attachment is damaged.
        """
        found = {}
        for name in self._archive.names():
            _, marker, key = name.partition(_ATTACHMENT_FOLDER)
            if marker:
                found[key] = self._decoded(name)
        return found

    def engines(self) -> Mapping[str, tuple[EngineInfo, Metadata]]:
        """The engines with their metadata, by name.

        Engines of the C++ runtime of 2.11 and 2.12 are left out, because Python cannot read them.

        Raises:
            UnsupportedTargetError: An engine is a pickle that upstream does not write.
        """
        found = {}
        for name, path, _ in self._payload(_CONSTANTS):
            if "opaque_obj_" in path:
                # the same names that ``targets`` gives to the engines of the loaded program
                found[name.removesuffix("_engine").removesuffix(".engine")] = self._engine(path)
        return found

    def check(self) -> None:
        """Check every pickle that loading the file would run.

        Raises:
            UnsupportedTargetError: Upstream does not write such a pickle.
        """
        self.engines()
        for path in self._pickles():
            self._check_tensors(path)

    def _pickles(self) -> Iterator[str]:
        """Names of the members that torch reads with ``torch.load``."""
        for folder in (_CONSTANTS, "/data/weights/"):
            for _, path, pickled in self._payload(folder):
                # ``_engine`` checks opaque objects, and only C++ code reads custom ones
                if pickled and "custom_obj_" not in path and "opaque_obj_" not in path:
                    yield path
        # example inputs, and the weights of older formats
        yield from (name for name in self._archive.names() if name.endswith(".pt"))

    def _payload(self, folder: str) -> Iterator[tuple[str, str, bool]]:
        """Name, member, and whether it is a pickle, for each entry of a folder's config file."""
        for name in self._archive.names():
            root, found, rest = name.partition(folder)
            if not (found and rest.endswith("_config.json")):
                continue
            for key, entry in self._json(name)["config"].items():
                yield key, f"{root}{folder}{entry['path_name']}", bool(entry["use_pickle"])

    def _json(self, member: str) -> Any:
        return json.loads(self._archive.read(member, _MAX_TEXT_SIZE))

    def _engine(self, member: str) -> tuple[EngineInfo, Metadata]:
        data = self._archive.read(member, _MAX_MEMBER_SIZE)
        try:
            call = read_pickle(data, {_RECONSTRUCT})
        except PickleRefusedError as exc:
            raise self._refused(member, str(exc)) from exc
        plain = isinstance(call, Instance) and not call.kwargs and call.state is None
        if not (plain and len(call.args) == 1 and isinstance(call.args[0], list)):
            raise self._refused(member, "it does not contain an engine")
        info = parse_info(call.args[0], member)
        return info, read_metadata(info.metadata, member)

    def _check_tensors(self, member: str) -> None:
        data = self._archive.read(member, _MAX_MEMBER_SIZE)
        if not data:  # torch writes no bytes for a tensor without data (``_package.py``)
            return
        try:
            # ``weights_only`` admits only tensors, and the meta device needs no memory for them
            torch.load(io.BytesIO(data), weights_only=True, map_location="meta")
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as exc:
            raise_if_resource(exc, f"{str(self._path)!r} cannot be read")
            text = str(exc).partition("\n")[0]
            raise self._refused(member, f"it contains more than tensors: {text}") from exc

    def _decoded(self, member: str) -> bytes:
        try:
            return base64.b64decode(self._archive.read(member, _MAX_MEMBER_SIZE), validate=True)
        except (binascii.Error, ValueError) as exc:
            raise ArchiveError(f"member {member!r} is damaged: {exc}") from exc

    def _refused(self, member: str, why: str) -> UnsupportedTargetError:
        return UnsupportedTargetError(
            f"{str(self._path)!r} is refused because of its member {member!r}: {why}.",
            hint="No code in the file was run. Load the file with torch only if you trust its "
            "author.",
        )


def is_program_file(archive: Archive) -> bool:
    """Whether an archive contains a program with engines of Torch-TensorRT."""
    names = list(archive.names())
    # packages with compiled code belong to the backend aotinductor
    if any(_AOTINDUCTOR in name for name in names):
        return False
    models = [name for name in names if "/models/" in name and name.endswith(".json")]
    return any(_OPERATOR_NAMESPACE in archive.read(name, _MAX_TEXT_SIZE) for name in models)


def read_program_file(path: Path, reader: Callable[[ProgramFile], T]) -> T | None:
    """The result of ``reader`` for a file with engines; None for any other file.

    Args:
        path: Path of the file.
        reader: Called with the open file.

    Raises:
        UnsupportedTargetError: The file contains engines and is damaged.
    """
    with path.open("rb") as file:
        if file.read(2) != _ZIP_MAGIC:  # a cheap test, because this runs for every file
            return None
    try:
        with Archive(path) as archive:
            return reader(ProgramFile(archive, path)) if is_program_file(archive) else None
    except _MALFORMED as exc:
        raise UnsupportedTargetError(f"{str(path)!r} is damaged: {exc}") from exc


def extra_files(attachments: Mapping[str, bytes]) -> dict[str, str]:
    """Attachments in the form that ``torch.export.save`` takes as ``extra_files``."""
    return {
        f"{ATTACHMENTS}{name}": base64.b64encode(data).decode()
        for name, data in attachments.items()
    }
