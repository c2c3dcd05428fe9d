"""Copies of weights in the memory that a user chose, which nobody else can write to."""

from __future__ import annotations

import tempfile
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from refitkit.errors import ConfigError, Problem, SourceError, raised_as, refused
from refitkit.program.dtypes import dtype_of
from refitkit.recipe import TensorMap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from refitkit.model import TensorInfo
    from refitkit.protocols import WeightSource

Kind: TypeAlias = Literal["given", "host", "pinned", "mapped", "device"]
KINDS: tuple[Kind, ...] = ("given", "host", "pinned", "mapped", "device")

_ALIGNED = 64
"""Bytes: where torch's own allocator lets tensors begin."""


def copied(
    source: WeightSource, names: Iterable[str], kind: Kind, device: torch.device
) -> dict[str, torch.Tensor]:
    """Copies of entries, contiguous; names of one tensor have one copy.

    Args:
        source: The weights.
        names: Which of them.
        kind: Where copies are kept; not ``given``.
        device: The device of ``device``.

    Raises:
        ConfigError: There is no such memory here.
        SourceError: An entry cannot be read.
    """
    firsts = _firsts(source, names)
    if kind == "mapped":
        kept = _mapped(source, [name for name, first in firsts.items() if name == first])
    else:
        copy = _copier(kind, device)
        kept = {name: copy(source.get(name)) for name, first in firsts.items() if name == first}
        if kind == "device" and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # then every stream can read them
    return {name: kept[first] for name, first in firsts.items()}


def nbytes_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum({value.data_ptr(): value.nbytes for value in tensors.values()}.values())


def _firsts(source: WeightSource, names: Iterable[str]) -> dict[str, str]:
    """The first name of the tensor that each name is of.

    Only tensors that are in memory already can be one: others are made anew whenever they are read.
    """
    if not isinstance(source, TensorMap):
        return {name: name for name in names}
    seen: dict[tuple[object, ...], str] = {}
    firsts: dict[str, str] = {}
    held = []  # while they are alive, no two tensors have one address by chance
    for name in names:
        value = source.get(name)
        held.append(value)
        where = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        firsts[name] = seen.setdefault(where, name) if value.numel() else name
    return firsts


def _copier(kind: Kind, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    def copy(value: torch.Tensor) -> torch.Tensor:
        place = device if kind == "device" else torch.device("cpu")
        made = torch.empty(
            value.shape, dtype=value.dtype, device=place, pin_memory=kind == "pinned"
        )
        return made.copy_(value.detach())

    problems = []
    if kind == "pinned" and not torch.cuda.is_available():
        problems.append(Problem("memory", "pinned", "no CUDA here", hint="host does without"))
    if kind == "device" and device.type == "cuda" and not torch.cuda.is_available():
        problems.append(Problem("device", str(device), "no CUDA here"))
    if problems:
        raise ConfigError("The base cannot be kept there.", problems=problems)
    return copy


def _mapped(source: WeightSource, names: list[str]) -> dict[str, torch.Tensor]:
    """Copies in a file without a name: pages that memory runs short of are read again.

    It lies in the folder for temporary files (``TMPDIR``), and is gone with the tensors.
    """
    infos = {name: source.info(name) for name in names}
    offsets, size = {}, _ALIGNED
    for name, info in infos.items():
        offsets[name] = size
        size += -(-info.count * dtype_of(info.dtype).itemsize // _ALIGNED) * _ALIGNED
    what = f"{source.description} cannot be copied to a temporary file"
    with raised_as(SourceError, what), _temporary_file(what) as file:
        for name in names:
            file.seek(offsets[name])
            file.write(_raw(source.get(name)))
        file.truncate(size)
        file.flush()
        name = f"/proc/self/fd/{file.fileno()}"  # it never has another: nobody else can cut it
        storage: Any = torch.UntypedStorage.from_file(name, False, size)  # noqa: FBT003
    return {name: _view(storage, offsets[name], info) for name, info in infos.items()}


def _temporary_file(what: str) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError as exc:
        raise refused(exc, what) from exc


def _raw(value: torch.Tensor) -> memoryview | bytes:
    plain = value.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data if plain.numel() else b""


def _view(storage: torch.UntypedStorage, offset: int, info: TensorInfo) -> torch.Tensor:
    made = torch.empty(info.shape, dtype=dtype_of(info.dtype), device="meta")
    if not info.count:
        return torch.empty(info.shape, dtype=made.dtype)
    whole = torch.empty(0, dtype=made.dtype)
    return whole.set_(storage, offset // made.itemsize, made.shape, made.stride())
