"""The weights of a base: entries by the model's names, in the memory that the user chose.

:class:`Store` maps names of the model to names of the source, and hides whether an entry is a copy
or is read from the source. The second half of the module makes private copies: in host memory,
pinned memory, device memory, or a temporary file.
"""

from __future__ import annotations

import tempfile
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from refitkit.errors import ConfigError, Problem, SourceError, raised_as, refused
from refitkit.program.dtypes import dtype_of
from refitkit.protocols import KnowsRevisions, MayChange
from refitkit.recipe import TensorMap
from refitkit.recipe.sources import ModuleWeights, require_reread

from refitkit_peft.keys import names_of_base

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable, Mapping

    from refitkit.model import TensorInfo
    from refitkit.protocols import WeightSource

    from refitkit_peft.files import FileSnapshot


MemoryKind: TypeAlias = Literal["given", "host", "pinned", "mapped", "device"]
MEMORY_KINDS: tuple[MemoryKind, ...] = ("given", "host", "pinned", "mapped", "device")

_ALIGNMENT = 64
"""Bytes. torch's allocator aligns tensors on the CPU in the same way."""


class Store:
    """The entries of a base.

    Names are those of the model, without names of wrappers that the base was saved from.

    Attributes:
        description: Text for messages.
        infos: Dtypes and shapes by name.
        constant: Whether no other code can change the entries unnoticed: they are copies, or lie
            in files whose state is checked.
        kind: Memory that the entries are in.
        nbytes: Bytes of copies.
    """

    def __init__(
        self,
        weights: object,
        source: WeightSource,
        files: FileSnapshot | None,
        kind: MemoryKind,
        device: torch.device,
        *,
        reread: bool = False,
    ) -> None:
        """Open a base, and copy it if its memory is not ``given``.

        Args:
            weights: Weights that the user gave.
            source: The same weights, opened.
            files: State of their files before they were opened; None without files.
            kind: Memory for the entries.
            device: Device for the kind ``device``.
            reread: Whether files are read a second time after copying, and compared.

        Raises:
            SourceError: The weights cannot be read, or have adapters merged into them.
            ConfigError: The machine has no memory of this kind.
        """
        _require_unmerged(weights)
        if isinstance(source, ModuleWeights):
            source = source.without_plan  # adapters use names of modules, not of state_dict hooks
        self._source = source
        self._source_names, left_out = names_of_base(source.names())
        self.infos: Mapping[str, TensorInfo] = {
            name: source.info(theirs) for name, theirs in self._source_names.items()
        }
        self._files = files
        # Files are mapped where they are; only weights in memory need a temporary file.
        mapped = kind == "mapped" and self._files is not None
        self.kind: MemoryKind = kind
        self._copies: Mapping[str, torch.Tensor] = {}
        if kind != "given" and not mapped:
            usable = [
                theirs
                for name, theirs in self._source_names.items()
                if not self.infos[name].unusable
            ]
            self._copies = _copied(source, usable, kind, device)
            # Files may change while they are copied. Later changes do not matter.
            if isinstance(source, MayChange):
                source.require_unchanged()
            if reread:
                require_reread(source)
            self._files = None
        # Part of all revisions. Files: bases of equal file states have equal revisions.
        # Copies: a new object is equal to no other, so the revisions are unique to this base.
        self._version: Hashable = tuple(self._files.states.items()) if self._files else object()
        self.nbytes = _nbytes_of(self._copies)
        self.constant = bool(self._copies) or self._files is not None
        self.description = source.description
        if left_out:
            self.description += f" without its {left_out} entries of adapters"

    def names(self) -> Collection[str]:
        """The model's names of all entries."""
        return self._source_names.keys()

    def get(self, name: str) -> torch.Tensor:
        """An entry. Do not write to it."""
        theirs = self._source_names[name]
        copy = self._copies.get(theirs)
        return self._source.get(theirs) if copy is None else copy

    def revision(self, name: str) -> Hashable | None:
        """The revision of an entry; see ``refitkit.protocols.KnowsRevisions``."""
        theirs = self._source_names[name]
        if theirs in self._copies or self._files is not None:
            return self._version, theirs
        return self._source.revision(theirs) if isinstance(self._source, KnowsRevisions) else None

    def require_one_version(self) -> None:
        """Check that the files did not change while they were read.

        Raises:
            SourceError: They changed.
        """
        if isinstance(self._source, MayChange) and not self._copies:
            self._source.require_unchanged()

    def reread(self) -> None:
        """Read the files a second time and compare; does nothing for copies."""
        if not self._copies:
            require_reread(self._source)

    def require_unchanged(self) -> None:
        """Check that the files are those that were opened, before they are used again.

        Raises:
            SourceError: They are not; lists all changed files.
        """
        # Links alone do not count: if the file was written to as well, its reader reports it.
        problems = [] if self._files is None else list(self._files.changed(links=False))
        if problems:
            raise SourceError(
                f"{self.description} is not the base that was opened.",
                problems=problems,
                hint="Make a new Base, or keep a copy: Base(weights, memory='host').",
            )


def _require_unmerged(weights: object) -> None:
    """Refuse a live peft model with merged adapters, which would be added twice.

    Raises:
        SourceError: Modules have merged adapters; lists them.
    """
    if not isinstance(weights, torch.nn.Module):
        return
    problems = [
        Problem(name, "merged", ", ".join(map(str, merged)))
        for name, module in weights.named_modules()
        if (merged := getattr(module, "merged_adapters", None))
    ]
    if problems:
        message = f"This {type(weights).__name__} has adapters merged into its weights."
        hint = "Call its unmerge_adapter(), or pass the base that they were trained on."
        raise SourceError(message, problems=problems, hint=hint)


# -- private copies ------------------------------------------------------------------------------


def _copied(
    source: WeightSource, names: Iterable[str], kind: MemoryKind, device: torch.device
) -> dict[str, torch.Tensor]:
    """Contiguous copies of entries by name; names of one tensor share one copy.

    Args:
        source: Weights to copy from.
        names: Names of the entries.
        kind: Memory for the copies, other than ``given``.
        device: Device for the kind ``device``.

    Raises:
        ConfigError: The machine has no memory of this kind.
        SourceError: An entry cannot be read.
    """
    firsts = _first_names(source, names)
    if kind == "mapped":
        kept = _mapped(source, [name for name, first in firsts.items() if name == first])
    else:
        copy = _copier(kind, device)
        kept = {name: copy(source.get(name)) for name, first in firsts.items() if name == first}
        if kind == "device" and device.type == "cuda":
            # Refits on other streams read the copies without waiting for this one.
            torch.cuda.current_stream(device).synchronize()
    return {name: kept[first] for name, first in firsts.items()}


def _nbytes_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of tensors; a tensor with several names counts once."""
    return sum({value.data_ptr(): value.nbytes for value in tensors.values()}.values())


def _first_names(source: WeightSource, names: Iterable[str]) -> dict[str, str]:
    """The first name of the same tensor, by name."""
    # Only tensors in memory can be shared: other sources make a new tensor at each read.
    if not isinstance(source, TensorMap):
        return {name: name for name in names}
    seen: dict[tuple[object, ...], str] = {}
    firsts: dict[str, str] = {}
    alive = []  # keeps all tensors alive, so that no address is used twice
    for name in names:
        value = source.get(name)
        alive.append(value)
        memory = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        firsts[name] = seen.setdefault(memory, name) if value.numel() else name
    return firsts


def _copier(kind: MemoryKind, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that copies a tensor to host, pinned or device memory."""

    def copy(value: torch.Tensor) -> torch.Tensor:
        target = device if kind == "device" else torch.device("cpu")
        empty = torch.empty(
            value.shape, dtype=value.dtype, device=target, pin_memory=kind == "pinned"
        )
        return empty.copy_(value.detach())

    problems = []
    if kind == "pinned" and not torch.cuda.is_available():
        problems.append(Problem("memory", "pinned", "no CUDA here", hint="use memory='host'"))
    if kind == "device" and device.type == "cuda" and not torch.cuda.is_available():
        problems.append(Problem("device", str(device), "no CUDA here"))
    if problems:
        raise ConfigError("This machine lacks the memory for the base.", problems=problems)
    return copy


def _mapped(source: WeightSource, names: list[str]) -> dict[str, torch.Tensor]:
    """Copies in a temporary file without a name, mapped into memory.

    The system can drop pages and read them again when memory is short. The file is in the folder
    for temporary files (``TMPDIR``), and the system deletes it with the last tensor.
    """
    infos = {name: source.info(name) for name in names}
    offsets, size = {}, _ALIGNMENT
    for name, info in infos.items():
        offsets[name] = size
        nbytes = info.count * dtype_of(info.dtype).itemsize
        size += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    what = f"{source.description} cannot be copied to a temporary file"
    with raised_as(SourceError, what), _temporary_file(what) as file:
        for name in names:
            file.seek(offsets[name])
            file.write(_raw(source.get(name)))
        # Blocks that were never written are zero: the padding between tensors.
        file.truncate(size)
        file.flush()
        # The file never has another name, so no other process can truncate it.
        name = f"/proc/self/fd/{file.fileno()}"
        storage: Any = torch.UntypedStorage.from_file(name, False, size)  # noqa: FBT003
    return {name: _view(storage, offsets[name], info) for name, info in infos.items()}


def _temporary_file(what: str) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError as exc:
        raise refused(exc, what) from exc


def _raw(value: torch.Tensor) -> memoryview | bytes:
    # An empty tensor has no memory to view as bytes.
    plain = value.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data if plain.numel() else b""


def _view(storage: torch.UntypedStorage, offset: int, info: TensorInfo) -> torch.Tensor:
    # A meta tensor gives the contiguous strides of the shape.
    meta = torch.empty(info.shape, dtype=dtype_of(info.dtype), device="meta")
    if not info.count:
        return torch.empty(info.shape, dtype=meta.dtype)
    view = torch.empty(0, dtype=meta.dtype)
    return view.set_(storage, offset // meta.itemsize, meta.shape, meta.stride())
