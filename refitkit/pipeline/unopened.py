"""What it is that no plugin can open, and what to do with it instead.

Files are told apart by their first bytes, and archives by the names of their members: nothing in
them is unpickled, run, or read whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch.export import ExportedProgram

from refitkit.errors import raise_if_resource
from refitkit.pipeline.compiled import CompiledModule
from refitkit.recipe import Archive, ArchiveError

_HEAD = 16
_HEADER_LIMIT = 100_000_000  # of safetensors, as its own reader has it
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index.json")
_SAVED = "refitkit/manifest.json"


class FileType(NamedTuple):
    """What something is.

    Attributes:
        what: What to call it, after "is".
        as_module: What to do, where it was given as a module.
        as_weights: What to do, where it was given as weights.
    """

    what: str
    as_module: str
    as_weights: str = ""


_SECOND = "Weights go second: refit MODULE WEIGHTS."
_FIRST = "Modules go first: refit MODULE WEIGHTS."
_COMPILE = "Compile it first: refitkit.compile(program), or `refitkit compile`."

EMPTY = FileType("empty", "Write it again, or fetch it again.", "Write it again, or fetch it again.")
WEIGHTS = FileType("a file of weights, not a compiled module", _SECOND)
FOLDER = FileType("a folder of weights, not a compiled module", _SECOND)
TORCH_SAVE = FileType("a file of torch.save, as weights are, not a compiled module", _SECOND)
STATE = FileType("weights, not a compiled module", _SECOND)
PROGRAM = FileType("a program of torch.export, which is not compiled yet", _COMPILE)
SCRIPT = FileType(
    "a program of TorchScript",
    "Export the model with torch.export.export(model, inputs) instead, and compile that.",
)
ENGINE = FileType(
    "a lone engine of TensorRT, which says nothing of the program that it was built from",
    "Save the compiled module to a path that does not end in '.engine', and load that.",
    "The weights in it cannot be read: pass those that it was built from.",
)
GGUF = FileType(
    "a GGUF file, with names and formats of llama.cpp",
    "Compile the model that it was converted from.",
    "Pass the checkpoint that it was converted from: a .safetensors or torch.save file.",
)
PLAN = FileType(
    "a plan, not a compiled module",
    "Pass it beside the module: plan=refitkit.RefitPlan.load(path), or --plan.",
    "Pass it beside the weights: plan=refitkit.RefitPlan.load(path), or --plan.",
)
SAVED = FileType("a compiled module", "", _FIRST)
COMPILED = FileType(
    "a compiled module", "It is open already: refitkit.refit takes it as it is.", _FIRST
)
EAGER = FileType(
    "an eager module, which is not compiled yet",
    "Export and compile it first: refitkit.compile(torch.export.export(model, inputs)).",
)


def file_type(thing: object) -> FileType | None:
    """What something is; None where nobody knows, or it is what anybody can see."""
    if isinstance(thing, Path):
        try:
            return _of_folder(thing) if thing.is_dir() else _of_file(thing)
        except (OSError, ValueError, ArchiveError) as exc:
            raise_if_resource(exc, f"{str(thing)!r} cannot be read")
            return None
    return next((kind for types, kind in _OBJECTS if isinstance(thing, types)), None)


_OBJECTS: tuple[tuple[type, FileType], ...] = (
    (CompiledModule, COMPILED),
    (ExportedProgram, PROGRAM),
    (torch.nn.Module, EAGER),
    (Mapping, STATE),
)

_MAGIC: tuple[tuple[bytes, FileType], ...] = (
    (b"ftrt", ENGINE),  # of TensorRT
    (b"vtrt", ENGINE),  # of TensorRT-RTX
    (b"GGUF", GGUF),
    (b"\x80\x02", TORCH_SAVE),  # a bare pickle, as before torch 1.6
)

_MEMBERS: tuple[tuple[frozenset[str], FileType], ...] = (
    (frozenset({"pinned.safetensors", "manifest.json"}), PLAN),
    (frozenset({"archive_format"}), PROGRAM),
    (frozenset({"serialized_exported_program.json"}), PROGRAM),  # of torch before 2.8
    (frozenset({"constants.pkl", "data.pkl"}), SCRIPT),
    (frozenset({"data.pkl"}), TORCH_SAVE),
)
"""The first whose members an archive all has, in any folder of it."""


def _of_folder(path: Path) -> FileType | None:
    return FOLDER if any(one.name.endswith(_SUFFIXES) for one in path.iterdir()) else None


def _of_file(path: Path) -> FileType | None:
    if not path.is_file():  # no pipe, which would have to be waited for
        return None
    if not path.stat().st_size:
        return EMPTY
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(b"PK"):
        return _of_archive(path)
    if path.name.endswith(".index.json") or _is_safetensors(head):
        return WEIGHTS
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)


def _is_safetensors(head: bytes) -> bool:
    """Whether the length of a JSON header comes first, and then that header."""
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and length <= _HEADER_LIMIT


def _of_archive(path: Path) -> FileType | None:
    with Archive(path) as archive:
        members = set(archive.names())
    if _SAVED in members:
        return SAVED
    names = {PurePosixPath(member).name for member in members}
    return next((kind for wanted, kind in _MEMBERS if wanted <= names), None)
