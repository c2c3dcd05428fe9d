"""``adapter_config.json``: what peft keeps beside an adapter, read as data.

Fields and their meaning are those of ``peft.LoraConfig`` (peft 0.21.2, ``tuners/lora/config.py``).
Nothing in it is run, followed or downloaded: ``base_model_name_or_path`` is text.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from refitkit.errors import Problem, SourceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

_LIMIT = 1 << 24
"""Bytes of a config: one with a rank for each of a hundred thousand modules has fewer."""

_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform"),
    *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules"),
    "task_type",
}
"""Settings that say how an adapter was trained, and not what it adds to a weight."""

_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that change the base (``LoraLayer.update_layer`` in ``tuners/lora/layer.py``)."""

_NOT_MERGED = {
    "alora_invocation_tokens": "it adds to some tokens only",
    "arrow_config": "a router chooses among adapters for each token",
    "kasa_config": "it was trained on a base that was cut down, and not on the one given here",
    "layer_replication": "its model has layers more than once",
    "megatron_config": "its layers are those of Megatron",
    "monteclora_config": "its factors are drawn at random",
    "target_parameters": "which of several parameters it adds to, its file does not tell",
    "trainable_token_indices": "it replaces single rows of an embedding",
    "use_bdlora": "its factors are stored as blocks",
    "use_qalora": "it adds to groups of a quantized weight",
    "velora_config": "what its file holds beside the factors has no reading here",
}
"""Settings that make of an adapter what no weight can hold, or what has no formula here."""

_NEWEST = (0, 21)
"""The peft whose source was read for this."""

_QUANTIFIED_GROUP = re.compile(r"\)[*+{]")
_MANY_QUANTIFIERS = 3


class AdapterConfig(BaseModel):
    """What of ``LoraConfig`` says what an adapter adds to weights.

    Attributes:
        peft_type: The kind of adapter.
        r: Rank.
        lora_alpha: The adapter adds ``lora_alpha / r`` times the product of its factors.
        rank_pattern: Other ranks, by regular expressions of names of modules.
        alpha_pattern: Other alphas, likewise.
        use_rslora: Whether it is ``lora_alpha / sqrt(r)``.
        use_dora: Whether there are magnitudes.
        fan_in_fan_out: Whether weights are stored as (in, out).
        init_lora_weights: How the factors were made at first.
        peft_version: What saved it.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    peft_type: str = "LORA"
    r: int = Field(default=8, gt=0)
    lora_alpha: float = Field(default=8, allow_inf_nan=False)
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    peft_version: str | None = None

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return value or {}

    @classmethod
    def load(cls, path: Path) -> AdapterConfig:
        """Read a file.

        Raises:
            SourceError: It is no such config; lists everything that is wrong.
        """
        what = f"{str(path)!r} cannot be read as the config of an adapter"
        try:
            if path.stat().st_size > _LIMIT:
                raise SourceError(f"{what}: it has more than {_LIMIT} bytes.")
            return cls.model_validate_json(path.read_bytes())
        except OSError as exc:
            raise SourceError(f"{what}: {exc}.") from exc
        except ValidationError as exc:
            raise SourceError(f"{what}.", problems=_problems(exc, path.name)) from exc

    @classmethod
    def of(cls, given: Mapping[str, Any], what: str) -> AdapterConfig:
        """A config from plain data.

        Raises:
            SourceError: It is no such config; lists everything that is wrong.
        """
        try:
            return cls.model_validate(dict(given))
        except ValidationError as exc:
            message = f"The config of {what} cannot be used."
            raise SourceError(message, problems=_problems(exc, what)) from exc

    def unmergeable(self) -> Iterator[Problem]:
        """Why no weights can hold what such an adapter does."""
        kind = self.peft_type.rpartition(".")[2].upper()
        if kind != "LORA":
            yield Problem("peft_type", "cannot be merged", kind, "LORA")
            return
        init = self.init_lora_weights
        if isinstance(init, str) and init.lower().startswith(_OTHER_BASES):
            hint = "save it with path_initial_model_for_weight_conversion, which makes it fit yours"
            yield Problem("init_lora_weights", "made for a changed base", init, hint=hint)
        for name, value in (self.model_extra or {}).items():
            if value and name in _NOT_MERGED:
                yield Problem(name, "cannot be merged", hint=_NOT_MERGED[name])
            elif value and name not in _HARMLESS:
                hint = "a newer peft may know what it means; this plugin does not"
                yield Problem(name, "unknown setting", repr(value)[:80], hint=hint)
        for pattern in [*self.rank_pattern, *self.alpha_pattern]:
            if not _plain(pattern):
                yield Problem(pattern, "pattern", hint="too intricate a regular expression")

    @property
    def is_known(self) -> bool:
        """Whether it was saved by a peft that this plugin was written for, or an older one."""
        found = re.match(r"(\d{1,4})\.(\d{1,4})", self.peft_version or "0.0")
        return found is not None and (int(found[1]), int(found[2])) <= _NEWEST

    def rank(self, module: str) -> int:
        """The rank that a module's factors are to have."""
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.r)

    def scaling(self, module: str, rank: int) -> float:
        """What the product of a module's factors is multiplied by, before the user's scale.

        ``LoraLayer.update_layer`` in ``tuners/lora/layer.py``, peft 0.21.2.
        """
        key = _matching(self.alpha_pattern, module)
        alpha = self.alpha_pattern.get(key, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _matching(patterns: Iterable[str], module: str) -> str:
    """The first pattern that a module's name ends with; ``get_pattern_key`` in ``utils/other.py``.

    The longest of these names has a few hundred letters, and ``_plain`` bounds the work for each.
    """
    found = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
    return next(found, module)


def _plain(pattern: str) -> bool:
    """Whether matching takes no longer than a small power of a name's length.

    Repeated groups make regular expressions take exponentially long, and many repeats long enough.
    """
    if _QUANTIFIED_GROUP.search(pattern) or sum(map(pattern.count, "*+{")) > _MANY_QUANTIFIERS:
        return False
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _problems(exc: ValidationError, what: str) -> list[Problem]:
    return [
        Problem(".".join(map(str, error["loc"])) or what, error["type"], hint=error["msg"])
        for error in exc.errors(include_input=False, include_url=False)
    ]
