"""Keys of adapter files: which module of the model an entry is for, and what it is there.

They are those of peft (``tuners/lora/layer.py`` and ``utils/save_and_load.py``, 0.21.2), of
diffusers, new and old (``utils/state_dict_utils.py``, 0.42.1), and of kohya's scripts, which write
the names of modules with underscores (``loaders/lora_conversion_utils.py`` of diffusers).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection


class Part(StrEnum):
    """What an entry is to its module."""

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
class Key:
    """What a key says.

    Attributes:
        text: The key itself.
        part: What the entry is.
        module: Path of the module in the model; of a whole entry its own name.
        adapter: Name of the adapter, where the key has one.
        component: Model of the pipeline, where the key has one: ``unet``.
        flat: Whether the path is written with underscores.
        of_base: Whether it is an entry of the base model, saved with the adapter.
    """

    text: str
    part: Part
    module: str
    adapter: str = ""
    component: str = ""
    flat: bool = False
    of_base: bool = False


_NAME = r"(?:\.(?P<adapter>[^.]+))?"
_FORMS: tuple[tuple[str, Part], ...] = (
    (rf"\.lora_A{_NAME}\.weight", Part.DOWN),
    (rf"\.lora_B{_NAME}\.weight", Part.UP),
    (rf"\.lora_B{_NAME}\.bias", Part.UP_BIAS),
    (rf"\.lora_embedding_A{_NAME}", Part.TABLE_DOWN),
    (rf"\.lora_embedding_B{_NAME}", Part.TABLE_UP),
    (r"\.lora_magnitude_vector(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?", Part.MAGNITUDE),
    (r"(?:_lora|\.lora|\.lora_linear_layer)\.down\.weight", Part.DOWN),
    (r"(?:_lora|\.lora|\.lora_linear_layer)\.up\.weight", Part.UP),
    (r"\.lora_down\.weight", Part.DOWN),
    (r"\.lora_up\.weight", Part.UP),
    (r"\.dora_scale", Part.MAGNITUDE),
    (r"\.lora\.alpha", Part.ALPHA),
    (r"\.(?:lora_)?alpha", Part.ALPHA),
)
_READERS = [(re.compile(rf"(?P<module>.+){form}"), part) for form, part in _FORMS]

_FOREIGN = re.compile(
    r"\.(diff|diff_b|hada_[wt]\w*|lokr_\w+|lora_mid\.weight|lora_E|lora_diag|lora_velora\w*|"
    r"lora_monteclora\w*|lora_arrow|trainable_tokens_delta|w_norm|b_norm|on_input)(\.|$)|"
    r"(^|\.)(ia3_|vera_|oft_|boft_|hra_|vblora_|randlora_|fourierft_|waveft_|c3a_|prompt_)\w+"
)
"""Entries of adapters of other kinds: of LyCORIS, and of other tuners of peft."""

_COMPONENT = re.compile(r"(unet|transformer(?:_\d)?|text_encoder(?:_\d)?)\.")
"""What diffusers puts before names of modules (``pack_weights`` in ``loaders/lora_base.py``)."""

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
"""Parts that peft's layers add to names of what they wrap (``LoraLayer``, ``utils/other.py``)."""

_WRAPPED = re.compile(r"(^|\.)(base_layer|lora_A|lora_embedding_A)\.")
_OF_ADAPTER = re.compile(
    r"\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|modules_to_save)\."
)

_OLD_PROJECTION = re.compile(r"\.to_(q|k|v|out)_lora\.(down|up)\.weight$")


def read_key(text: str) -> Key:
    """What a key of an adapter file says."""
    if _FOREIGN.search(text):
        return Key(text, Part.FOREIGN, text)
    for reader, part in _READERS:
        found = reader.fullmatch(text)
        if found:
            adapter = found.groupdict().get("adapter") or ""
            return _placed(text, part, found["module"], adapter)
    return _placed(text, Part.WHOLE, *_saved(text))


def _placed(text: str, part: Part, module: str, adapter: str) -> Key:
    for prefix, component in _FLAT.items():
        if module.startswith(prefix):
            flat = module.removeprefix(prefix)
            return Key(text, part, flat, adapter, component, flat=True)
    if module.startswith(PEFT_PREFIX):
        module, component = module.removeprefix(PEFT_PREFIX), ""
    else:
        found = _COMPONENT.match(module)
        component = found[1] if found else ""
    if _OLD_PROJECTION.search(text):  # of an attention processor
        module = _without(module, frozenset({"processor"}))
        module += ".0" if module.endswith(".to_out") else ""
    of_base = ".base_layer." in f".{text}" and part is Part.WHOLE
    return Key(text, part, _without(module, _WRAPPERS), adapter, component, of_base=of_base)


def _saved(text: str) -> tuple[str, str]:
    """Name and adapter of an entry of ``modules_to_save``."""
    parts = text.split(".")
    if "modules_to_save" not in parts[:-1]:
        return text, ""
    at = parts.index("modules_to_save")
    named = len(parts) - at > 2  # noqa: PLR2004 - the adapter, and at least one more
    name = ".".join(parts[:at] + parts[at + 1 + named :])
    return name, parts[at + 1] if named else ""


def _without(path: str, wrappers: frozenset[str]) -> str:
    return ".".join(part for part in path.split(".") if part not in wrappers)


def names_of_base(names: Collection[str]) -> tuple[dict[str, str], int]:
    """Names of a base as the model's own, where it was saved from a model with adapters in it.

    Args:
        names: What a source calls its entries.

    Returns:
        The source's name by the model's; and how many entries belong to adapters and are left out.
    """
    if not any(_WRAPPED.search(name) for name in names):
        return {name: name for name in names}, 0
    found = {
        _without(name.removeprefix(PEFT_PREFIX), _WRAPPERS): name
        for name in names
        if not _OF_ADAPTER.search(name)
    }
    return found, len(names) - len(found)
