"""Read adapter files as tensors and declarations.

Files are parsed as data: nothing in them is executed, followed or downloaded. A folder contains
either the files of ``PeftModel.save_pretrained``: ``adapter_config.json`` and
``adapter_model.safetensors`` or ``.bin`` (peft 0.21.2, ``utils/constants.py``); or the file of
``save_lora_weights`` of diffusers: ``pytorch_lora_weights`` with the same suffixes and no config
(0.42.1, ``loaders/lora_base.py``). A single file comes from diffusers, kohya's scripts or other
trainers; :mod:`refitkit_peft.declarations` parses its metadata.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from refitkit.errors import Problem, SourceError, raise_if_resource
from refitkit.files.safetensors_format import read_metadata
from refitkit.protocols import MayChange
from refitkit.recipe.sources import require_reread

from refitkit_peft.config import AdapterConfig
from refitkit_peft.declarations import Declaration, declarations_in, may_declare
from refitkit_peft.files import FileSnapshot, path_of
from refitkit_peft.keys import Role, read_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from refitkit.protocols import WeightSource

CONFIG = "adapter_config.json"
_STEM = "adapter_model"
_STEM_OF_DIFFUSERS = "pytorch_lora_weights"
_KINDS = (".safetensors", ".bin")
_LIMIT = 1 << 34
"""Largest number of elements in an adapter, which is read whole."""
_DEPTH, _VISITED = 4, 1 << 20
"""Largest depth of dictionaries in a ``torch.save`` file, and largest number of entries to visit.
"""


@dataclass(frozen=True)
class Contents:
    """The contents of an adapter's files.

    Attributes:
        what: Description for messages.
        tensors: Contiguous copies on the CPU by key, which no other code refers to.
        declarations: All declarations of alpha, rank and settings.
    """

    what: str
    tensors: Mapping[str, torch.Tensor]
    declarations: tuple[Declaration, ...]


def read(
    adapter: object,
    open_weights: Callable[[object], WeightSource],
    config: Mapping[str, Any] | None = None,
    *,
    reread: bool = False,
) -> Contents:
    """The config and tensors of an adapter, from one version of its files.

    Args:
        adapter: A folder, a file, a mapping from keys to tensors, or any other weights that
            ``open_weights`` can open. In a mapping alpha may be a plain number.
        open_weights: Opens files and mappings as weight sources.
        config: Fields of ``LoraConfig`` in place of all declarations in the files.
        reread: Whether files with tensors are read a second time and compared.

    Raises:
        SourceError: The adapter cannot be read, changed while it was read, or contains entries
            other than tensors; lists every problem.
    """
    path = path_of(adapter)
    file, beside = _files(path) if path is not None else (None, None)
    if file is None and isinstance(adapter, str):
        message = f"There is no adapter, file or folder with the name {adapter!r}."
        raise SourceError(message, hint="Add it: base.add(name, path).")
    # Take the snapshot before reading, so that any later write shows.
    files = FileSnapshot.of(one for one in (file, beside) if one is not None)
    what = repr(str(path)) if path is not None else f"an adapter in a {type(adapter).__name__}"
    source = _opened(adapter, file, open_weights)
    found: list[Declaration] = []
    if config is not None:
        found = [Declaration("config", AdapterConfig.of(config, what))]
    else:
        if beside is not None:
            found.append(Declaration(CONFIG, AdapterConfig.load(beside)))
        found += declarations_in({} if file is None else _metadata(file), what)
    for one in found:
        _require_mergeable(one.config, what)
    try:
        tensors = _copies(source, what)
        if isinstance(source, MayChange):
            source.require_unchanged()
        if reread:
            require_reread(source)
    except SourceError:
        # If the files changed, that is the cause. This also covers the config.
        files.require_unchanged(what)
        raise
    files.require_unchanged(what)
    return Contents(what, tensors, tuple(found))


def _opened(
    adapter: object, file: Path | None, open_weights: Callable[[object], WeightSource]
) -> WeightSource:
    """The tensors of an adapter, without declarations that a file has among its tensors.

    Raises:
        SourceError: The adapter cannot be read.
    """
    if file is None:
        if isinstance(adapter, Mapping):
            adapter = {key: _as_tensor(key, value) for key, value in adapter.items()}
        return open_weights(adapter)
    try:
        return open_weights(file)
    except SourceError as exc:
        # Only if declarations are the sole problem, read the file again without them.
        others = {problem.subject for problem in exc.problems if problem.kind == "not a tensor"}
        if not others or len(others) < len(exc.problems) or not all(map(may_declare, others)):
            raise
        state = _loaded(file, "cpu")
        if not isinstance(state, Mapping) or len(others) == len(state):
            raise
        return open_weights({key: value for key, value in state.items() if key not in others})


def _as_tensor(key: object, value: object) -> object:
    """A plain number of alpha as a tensor; any other value unchanged."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and isinstance(key, str) and read_key(key).role is Role.ALPHA:
        return torch.tensor(float(value), dtype=torch.float64)  # type: ignore[arg-type]
    return value


def _files(path: Path) -> tuple[Path, Path | None]:
    """The file with the tensors, and the file with the config if there is one.

    Raises:
        SourceError: The folder lacks one of the two.
    """
    if not path.is_dir():
        # Only adapter_model.* belongs to the config: other files may lie there by chance.
        beside = path.parent / CONFIG
        belongs = path.stem == _STEM and beside.is_file()
        return path, beside if belongs else None
    file, config = _preferred(path, _STEM), path / CONFIG
    of_diffusers = _preferred(path, _STEM_OF_DIFFUSERS)
    if file is None and of_diffusers is not None and not config.is_file():
        return of_diffusers, None
    problems = []
    if not config.is_file():
        problems.append(Problem(CONFIG, "missing"))
    if file is None:
        problems.append(Problem(f"{_STEM}.safetensors", "missing"))
    if problems or file is None:
        message = f"{str(path)!r} is not the folder of an adapter."
        hint = (
            "Pass a folder that save_pretrained of peft or save_lora_weights of diffusers wrote, "
            "or the path of a file."
        )
        raise SourceError(message, problems=problems, hint=hint)
    return file, config


def _preferred(folder: Path, stem: str) -> Path | None:
    files = (folder / f"{stem}{kind}" for kind in _KINDS)
    return next((file for file in files if file.is_file()), None)


def _require_mergeable(config: AdapterConfig, what: str) -> None:
    problems = list(config.unmergeable())
    if problems:
        message = f"{what} cannot be merged into weights."
        raise SourceError(message, problems=problems)


def _metadata(file: Path) -> Mapping[str, Any]:
    """The entries of a file that are not tensors.

    Returns:
        The header of a safetensors file; or the numbers, texts and dictionaries of a
        ``torch.save`` file, by names with dots.
    """
    try:
        # The safetensors package maps the file: a truncated one would crash the process.
        return read_metadata(file)
    except (OSError, ValueError, RecursionError) as exc:
        raise_if_resource(exc, f"{str(file)!r} cannot be read")
        state = _loaded(file, "meta")
        return dict(_plain_entries(state)) if isinstance(state, Mapping) else {}


def _loaded(file: Path, device: str) -> object:
    """The content of a ``torch.save`` file as data; None if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the age of some formats
            return torch.load(file, map_location=device, weights_only=True, mmap=False)
    except Exception as exc:  # noqa: BLE001 - open_weights reports what is wrong with the file
        raise_if_resource(exc, f"{str(file)!r} cannot be read")
        return None


def _plain_entries(state: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Names with dots and values of all entries that are not tensors.

    Dictionaries that contain tensors are entered; other dictionaries are values.
    """
    left = _VISITED
    pending = [("", 0, state)]
    while pending:
        before, depth, some = pending.pop()
        for key, value in some.items():
            left -= 1
            if left < 0:
                return
            if not isinstance(key, str) or isinstance(value, torch.Tensor):
                continue
            if isinstance(value, Mapping) and depth < _DEPTH and _has_tensors(value):
                pending.append((f"{before}{key}.", depth + 1, value))
            else:
                yield before + key, value


def _has_tensors(value: object) -> bool:
    """Whether a value is a dictionary with tensors, directly or one level deeper."""
    if not isinstance(value, Mapping):
        return False
    inner = list(value.values())
    return any(isinstance(one, torch.Tensor) for one in inner) or any(
        isinstance(two, torch.Tensor)
        for one in inner
        if isinstance(one, Mapping)
        for two in one.values()
    )


def _copies(source: WeightSource, what: str) -> dict[str, torch.Tensor]:
    """Copies of all tensors of a source, so that later writes to its files do not matter.

    Raises:
        SourceError: Some entries are not tensors, or the adapter is too large.
    """
    infos = {name: source.info(name) for name in source.names()}
    problems = [Problem(n, "unusable", i.unusable) for n, i in infos.items() if i.unusable]
    if problems:
        raise SourceError(f"{what} contains entries other than tensors.", problems=problems)
    size = sum(info.count for info in infos.values())
    if size > _LIMIT:
        raise SourceError(f"{what} is too large for an adapter: {size} elements.")
    return {
        name: source.get(name).detach().to("cpu", copy=True).contiguous() for name in source.names()
    }
