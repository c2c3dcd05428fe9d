"""Adapter files as tensors and a config. Data alone: nothing is run, followed or downloaded.

A folder holds what ``PeftModel.save_pretrained`` writes: ``adapter_config.json`` and
``adapter_model.safetensors`` or ``.bin`` (peft 0.21.2, ``utils/constants.py``). A file alone holds
what diffusers or kohya's scripts write; newer diffusers keep peft's config in its metadata
(``LORA_ADAPTER_METADATA_KEY`` in ``loaders/lora_base.py``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from refitkit.errors import Problem, SourceError
from safetensors import SafetensorError, safe_open

from refitkit_peft.config import AdapterConfig
from refitkit_peft.files import path_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch
    from refitkit.protocols import WeightSource

CONFIG = "adapter_config.json"
_STEM = "adapter_model"
_KINDS = (".safetensors", ".bin")
_METADATA = "lora_adapter_metadata"
_LIMIT = 1 << 34
"""Elements of an adapter: it is read whole."""


@dataclass(frozen=True)
class Contents:
    """What an adapter's files hold.

    Attributes:
        what: What it is, for messages.
        tensors: Copies that nobody else has, on the CPU, contiguous, by key.
        configs: By component of a pipeline; under an empty name that of all of it.
    """

    what: str
    tensors: Mapping[str, torch.Tensor]
    configs: Mapping[str, AdapterConfig]


def read(
    adapter: object,
    open_weights: Callable[[object], WeightSource],
    config: Mapping[str, Any] | None = None,
) -> Contents:
    """Read an adapter whole.

    Args:
        adapter: A folder, a file, a mapping from keys to tensors, or anything else that a user
            calls weights.
        open_weights: Opens files and mappings.
        config: Fields of ``LoraConfig``, where the files have none, or instead of theirs.

    Raises:
        SourceError: It cannot be read, or holds more than tensors; lists everything that is wrong.
    """
    path = path_of(adapter)
    file, beside = _files(path) if path is not None else (None, None)
    if file is None and isinstance(adapter, str):
        message = f"There is no adapter of the name {adapter!r}, and no file or folder."
        raise SourceError(message, hint="Add it: base.add(name, path).")
    what = repr(str(path)) if path is not None else f"an adapter in a {type(adapter).__name__}"
    configs: dict[str, AdapterConfig] = {}
    if config is not None:
        configs = {"": AdapterConfig.of(config, what)}
    elif beside is not None:
        configs = {"": AdapterConfig.load(beside)}
    elif file is not None and file.suffix == ".safetensors":
        configs = _embedded(file, what)
    for one in configs.values():
        _require_mergeable(one, what)
    source = open_weights(adapter if file is None else file)
    return Contents(what, _copies(source, what), configs)


def _files(path: Path) -> tuple[Path, Path | None]:
    """The file with the tensors, and that with the config."""
    if not path.is_dir():
        beside = path.parent / CONFIG
        mine = path.stem == _STEM and beside.is_file()
        return path, beside if mine else None
    file = next((one for kind in _KINDS if (one := path / f"{_STEM}{kind}").is_file()), None)
    problems = []
    if not (path / CONFIG).is_file():
        problems.append(Problem(CONFIG, "missing"))
    if file is None:
        problems.append(Problem(f"{_STEM}.safetensors", "missing"))
    if problems or file is None:
        message = f"{str(path)!r} is not the folder of an adapter."
        hint = "peft's save_pretrained writes one; of another file, pass its path."
        raise SourceError(message, problems=problems, hint=hint)
    return file, path / CONFIG


def _require_mergeable(config: AdapterConfig, what: str) -> None:
    problems = list(config.unmergeable())
    if problems:
        message = f"{what} is no adapter that can be merged into weights."
        raise SourceError(message, problems=problems)


def _embedded(file: Path, what: str) -> dict[str, AdapterConfig]:
    """The configs that diffusers keeps in a file's metadata, by component."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError, RuntimeError):
        return {}  # whoever opens it for its tensors says what is wrong
    text = metadata.get(_METADATA)
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as exc:
        raise SourceError(f"The config in {what} is no JSON: {exc}.") from exc
    if not isinstance(fields, dict):
        raise SourceError(f"The config in {what} is a {type(fields).__name__}, not an object.")
    return _by_component(fields, what)


def _by_component(fields: Mapping[str, Any], what: str) -> dict[str, AdapterConfig]:
    """``{"unet.r": 4}`` as a config of ``unet``; names without a component are everybody's."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        component, _, field = name.rpartition(".")
        parts.setdefault(component, {})[field] = value
    return {one: AdapterConfig.of(given, what) for one, given in parts.items()}


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
