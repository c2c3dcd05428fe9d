"""Folders that hold weights: of Hugging Face models, and of torch's distributed checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.builtin.weights.distributed import METADATA, DistributedCheckpoint
from refitkit.builtin.weights.files import is_file, open_file
from refitkit.builtin.weights.sharded import SUFFIX, ShardedFiles
from refitkit.errors import Problem, SourceError

if TYPE_CHECKING:
    from pathlib import Path

    from refitkit.protocols import WeightSource

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
