"""Proved layouts: those of this process, and those in a folder.

A layout holds for the engine bytes, TensorRT, CUDA, driver and GPU with which it was proved. A
file is trusted as far as the folder is: its digest finds damage, not forgery. Whatever it says, a
layout never leads out of the memory of the weights, or to two weights at one place.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from refitkit.builtin.torch_tensorrt.direct.folds import Fold
from refitkit.builtin.torch_tensorrt.direct.layout import EngineLayout
from refitkit.builtin.torch_tensorrt.direct.places import MAX_DIGITS, Place
from refitkit.errors import RefitError, UnsupportedTargetError
from refitkit.files.replacing import replacing
from refitkit.program.dtypes import dtype_name, dtype_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from refitkit.builtin.torch_tensorrt.direct.proving import Answering
    from refitkit.builtin.torch_tensorrt.refitter import WeightSpec

Key = tuple[str, ...]

_LIMIT = 1 << 26  # bytes of a file
_SUFFIX = ".layout.json"
_DIGEST_LENGTH = 64


class Known(NamedTuple):
    """A layout, and what an engine of the same bytes holds when it is opened.

    Attributes:
        layout: The layout, proved.
        memory: Digest of the weights where they lie; see ``digest_of``.
        fixed: Digest of the weights that stay fixed; see ``digest_of_fixed``. Empty: unknown.
    """

    layout: EngineLayout
    memory: bytes
    fixed: bytes = b""


_of_process: dict[Key, Known] = {}


class KnownLayouts:
    """Layouts that need no proof."""

    def __init__(self, folder: Path | None) -> None:
        """Read nothing yet.

        Args:
            folder: Where layouts are kept for other processes; None: nowhere.
        """
        self._folder = folder

    def has(self, key: Key) -> bool:
        """Return whether there may be a layout for a key."""
        return key in _of_process or (self._folder is not None and self._path(key).is_file())

    def get(self, key: Key, engine: Answering, specs: Mapping[str, WeightSpec]) -> Known | None:
        """Return the layout that was proved for an engine; None if there is none that fits it.

        Args:
            key: What the layout depends on.
            engine: The engine, which nobody has written to since it was opened.
            specs: Dtype and number of elements of each weight, by name.
        """
        pieces = engine.pieces()
        found = _of_process.get(key) or self._read(key, specs, pieces[0].device)
        if found is None:
            return None
        layout = found.layout
        fits = layout.piece < len(pieces) and len(pieces[layout.piece]) == layout.nbytes
        return found if fits and digest_of(layout, engine) == found.memory else None

    def put(self, key: Key, known: Known) -> None:
        """Keep a layout.

        Args:
            key: What it depends on.
            known: The layout, and what the engine bytes in ``key`` hold.
        """
        _of_process[key] = known
        if self._folder is None:
            return
        content = _Stored.of(key, known).model_dump_json().encode()
        path = self._path(key)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        except (OSError, RefitError):
            return  # a full disk must not fail a refit: the layout is found again

    def _path(self, key: Key) -> Path:
        if self._folder is None:
            raise TypeError("there is no folder")
        return self._folder / (hashlib.sha256("\n".join(key).encode()).hexdigest() + _SUFFIX)

    def _read(
        self, key: Key, specs: Mapping[str, WeightSpec], device: torch.device
    ) -> Known | None:
        """A layout in the folder; None if there is none that can be used."""
        if self._folder is None:
            return None
        try:
            with self._path(key).open("rb") as file:
                content = file.read(_LIMIT + 1)
            digest, _, content = content.partition(b"\n")
            if len(digest) != _DIGEST_LENGTH or len(content) > _LIMIT:
                return None
            if hashlib.sha256(content).hexdigest().encode() != digest:
                return None
            stored = _Stored.model_validate_json(content)
            return stored.checked(key, specs, device)
        except (OSError, ValidationError, UnsupportedTargetError, KeyError):
            return None


def digest_of(layout: EngineLayout, engine: Answering) -> bytes:
    """Return a digest of an engine's memory from the first weight to the last."""
    first, last = layout.span
    words = engine.pieces()[layout.piece][first:last].cpu()
    raw: Any = words.numpy()
    return xxhash.xxh3_128_digest(raw)


def digest_of_fixed(layout: EngineLayout, values: Mapping[str, torch.Tensor]) -> bytes:
    """Return a digest of the weights that stay fixed; empty if not all of them are given."""
    if not all(name in values for name in layout.fixed):
        return b""
    state = xxhash.xxh3_128()
    for name in sorted(layout.fixed):
        raw: Any = values[name].reshape(-1).contiguous().view(torch.uint8).cpu().numpy()
        state.update(raw)
    return state.digest()


_Count = Annotated[int, Field(ge=0, lt=1 << 48)]
_Digit = tuple[_Count, _Count]


class _Stored(BaseModel):
    """A layout as it is written to a file.

    Attributes:
        format: Name and version of the format.
        key: What the layout depends on.
        memory: Digest in hexadecimal digits; see ``Known``.
        fixed_values: Digest in hexadecimal digits; see ``Known``.
        piece: See ``EngineLayout``, as all that follows.
        nbytes: Size of the piece in bytes.
        places: Start and digits of each place, and the dtype, by name of the weight.
        folds: Names of the five weights of each fold.
        fixed: Names of weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["refitkit-layout/1"] = "refitkit-layout/1"
    key: tuple[str, ...]
    memory: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    fixed_values: Annotated[str, Field(pattern="^([0-9a-f]{32})?$")]
    piece: _Count
    nbytes: _Count
    places: dict[
        str, tuple[_Count, Annotated[tuple[_Digit, ...], Field(max_length=MAX_DIGITS)], str]
    ]
    folds: tuple[tuple[str, str, str, str, str], ...]
    fixed: tuple[str, ...]

    @classmethod
    def of(cls, key: Key, known: Known) -> _Stored:
        layout = known.layout
        return cls(
            key=key,
            memory=known.memory.hex(),
            fixed_values=known.fixed.hex(),
            piece=layout.piece,
            nbytes=layout.nbytes,
            places={
                name: (place.start, place.digits, dtype_name(layout.dtypes[name]))
                for name, place in layout.places.items()
            },
            folds=tuple(fold.names for fold in layout.folds),
            fixed=tuple(sorted(layout.fixed)),
        )

    def checked(
        self, key: Key, specs: Mapping[str, WeightSpec], device: torch.device
    ) -> Known | None:
        """What was stored; None if it belongs to something else.

        Raises:
            UnsupportedTargetError: The layout would write elsewhere.
            KeyError: There is no such dtype.
        """
        dtypes = {name: dtype_of(dtype) for name, (_, _, dtype) in self.places.items()}
        wanted = {name: dtype_of(spec.dtype) for name, spec in specs.items() if name in dtypes}
        if self.key != key or dtypes != wanted or not self.places:
            return None
        layout = EngineLayout(
            piece=self.piece,
            nbytes=self.nbytes,
            places={name: Place(start, digits) for name, (start, digits, _) in self.places.items()},
            dtypes=dtypes,
            folds=tuple(Fold(*names) for names in self.folds),
            fixed=frozenset(self.fixed),
        )
        layout.check({name: spec.count for name, spec in specs.items()}, device)
        return Known(layout, bytes.fromhex(self.memory), bytes.fromhex(self.fixed_values))


def key_of(data: bytes, trt: Any, device: torch.device) -> Key:
    """Return what a layout depends on.

    Args:
        data: Engine bytes.
        trt: The package ``tensorrt``.
        device: The engine's device.
    """
    found = [hashlib.sha256(data).hexdigest(), str(trt.__version__)]
    if device.type == "cuda":
        driver: Any = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()  # noqa: SLF001
        found += [torch.cuda.get_device_name(device), str(torch.version.cuda), str(driver)]
    return tuple(found)
