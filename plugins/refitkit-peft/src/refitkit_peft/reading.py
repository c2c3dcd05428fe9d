"""Adapter files as tensors and declarations. Data alone: nothing is run, followed or downloaded.

A folder holds what ``PeftModel.save_pretrained`` writes: ``adapter_config.json`` and
``adapter_model.safetensors`` or ``.bin`` (peft 0.21.2, ``utils/constants.py``), or what
``save_lora_weights`` of diffusers writes: ``pytorch_lora_weights`` of the same kinds, without a
config (0.42.1, ``loaders/lora_base.py``). A file alone comes from diffusers, kohya's scripts or
other trainers; ``declarations`` knows their metadata.
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
from refitkit_peft.files import Files, path_of
from refitkit_peft.keys import Part, read_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from refitkit.protocols import WeightSource

CONFIG = "adapter_config.json"
_STEM = "adapter_model"
_STEM_OF_DIFFUSERS = "pytorch_lora_weights"
_KINDS = (".safetensors", ".bin")
_LIMIT = 1 << 34
"""Elements of an adapter: it is read whole."""
_DEPTH, _VISITED = 4, 1 << 20
"""How deep dictionaries of a file of ``torch.save`` are looked into, and how many entries of it."""


@dataclass(frozen=True)
class Contents:
    """What an adapter's files hold.

    Attributes:
        what: What it is, for messages.
        tensors: Copies that nobody else has, on the CPU, contiguous, by key.
        declarations: Everything that is said of alpha, rank and settings.
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
    """Read an adapter whole: config and tensors are of one version of its files.

    Args:
        adapter: A folder, a file, a mapping from keys to tensors, or anything else that a user
            calls weights. In a mapping an alpha may be a plain number.
        open_weights: Opens files and mappings.
        config: Fields of ``LoraConfig``, in place of everything that the files declare.
        reread: Whether files with tensors are read a second time, and compared.

    Raises:
        SourceError: It cannot be read, was written to meanwhile, or holds more than tensors; lists
            everything that is wrong.
    """
    path = path_of(adapter)
    file, beside = _files(path) if path is not None else (None, None)
    if file is None and isinstance(adapter, str):
        message = f"There is no adapter of the name {adapter!r}, and no file or folder."
        raise SourceError(message, hint="Add it: base.add(name, path).")
    files = Files.of(one for one in (file, beside) if one is not None)  # before they are read
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
        files.require_unchanged(what)  # which names the config, too
        raise
    files.require_unchanged(what)
    return Contents(what, tensors, tuple(found))


def _opened(
    adapter: object, file: Path | None, open_weights: Callable[[object], WeightSource]
) -> WeightSource:
    """The tensors of an adapter, without declarations that are right among them.

    Raises:
        SourceError: They cannot be read.
    """
    if file is None:
        if isinstance(adapter, Mapping):
            adapter = {key: _as_tensor(key, value) for key, value in adapter.items()}
        return open_weights(adapter)
    try:
        return open_weights(file)
    except SourceError as exc:
        others = {problem.subject for problem in exc.problems if problem.kind == "not a tensor"}
        if not others or len(others) < len(exc.problems) or not all(map(may_declare, others)):
            raise
        state = _loaded(file, "cpu")
        if not isinstance(state, Mapping) or len(others) == len(state):
            raise
        return open_weights({key: value for key, value in state.items() if key not in others})


def _as_tensor(key: object, value: object) -> object:
    """A number as a tensor, where the key says that it is an alpha."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and isinstance(key, str) and read_key(key).part is Part.ALPHA:
        return torch.tensor(float(value), dtype=torch.float64)  # type: ignore[arg-type]
    return value


def _files(path: Path) -> tuple[Path, Path | None]:
    """The file with the tensors, and that with the config."""
    if not path.is_dir():
        beside = path.parent / CONFIG
        mine = path.stem == _STEM and beside.is_file()
        return path, beside if mine else None
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
            "save_pretrained of peft and save_lora_weights of diffusers write one; of another file,"
            " pass its path."
        )
        raise SourceError(message, problems=problems, hint=hint)
    return file, config


def _preferred(folder: Path, stem: str) -> Path | None:
    files = (folder / f"{stem}{kind}" for kind in _KINDS)
    return next((file for file in files if file.is_file()), None)


def _require_mergeable(config: AdapterConfig, what: str) -> None:
    problems = list(config.unmergeable())
    if problems:
        message = f"{what} is no adapter that can be merged into weights."
        raise SourceError(message, problems=problems)


def _metadata(file: Path) -> Mapping[str, Any]:
    """The entries of a file that are no tensors.

    Returns:
        The header of a safetensors file, or numbers, texts and dictionaries of one of
        ``torch.save``, by names with dots.
    """
    try:
        return read_metadata(file)  # safetensors itself would map the file, which can be cut
    except (OSError, ValueError, RecursionError) as exc:
        raise_if_resource(exc, f"{str(file)!r} cannot be read")
        state = _loaded(file, "meta")
        return dict(_plain_entries(state)) if isinstance(state, Mapping) else {}


def _loaded(file: Path, device: str) -> object:
    """The content of a file of ``torch.save``, as data alone; None if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the file's age, which is no fault
            return torch.load(file, map_location=device, weights_only=True, mmap=False)
    except Exception as exc:  # noqa: BLE001 - who knows its format has read its tensors already
        raise_if_resource(exc, f"{str(file)!r} cannot be read")
        return None


def _plain_entries(state: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Everything but tensors, in the dictionaries that hold these: names with dots, and values."""
    left = _VISITED
    entered = [("", 0, state)]
    while entered:
        before, depth, some = entered.pop()
        for key, value in some.items():
            left -= 1
            if left < 0:
                return
            if not isinstance(key, str) or isinstance(value, torch.Tensor):
                continue
            if isinstance(value, Mapping) and depth < _DEPTH and _has_tensors(value):
                entered.append((f"{before}{key}.", depth + 1, value))
            else:
                yield before + key, value


def _has_tensors(value: object) -> bool:
    """Whether it is a dictionary with tensors in it, or in the dictionaries in it."""
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
    """All of a source, as copies of our own: a file may be written to while they are used.

    Raises:
        SourceError: Entries are no tensors, or it is too large.
    """
    infos = {name: source.info(name) for name in source.names()}
    problems = [Problem(n, "unusable", i.unusable) for n, i in infos.items() if i.unusable]
    if problems:
        raise SourceError(f"{what} holds more than tensors.", problems=problems)
    size = sum(info.count for info in infos.values())
    if size > _LIMIT:
        raise SourceError(f"{what} is too large for an adapter: {size} elements.")
    return {
        name: source.get(name).detach().to("cpu", copy=True).contiguous() for name in source.names()
    }
