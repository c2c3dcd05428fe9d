"""Weights in one file: ``.safetensors``, or what ``torch.save`` wrote of a state_dict."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from refitkit.errors import Problem, SourceError
from refitkit.model import TensorInfo
from refitkit.recipe import TensorMap

if TYPE_CHECKING:
    from pathlib import Path

    from refitkit.protocols import WeightSource

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
"""torch's names of the dtypes of the safetensors format (its README, "Format")."""

_TORCH_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt"}


def is_file(path: Path) -> bool:
    """Whether there is a file, or a link to one; also of a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def open_file(path: Path) -> WeightSource | None:
    """Open a weights file by its suffix; None where the suffix is another plugin's.

    Raises:
        SourceError: It is missing, truncated or holds something else.
    """
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in _TORCH_SUFFIXES:
        return _torch_file(path)
    return None


class SafetensorsFile:
    """One ``.safetensors`` file, mapped: its header is read now, tensors on demand."""

    def __init__(self, path: Path) -> None:
        """Open and check it.

        Raises:
            SourceError: It is missing, truncated or not of this format.
        """
        self.description = f"{str(path)!r}"
        try:
            file: Any = safe_open(path, framework="pt")
            self._names = dict.fromkeys(file.keys())
        except (SafetensorError, OSError, RuntimeError) as exc:
            raise SourceError(
                f"{self.description} cannot be read as safetensors: {exc}.",
                hint="Check that it was written or downloaded completely.",
            ) from exc
        self._file = file

    def names(self) -> Collection[str]:
        """All names in the file."""
        return self._names.keys()

    def info(self, fqn: str) -> TensorInfo:
        """Dtype and shape, from the header."""
        if fqn not in self._names:
            raise KeyError(fqn)
        part = self._file.get_slice(fqn)
        text = part.get_dtype()
        unusable = "" if text in _DTYPES else f"dtype {text}, which torch does not have"
        dtype = _DTYPES.get(text, text)
        return TensorInfo(dtype=dtype, shape=tuple(part.get_shape()), unusable=unusable)

    def get(self, fqn: str) -> torch.Tensor:
        """The tensor, on the CPU."""
        if fqn not in self._names:
            raise KeyError(fqn)
        try:
            tensor: torch.Tensor = self._file.get_tensor(fqn)
        except (SafetensorError, OSError, RuntimeError) as exc:
            raise SourceError(f"{self.description}: {fqn!r} cannot be read: {exc}.") from exc
        return tensor


def _torch_file(path: Path) -> TensorMap:
    """What ``torch.save`` wrote: read with ``weights_only=True``, mapped where it can be."""
    what = f"{str(path)!r}"
    state = _read(path, what)
    if not isinstance(state, Mapping):
        raise SourceError(f"{what} holds a {type(state).__name__}, not a state_dict.")
    problems = [
        Problem(str(name), "not a tensor", _shown(value), hint=_nested_hint(name, value))
        for name, value in state.items()
        if not isinstance(name, str)
        or (not isinstance(value, torch.Tensor) and name.rpartition(".")[2] != "_extra_state")
    ]
    if problems:
        message = f"{what} holds more than the tensors of a state_dict."
        raise SourceError(message, problems=problems)
    return TensorMap(state, what)


def _read(path: Path, what: str) -> Any:
    hint = "Save tensors alone: torch.save(model.state_dict(), path), or use safetensors."
    try:
        with path.open("rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"  # files older than torch 1.6 cannot be mapped
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the file's age, which is no fault
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as exc:
        first = str(exc).splitlines()[0]
        message = f"{what} holds more than tensors, and refitkit runs no code from files: {first}"
        raise SourceError(message, hint=hint) from exc
    except Exception as exc:  # no code of the file runs: whatever is raised, it cannot be read
        raise SourceError(f"{what} cannot be read with torch.load: {exc}.", hint=hint) from exc


def _shown(value: object) -> str:
    size = f" of {len(value)} entries" if isinstance(value, Mapping) else ""
    return f"a {type(value).__name__}{size}"


def _nested_hint(name: object, value: object) -> str:
    if isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) for v in value.values()):
        return f"a state_dict may be inside: pass torch.load(path, weights_only=True)[{name!r}]"
    return ""
