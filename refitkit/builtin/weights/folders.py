"""Folders that hold weights: of Hugging Face models, and of torch's distributed checkpoints."""

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
from refitkit.recipe import pieces_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    import torch

    from refitkit.model import TensorInfo
    from refitkit.protocols import WeightSource


# MERGED sharded: Weights in several files with an index: what ``save_pretrained`` writes of a
# large model.
#
# The index is JSON: ``weight_map`` says for each name which file beside the index has it
# (``transformers/utils/hub.py`` and ``huggingface_hub``'s
# ``split_torch_state_dict_into_shards``).

SUFFIX = ".index.json"
"""How names of indices end."""

_LIMIT = 1 << 28
"""Bytes of an index: a million names of 200 letters."""


class _Index(BaseModel):
    weight_map: dict[str, str]


class ShardedFiles:
    """Files with an index, all open: headers are read now, tensors on demand."""

    def __init__(self, index: Path) -> None:
        """Open all files and hold them against the index.

        Raises:
            SourceError: The index or a file cannot be read, or they contradict one another; lists
                everything that is wrong.
        """
        self.description = f"{str(index)!r}"
        self._folder = Folder(index.parent, self.description)
        self._folder.note(index.name)
        self._index, read = _read_index(index)
        self._home = read.weight_map
        problems = list(_outside(self._home))
        if not problems:
            self._shards, problems = _opened(self._folder, self._home)
            problems += _contradictions(self._home, self._shards)
        if problems:
            raise SourceError(
                f"{self.description} and the files beside it are not one whole checkpoint.",
                problems=problems,
                hint="Check that all of it was written or downloaded completely.",
            )
        count = len(self._shards)
        self.description += f" ({count} files)" if count != 1 else ""

    def names(self) -> Collection[str]:
        """All names in the index."""
        return self._home.keys()

    def info(self, fqn: str) -> TensorInfo:
        """Dtype and shape, from the header of the file that has it."""
        return self._shards[self._home[fqn]].info(fqn)

    def get(self, fqn: str) -> torch.Tensor:
        """The tensor, on the CPU."""
        return self._shards[self._home[fqn]].get(fqn)

    def pieces(self, fqn: str) -> Iterator[torch.Tensor] | None:
        """See ``refitkit.protocols.GivesPieces``."""
        return pieces_of(self._shards[self._home[fqn]], fqn)

    def require_unchanged(self) -> None:
        """Check the index and all files; see ``refitkit.protocols.MayChange``."""
        self._folder.require_unchanged()
        self._index.require_unchanged()
        for shard in self._shards.values():
            if isinstance(shard, MayChange):
                shard.require_unchanged()

    def reread(self) -> None:
        """Read the index and all files again; see ``refitkit.protocols.SupportsReread``."""
        self._index.reread()
        for shard in self._shards.values():
            if isinstance(shard, SupportsReread):
                shard.reread()


def _read_index(path: Path) -> tuple[OpenFile, _Index]:
    what = f"{str(path)!r} cannot be read as an index of weights"
    try:
        file = OpenFile(path, f"{str(path)!r}", hold=False)
        if file.size > _LIMIT:
            raise SourceError(f"{what}: it has more than {_LIMIT} bytes.")
        content = file.read_bytes(0, file.size)
        index = _Index.model_validate_json(content)
    except OSError as exc:
        raise_if_resource(exc, what)
        raise SourceError(f"{what}: {exc}.") from exc
    except ValidationError as exc:
        problems = [
            Problem(".".join(map(str, error["loc"])) or path.name, error["type"], hint=error["msg"])
            for error in exc.errors(include_input=False, include_url=False)
        ]
        raise SourceError(f"{what}.", problems=problems) from exc
    problems = [
        Problem(name, "given twice", hint="only once can be meant")
        for name in _given_twice(content)
    ]
    if problems:
        raise SourceError(f"{what}.", problems=problems)
    return file, index


def _given_twice(content: bytes) -> list[str]:
    """Keys that an object has more than once: readers of JSON keep the last one.

    Args:
        content: JSON that a reader with limits has read before.
    """
    twice: list[str] = []

    def noted(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = Counter(key for key, _ in pairs)
        twice.extend(key for key, times in found.items() if times > 1)
        return dict(pairs)

    json.loads(content, object_pairs_hook=noted)
    return twice


def _outside(home: Mapping[str, str]) -> Iterator[Problem]:
    """Files that are not beside the index: a checkpoint has no say over other folders."""
    for file in dict.fromkeys(home.values()):
        if file in {"", ".", ".."} or not {"/", "\\", "\0"}.isdisjoint(file):
            hint = "an index names files that lie beside it, without a folder"
            yield Problem(repr(file), "not beside the index", hint=hint)


def _opened(
    folder: Folder, home: Mapping[str, str]
) -> tuple[dict[str, WeightSource], list[Problem]]:
    shards: dict[str, WeightSource] = {}
    problems: list[Problem] = []
    for file, lost in sorted(Counter(home.values()).items()):
        folder.note(file)
        if not is_file(folder.path / file):
            problems.append(Problem(file, "missing", wanted=f"a file with {lost} weights"))
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
    home: Mapping[str, str], shards: Mapping[str, WeightSource]
) -> Iterator[Problem]:
    """Names that are not where the index says, or that it does not know."""
    for name, file in home.items():
        if file in shards and name not in shards[file].names():
            yield Problem(name, "missing", wanted=f"in {file!r}, as the index says")
    for file, shard in shards.items():
        for name in shard.names():
            if home.get(name) != file:
                said = f"in {home[name]!r}" if name in home else "not at all"
                yield Problem(name, "unexpected", f"in {file!r}", f"{said}, as the index says")


_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
"""Names of weights in a model's folder: of transformers, of diffusers, of both before safetensors.

``transformers/utils/__init__.py`` and ``diffusers/utils/constants.py``.
"""

_KINDS = (".safetensors", f".safetensors{SUFFIX}", ".bin", f".bin{SUFFIX}")
"""Kinds of files, those that are preferred first, as in ``transformers``."""


def open_folder(path: Path) -> WeightSource | None:
    """Open a folder that holds weights; None where it is another plugin's.

    Raises:
        SourceError: What is in it cannot be read, or it holds several models.
    """
    if is_file(path / METADATA):
        return DistributedCheckpoint(path)
    found = [file for stem in _STEMS if (file := _preferred(path, stem)) is not None]
    safe = [file for file in found if ".safetensors" in file.name]
    if len(safe or found) > 1:
        raise SourceError(
            f"{str(path)!r} holds weights of more than one model.",
            problems=[Problem(file.name, "found") for file in safe or found],
            hint="Pass the file that is meant.",
        )
    return open_weights_file((safe or found)[0]) if found else None


def open_weights_file(path: Path) -> WeightSource | None:
    """Open a file with weights, or the index of several; None where it is another plugin's.

    Raises:
        SourceError: It cannot be read, or is a pipe or a device: reading could last for ever.
    """
    if not is_file(path):
        raise SourceError(
            f"{str(path)!r} is no file but a pipe, a device, or the like.",
            hint="Copy what it gives to a file, or pass a stream of (name, tensor) pairs.",
        )
    return ShardedFiles(path) if path.name.endswith(SUFFIX) else open_file(path)


def _preferred(folder: Path, stem: str) -> Path | None:
    files = (folder / f"{stem}{kind}" for kind in _KINDS)
    return next((file for file in files if is_file(file)), None)
