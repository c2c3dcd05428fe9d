"""Keys of adapter files: the module of the model that an entry is for, and its role there.

:func:`read_key` understands the keys of peft (``tuners/lora/layer.py`` and
``utils/save_and_load.py``, 0.21.2), of new and old diffusers (``utils/state_dict_utils.py``,
0.42.1), and of kohya's scripts, which write module names with underscores
(``loaders/lora_conversion_utils.py`` of diffusers).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection


class Role(StrEnum):
    """The role of an entry in its module.

    ``DOWN`` and ``UP`` are the factors of layers, ``TABLE_DOWN`` and ``TABLE_UP`` those of
    embeddings. ``WHOLE`` replaces a weight. ``FOREIGN`` is of another kind of adapter than LoRA.
    """

    DOWN = "lora_A"
    UP = "lora_B"
    UP_BIAS = "lora_B.bias"
    TABLE_DOWN = "lora_embedding_A"
    TABLE_UP = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    ALPHA = "alpha"
    WHOLE = "whole"
    FOREIGN = "foreign"


@dataclass(frozen=True)
class AdapterKey:
    """A parsed key of an adapter file.

    Attributes:
        text: The key.
        role: Role of the entry.
        module: Path of the module in the model; for a whole weight its name.
        adapter: Name of the adapter in the key; empty if there is none.
        component: Model of the pipeline in the key, such as ``unet``; empty if there is none.
        flat: Whether the path has underscores instead of dots.
        of_base: Whether the entry is a weight of the base model that was saved with the adapter.
    """

    text: str
    role: Role
    module: str
    adapter: str = ""
    component: str = ""
    flat: bool = False
    of_base: bool = False


_NAME = r"(?:\.(?P<adapter>[^.]+))?"
_FORMS: tuple[tuple[str, Role], ...] = (
    # peft, and new diffusers
    (rf"\.lora_A{_NAME}\.weight", Role.DOWN),
    (rf"\.lora_B{_NAME}\.weight", Role.UP),
    (rf"\.lora_B{_NAME}\.bias", Role.UP_BIAS),
    (rf"\.lora_embedding_A{_NAME}", Role.TABLE_DOWN),
    (rf"\.lora_embedding_B{_NAME}", Role.TABLE_UP),
    (r"\.lora_magnitude_vector(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?", Role.MAGNITUDE),
    # old diffusers
    (r"(?:_lora|\.lora|\.lora_linear_layer)\.down\.weight", Role.DOWN),
    (r"(?:_lora|\.lora|\.lora_linear_layer)\.up\.weight", Role.UP),
    # kohya's scripts
    (r"\.lora_down\.weight", Role.DOWN),
    (r"\.lora_up\.weight", Role.UP),
    (r"\.dora_scale", Role.MAGNITUDE),
    (r"\.lora\.alpha", Role.ALPHA),
    (r"\.(?:lora_)?alpha", Role.ALPHA),
)
_READERS = [(re.compile(rf"(?P<module>.+){form}"), role) for form, role in _FORMS]

_FOREIGN = re.compile(
    r"\.(diff|diff_b|hada_[wt]\w*|lokr_\w+|lora_mid\.weight|lora_E|lora_diag|lora_velora\w*|"
    r"lora_monteclora\w*|lora_arrow|trainable_tokens_delta|w_norm|b_norm|on_input)(\.|$)|"
    r"(^|\.)(ia3_|vera_|oft_|boft_|hra_|vblora_|randlora_|fourierft_|waveft_|c3a_|prompt_)\w+"
)
"""Entries of other kinds of adapters: of LyCORIS, and of other tuners of peft."""

_COMPONENT = re.compile(r"(unet|transformer(?:_\d)?|text_encoder(?:_\d)?)\.")
"""Prefix that diffusers adds to module names (``pack_weights`` in ``loaders/lora_base.py``)."""

# kohya's scripts join the whole path with underscores, so only the prefix names the model.
_FLAT = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
}

PEFT_PREFIX = "base_model.model."
_WRAPPERS = frozenset({"base_layer", "original_module"})
"""Path parts of peft's wrapper layers (``LoraLayer``, ``utils/other.py``)."""

_WRAPPED = re.compile(r"(^|\.)(base_layer|lora_A|lora_embedding_A)\.")
_OF_ADAPTER = re.compile(
    r"\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|modules_to_save)\."
)

_OLD_PROJECTION = re.compile(r"\.to_(q|k|v|out)_lora\.(down|up)\.weight$")


def read_key(text: str) -> AdapterKey:
    """The parsed key of an entry; any text that no form matches is the name of a whole weight."""
    # First: the forms below would take these entries for whole weights.
    if _FOREIGN.search(text):
        return AdapterKey(text, Role.FOREIGN, text)
    for reader, role in _READERS:
        found = reader.fullmatch(text)
        if found:
            adapter = found.groupdict().get("adapter") or ""
            return _with_component(text, role, found["module"], adapter)
    return _with_component(text, Role.WHOLE, *_saved_module(text))


def _with_component(text: str, role: Role, module: str, adapter: str) -> AdapterKey:
    """A key whose module path is split from wrappers and from the component of a pipeline."""
    for prefix, component in _FLAT.items():
        if module.startswith(prefix):
            flat = module.removeprefix(prefix)
            return AdapterKey(text, role, flat, adapter, component, flat=True)
    if module.startswith(PEFT_PREFIX):
        module, component = module.removeprefix(PEFT_PREFIX), ""
    else:
        found = _COMPONENT.match(module)
        component = found[1] if found else ""
    if _OLD_PROJECTION.search(text):
        # Old diffusers saved attention processors; their to_out is the first layer of a list.
        module = _without(module, frozenset({"processor"}))
        module += ".0" if module.endswith(".to_out") else ""
    of_base = ".base_layer." in f".{text}" and role is Role.WHOLE
    return AdapterKey(text, role, _without(module, _WRAPPERS), adapter, component, of_base=of_base)


def _saved_module(text: str) -> tuple[str, str]:
    """Name of the weight and of the adapter for an entry of ``modules_to_save``."""
    parts = text.split(".")
    if "modules_to_save" not in parts[:-1]:
        return text, ""
    # The path is <module>.modules_to_save[.<adapter>].<parameter>.
    at = parts.index("modules_to_save")
    named = len(parts) - at > 2  # noqa: PLR2004 - the adapter, and at least one more
    name = ".".join(parts[:at] + parts[at + 1 + named :])
    return name, parts[at + 1] if named else ""


def _without(path: str, wrappers: frozenset[str]) -> str:
    return ".".join(part for part in path.split(".") if part not in wrappers)


def names_of_base(names: Collection[str]) -> tuple[dict[str, str], int]:
    """The model's names of a base, also if it was saved from a model with adapters.

    Args:
        names: Names of the entries in a source.

    Returns:
        The source's name for each name of the model, and the number of entries that are left out
        because they belong to adapters.
    """
    # Only a base that shows adapters: others may have modules with these names.
    if not any(_WRAPPED.search(name) for name in names):
        return {name: name for name in names}, 0
    found = {
        _without(name.removeprefix(PEFT_PREFIX), _WRAPPERS): name
        for name in names
        if not _OF_ADAPTER.search(name)
    }
    return found, len(names) - len(found)
