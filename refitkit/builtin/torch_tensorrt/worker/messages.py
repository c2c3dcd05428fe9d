"""Messages and files that the user's process and its workers exchange.

A message is its length in 8 bytes, little-endian, then JSON. No other process can reach the socket,
so messages are not checked. Tensors go through files: programs and recipes as safetensors, values
of a part as a :class:`Region` that both processes map.
"""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from refitkit.errors import (
    CompileError,
    EngineError,
    Problem,
    RefitError,
    raised_as,
    resource_error,
    resources,
)
from refitkit.files.safetensors_format import unwritable
from refitkit.model import Guard, Leaf, LedgerRow, OpCall
from refitkit.program import KeptProgram, facts_of
from refitkit.program.dtypes import dtype_of
from refitkit.program.facts import tensors_of
from refitkit.recipe import Recorded, TensorMap

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch.export import ExportedProgram

    from refitkit.model import Slot


_LENGTH = struct.Struct("<Q")


def send(channel: socket.socket, message: Any) -> None:
    """Send one message.

    Args:
        channel: The socket.
        message: Any JSON data.
    """
    content = json.dumps(message).encode()
    channel.sendall(_LENGTH.pack(len(content)) + content)


def receive(channel: socket.socket) -> Any:
    """Wait for one message and return it.

    Raises:
        EOFError: The other end is closed.
    """
    (length,) = _LENGTH.unpack(_receive_exactly(channel, _LENGTH.size))
    return json.loads(_receive_exactly(channel, length))


def _receive_exactly(channel: socket.socket, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = channel.recv(min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def pack_error(exc: BaseException) -> dict[str, Any]:
    """An exception as JSON data. Errors other than ``RefitError`` become an ``EngineError``."""
    if not isinstance(exc, RefitError):
        what = "The planning process failed"
        refused = resource_error(exc, what)
        return pack_error(refused or EngineError(f"{what}: {type(exc).__name__}: {exc}"))
    return {
        "kind": type(exc).__name__,
        "message": exc.message,
        "problems": [problem.as_dict() for problem in exc.problems],
        "hint": exc.hint,
    }


def unpack_error(packed: dict[str, Any]) -> RefitError:
    """The exception from ``pack_error``; an ``EngineError`` if its class is unknown here."""
    # a plugin that only the session has imported can raise a class that is unknown here
    kind = {one.__name__: one for one in _subclasses(RefitError)}.get(packed["kind"], EngineError)
    problems = [Problem(**problem) for problem in packed["problems"]]
    error: RefitError = kind(packed["message"], problems=problems, hint=packed["hint"])
    return error


def _subclasses(root: type[RefitError]) -> Iterator[type[RefitError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _subclasses(kind)


# -- programs, from the user's process to a session ----------------------------------------------

_GRAPH, _FACTS, _WEIGHTS = "program.json", "facts.json", "weights.safetensors"


def write_program(program: ExportedProgram, folder: Path) -> None:
    """Write a program for a session: its graph as JSON, its tensors as safetensors.

    Args:
        program: The program; all tensors must be on the CPU.
        folder: An empty folder.

    Raises:
        CompileError: torch cannot write the program without a pickle, or a tensor is on another
            device or has a dtype that TensorRT does not have.
    """
    facts = facts_of(program)
    on_other_devices = [leaf for leaf in facts.leaves if leaf.device != "cpu"]
    if on_other_devices:
        raise CompileError(
            "Networks are created on the CPU, but the program has tensors on other devices.",
            problems=[Problem(leaf.fqn, "device", leaf.device, "cpu") for leaf in on_other_devices],
            hint="Export the model on the CPU.",
        )
    kept = KeptProgram.of(program)
    if kept is None:
        raise CompileError(
            "torch cannot write this program for the planning process without a pickle, because it "
            "has custom objects.",
        )
    (folder / _GRAPH).write_bytes(kept.to_bytes())
    described = {"leaves": [leaf.model_dump() for leaf in facts.leaves], "ties": facts.ties}
    (folder / _FACTS).write_text(json.dumps(described))
    problems = unwritable(tensors_of(program))
    if problems:
        message = "The program has tensors of dtypes that TensorRT does not have."
        raise CompileError(message, problems=problems)
    with raised_as(CompileError, "The tensors of the program cannot be written"):
        save_file(_unique_tensors(program, facts.ties), folder / _WEIGHTS)


def _unique_tensors(
    program: ExportedProgram, ties: tuple[tuple[str, ...], ...]
) -> dict[str, torch.Tensor]:
    """The program's tensors, contiguous; tied ones only under their first name."""
    others = {name for tie in ties for name in tie[1:]}
    tensors = {n: t.detach() for n, t in tensors_of(program).items() if n not in others}
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    return {name: _with_own_storage(tensor, users) for name, tensor in tensors.items()}


def _with_own_storage(tensor: torch.Tensor, users: Counter[int]) -> torch.Tensor:
    """The tensor, copied if it shares its storage, which safetensors refuses."""
    storage = tensor.untyped_storage()
    own = storage.nbytes() == tensor.nbytes and users[storage.data_ptr()] == 1
    return tensor if tensor.is_contiguous() and own else tensor.clone().contiguous()


def read_program(folder: Path) -> ExportedProgram:
    """The program that ``write_program`` wrote, with its own tensors.

    Raises:
        CompileError: The files are damaged.
    """
    facts: dict[str, Any] = json.loads((folder / _FACTS).read_text())
    leaves = tuple(map(Leaf.model_validate, facts["leaves"]))
    ties = tuple(map(tuple, facts["ties"]))
    kept = KeptProgram((folder / _GRAPH).read_bytes(), leaves, ties)
    try:
        with safe_open(folder / _WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as exc:
        raise CompileError(f"The tensors of the program cannot be read: {exc}.") from exc
    return kept.restore(TensorMap(tensors), tensors.__getitem__)


# -- recipes, from a session to the user's process -----------------------------------------------

_LITERALS = "literals.safetensors"


def write_recording(recorded: Recorded, folder: Path) -> dict[str, Any]:
    """Recipes as JSON data; their tensors go to a file in the folder."""
    save_file(dict(recorded.literals), folder / _LITERALS)
    return {
        "rows": [row.model_dump(mode="json") for row in recorded.rows],
        "calls": [call.model_dump(mode="json") for call in recorded.calls],
        "guards": [guard.model_dump(mode="json") for guard in recorded.guards],
    }


def read_recording(folder: Path, data: Mapping[str, Any]) -> Recorded:
    """The recipes that ``write_recording`` wrote, with their tensors in memory."""
    literals = load_file(folder / _LITERALS)
    return Recorded(
        rows=tuple(map(LedgerRow.model_validate, data["rows"])),
        calls=tuple(map(OpCall.model_validate, data["calls"])),
        guards=tuple(map(Guard.model_validate, data["guards"])),
        literals={name: value.clone() for name, value in literals.items()},
    )


# -- values of a part, mapped by both processes --------------------------------------------------

_ALIGNMENT = 64
"""Alignment of each value in a region, in bytes."""


class Region:
    """A mapped file with all values of one part.

    Values follow each other in the order of the slots, each aligned to 64 bytes.

    Attributes:
        path: Path of the file.
        views: Flat tensors on the file's memory, by slot name.
        whole: The whole file as one tensor of bytes.
    """

    def __init__(self, path: Path, whole: torch.Tensor, slots: Iterable[Slot]) -> None:
        """Use ``create`` or ``open`` instead."""
        self.path, self.whole = path, whole
        self.views: dict[str, torch.Tensor] = {}
        start = 0
        for slot in slots:
            raw = whole[start : start + slot.nbytes]
            self.views[slot.name] = raw.view(dtype_of(slot.dtype))
            start += _padded(slot.nbytes)

    @classmethod
    def create(cls, path: Path, slots: Iterable[Slot]) -> Region:
        """Create a file of zeros for these slots, and map it.

        Raises:
            ResourceError: The disk is full.
        """
        listed = list(slots)
        with resources(f"{str(path)!r} cannot be created"), path.open("xb") as file:
            # a write to a mapped sparse file kills the process if the disk is full
            os.posix_fallocate(file.fileno(), 0, _size(listed))
        return cls.open(path, listed)

    @classmethod
    def open(cls, path: Path, slots: Iterable[Slot]) -> Region:
        """Map a file that ``create`` made for the same slots.

        Raises:
            EngineError: The file has another size.
        """
        listed = list(slots)
        if path.stat().st_size != _size(listed):
            raise EngineError(f"{str(path)!r} contains the values of other slots.")
        whole = torch.from_file(str(path), shared=True, size=_size(listed), dtype=torch.uint8)
        return cls(path, whole, listed)


def _size(slots: list[Slot]) -> int:
    # an empty file cannot be mapped
    return max(_ALIGNMENT, sum(_padded(slot.nbytes) for slot in slots))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
