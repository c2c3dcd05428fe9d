"""Open paths that hold weights: folders of models, checkpoints in several files, single files.

``open_folder`` and ``open_weights_file`` choose what a path is. ``ShardedFiles`` is a checkpoint in
several files with an index, which ``save_pretrained`` writes of a large model. The index is JSON:
``weight_map`` says for each name which file beside the index has it
(``transformers/utils/hub.py``, and ``split_torch_state_dict_into_shards`` of ``huggingface_hub``).
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from refitkit.builtin.weights.distributed import METADATA, DistributedCheckpoint
from refitkit.builtin.weights.files import is_file, open_file
from refitkit.builtin.weights.reading import Folder, OpenFile
from refitkit.errors import Problem, SourceError, raise_if_resource
from refitkit.protocols import MayChange, SupportsReread
from refitkit.recipe import bits_known, pieces_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    import torch

    from refitkit.model import TensorInfo
    from refitkit.protocols import WeightSource


SUFFIX = ".index.json"
"""End of the name of an index."""

_MAX_INDEX = 1 << 28
"""Most bytes of an index: a million names of 200 letters."""

_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
"""Names of weights in a model's folder: of transformers, of diffusers, of both before safetensors.

Source: ``transformers/utils/__init__.py`` and ``diffusers/utils/constants.py``.
"""

_KINDS = (".safetensors", f".safetensors{SUFFIX}", ".bin", f".bin{SUFFIX}")
"""Suffixes of files. The first that exists is used, as in ``transformers``."""


def open_folder(path: Path) -> WeightSource | None:
    """Open a folder that holds weights; return None if it holds none of a known name.

    Raises:
        SourceError: The weights cannot be read, or the folder holds several models.
    """
    if is_file(path / METADATA):
        return DistributedCheckpoint(path)
    found = [file for stem in _STEMS if (file := _preferred(path, stem)) is not None]
    # Many repositories hold the same weights in both formats.
    safe = [file for file in found if ".safetensors" in file.name]
    if len(safe or found) > 1:
        raise SourceError(
            f"{str(path)!r} holds weights of more than one model.",
            problems=[Problem(file.name, "found") for file in safe or found],
            hint="Pass one of these files.",
        )
    return open_weights_file((safe or found)[0]) if found else None


def open_weights_file(path: Path) -> WeightSource | None:
    """Open a file of weights or an index; return None if the suffix is unknown.

    Raises:
        SourceError: The file cannot be read, or is a pipe or a device, whose end may never come.
    """
    if not is_file(path):
        raise SourceError(
            f"{str(path)!r} is a pipe, a device, or another special file.",
            hint="Copy its content to a file, or pass a stream of (name, tensor) pairs.",
        )
    return ShardedFiles(path) if path.name.endswith(SUFFIX) else open_file(path)


def _preferred(folder: Path, stem: str) -> Path | None:
    files = (folder / f"{stem}{kind}" for kind in _KINDS)
    return next((file for file in files if is_file(file)), None)


class ShardedFiles:
    """A source of several files with an index. Tensors are read on demand."""

    def __init__(self, index: Path) -> None:
        """Open all files and compare their names with the index.

        Args:
            index: Path of the index.

        Raises:
            SourceError: The index or a file cannot be read, or they contradict one another. The
                error lists all problems.
        """
        self.description = f"{str(index)!r}"
        self._folder = Folder(index.parent, self.description)
        # Recorded before it is read: a later change then shows.
        self._folder.record(index.name)
        self._index, content = _read_index(index)
        self._file_of = content.weight_map
        problems = list(_outside(self._file_of))
        if not problems:
            self._shards, problems = _open_shards(self._folder, self._file_of)
            problems += _contradictions(self._file_of, self._shards)
        if problems:
            raise SourceError(
                f"{self.description} and the files beside it are not one whole checkpoint.",
                problems=problems,
                hint="Check that all of it was written or downloaded completely.",
            )
        count = len(self._shards)
        self.description += f" ({count} files)" if count != 1 else ""

    def names(self) -> Collection[str]:
        """Return all names in the index."""
        return self._file_of.keys()

    def info(self, fqn: str) -> TensorInfo:
        """Return dtype and shape, from the header of the file that has the tensor."""
        return self._shards[self._file_of[fqn]].info(fqn)

    def get(self, fqn: str) -> torch.Tensor:
        """Return the tensor, on the CPU.

        Raises:
            KeyError: The index has no such name.
            SourceError: The entry is unusable, or its file was changed or cannot be read.
        """
        return self._shards[self._file_of[fqn]].get(fqn)

    def pieces(self, fqn: str, into: torch.Tensor | None = None) -> Iterator[torch.Tensor] | None:
        """Return pieces of an entry; see ``refitkit.protocols.GivesPieces``."""
        return pieces_of(self._shards[self._file_of[fqn]], fqn, into)

    def has_bits(self, fqn: str, tensor: torch.Tensor) -> bool | None:
        """Compare digests; see ``refitkit.protocols.KnowsBits``."""
        return bits_known(self._shards[self._file_of[fqn]], fqn, tensor)

    def require_unchanged(self) -> None:
        """Check the index and all files; see ``refitkit.protocols.MayChange``."""
        self._folder.require_unchanged()
        self._index.require_unchanged()
        for shard in self._shards.values():
            if isinstance(shard, MayChange):  # a file that was read as a whole may change
                shard.require_unchanged()

    def reread(self) -> None:
        """Compare digests with a second read; see ``refitkit.protocols.SupportsReread``."""
        self._index.reread()
        for shard in self._shards.values():
            if isinstance(shard, SupportsReread):
                shard.reread()


# -- the index --------------------------------------------------------------------------------


class _Index(BaseModel):
    """Content of an index. ``weight_map`` has the name of a file for each tensor."""

    weight_map: dict[str, str]


def _read_index(path: Path) -> tuple[OpenFile, _Index]:
    """Return the open file and its content.

    Raises:
        SourceError: The file cannot be read, is not an index, is too large, or has a key
            twice.
    """
    message = f"{str(path)!r} cannot be read as an index of weights"
    try:
        file = OpenFile(path, f"{str(path)!r}", keep_open=False)
        if file.size > _MAX_INDEX:
            raise SourceError(f"{message}: it has more than {_MAX_INDEX} bytes.")
        content = file.read_bytes(0, file.size)
        index = _Index.model_validate_json(content)
    except OSError as exc:
        raise_if_resource(exc, message)
        raise SourceError(f"{message}: {exc}.") from exc
    except ValidationError as exc:
        problems = [
            Problem(".".join(map(str, error["loc"])) or path.name, error["type"], hint=error["msg"])
            for error in exc.errors(include_input=False, include_url=False)
        ]
        raise SourceError(f"{message}.", problems=problems) from exc
    problems = [
        Problem(name, "given twice", hint="each name must occur once")
        for name in _duplicate_keys(content)
    ]
    if problems:
        raise SourceError(f"{message}.", problems=problems)
    return file, index


def _duplicate_keys(content: bytes) -> list[str]:
    """Return keys that occur more than once in an object. JSON readers keep the last one.

    Args:
        content: JSON that pydantic has read before. Its parser limits the depth, and Python's does
            not.
    """
    duplicates: list[str] = []

    def record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = Counter(key for key, _ in pairs)
        duplicates.extend(key for key, times in found.items() if times > 1)
        return dict(pairs)

    json.loads(content, object_pairs_hook=record)
    return duplicates


def _outside(file_of: Mapping[str, str]) -> Iterator[Problem]:
    """Yield files that are not beside the index: it must not name files elsewhere."""
    for file in dict.fromkeys(file_of.values()):
        if file in {"", ".", ".."} or not {"/", "\\", "\0"}.isdisjoint(file):
            hint = "an index names files that lie beside it, without a folder"
            yield Problem(repr(file), "not beside the index", hint=hint)


def _open_shards(
    folder: Folder, file_of: Mapping[str, str]
) -> tuple[dict[str, WeightSource], list[Problem]]:
    """Open all files of an index.

    Returns:
        Sources by file name, and what is wrong with the files that cannot be opened.
    """
    shards: dict[str, WeightSource] = {}
    problems: list[Problem] = []
    for file, count in sorted(Counter(file_of.values()).items()):
        folder.record(file)
        # Checked first, because opening a pipe would wait for a writer.
        if not is_file(folder.path / file):
            problems.append(Problem(file, "missing", wanted=f"a file with {count} weights"))
            continue
        try:
            source = open_file(folder.path / file)
        except SourceError as exc:
            problems += [Problem(file, "unreadable", hint=exc.message), *exc.problems]
            continue
        if source is None:
            problems.append(Problem(file, "unknown kind of file", wanted=".safetensors or .bin"))
        else:
            shards[file] = source
    return shards, problems


def _contradictions(
    file_of: Mapping[str, str], shards: Mapping[str, WeightSource]
) -> Iterator[Problem]:
    """Yield names that are not in the file that the index names, or not in the index."""
    for name, file in file_of.items():
        if file in shards and name not in shards[file].names():
            yield Problem(name, "missing", wanted=f"in {file!r}, as the index says")
    for file, shard in shards.items():
        for name in shard.names():
            if file_of.get(name) != file:
                place = f"in {file_of[name]!r}" if name in file_of else "not at all"
                yield Problem(name, "unexpected", f"in {file!r}", f"{place}, as the index says")
