"""``adapter_config.json``, the config that peft saves beside an adapter, parsed as data.

The fields are those of ``peft.LoraConfig`` (peft 0.21.2, ``tuners/lora/config.py``). Nothing in the
file is executed, followed or downloaded; ``base_model_name_or_path`` is only text.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    field_validator,
)
from refitkit.errors import Problem, SourceError, raise_if_resource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

_LIMIT = 1 << 24
"""Largest size in bytes. A config with a rank for each of 100,000 modules is smaller."""

_TRAINING_ONLY = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform"),
    *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules"),
    "task_type",
}
"""Settings of the training, which do not change the values that an adapter adds to a weight."""

_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that change the base (``LoraLayer.update_layer`` in ``tuners/lora/layer.py``)."""

NOT_MERGED = {
    "alora_invocation_tokens": "it applies to some tokens only",
    "arrow_config": "a router chooses among adapters for each token",
    "kasa_config": "it was trained on a truncated base, not on this one",
    "layer_replication": "its model repeats layers",
    "megatron_config": "its layers are those of Megatron",
    "monteclora_config": "its factors are random",
    "target_parameters": "its file does not say which of several parameters it adds to",
    "trainable_token_indices": "it replaces single rows of an embedding",
    "use_bdlora": "its factors are stored as blocks",
    "use_qalora": "it adds to groups of a quantized weight",
    "velora_config": "its file has tensors beside the factors that this plugin cannot read",
}
"""Settings of adapters that no weight can represent, or that have no formula here; with reasons."""

_NEWEST = (0, 21)
"""Newest peft whose source this plugin follows."""

_QUANTIFIED_GROUP = re.compile(r"\)[*+{]")
_MANY_QUANTIFIERS = 3


def _not_bool(value: Any) -> Any:
    """Refuse booleans, which pydantic would convert to numbers."""
    if isinstance(value, bool):
        raise ValueError("a number is needed")  # noqa: TRY004 - pydantic collects ValueErrors
    return value


_Rank = Annotated[int, BeforeValidator(_not_bool), Field(gt=0)]
# An alpha of 0 is ambiguous: kohya's scripts use the rank then, and peft adds nothing.
_Alpha = Annotated[float, BeforeValidator(_not_bool), Field(gt=0, allow_inf_nan=False)]


class AdapterConfig(BaseModel):
    """The fields of ``LoraConfig`` that determine the values an adapter adds to weights.

    Attributes:
        peft_type: Kind of adapter.
        r: Rank; None if not declared.
        lora_alpha: The adapter adds ``lora_alpha / r`` times the product of its factors. None if
            not declared: peft's default is 8, but peft always writes the field.
        rank_pattern: Ranks of some modules, by regular expressions of module names.
        alpha_pattern: Alphas of some modules, by regular expressions of module names.
        use_rslora: Whether the factor is ``lora_alpha / sqrt(r)`` instead.
        use_dora: Whether the adapter has DoRA magnitudes.
        fan_in_fan_out: Whether weights are stored as (in, out).
        lora_bias: Whether the second factors have biases.
        bias: Biases of the base that were trained: ``none``, ``all`` or ``lora_only``.
        init_lora_weights: Initialization of the factors.
        peft_version: Version of peft that saved the adapter.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    peft_type: str = "LORA"
    r: _Rank | None = None
    lora_alpha: _Alpha | None = None
    rank_pattern: dict[str, _Rank] = Field(default_factory=dict)
    alpha_pattern: dict[str, _Alpha] = Field(default_factory=dict)
    use_rslora: StrictBool = False
    use_dora: StrictBool = False
    fan_in_fan_out: StrictBool = False
    lora_bias: StrictBool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    peft_version: str | None = None

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return value or {}

    @classmethod
    def load(cls, path: Path) -> AdapterConfig:
        """The config in a file.

        Raises:
            SourceError: The file is not a valid config; lists every problem.
        """
        what = f"{str(path)!r} cannot be read as the config of an adapter"
        try:
            if path.stat().st_size > _LIMIT:
                raise SourceError(f"{what}: it is larger than {_LIMIT} bytes.")
            return cls.model_validate(parsed(path.read_bytes()))
        except OSError as exc:
            raise_if_resource(exc, what)
            raise SourceError(f"{what}: {exc}.") from exc
        # ValidationError is a ValueError, so it has to come first.
        except ValidationError as exc:
            raise SourceError(f"{what}.", problems=_problems(exc, path.name)) from exc
        except ValueError as exc:
            problem = Problem(path.name, "not JSON", hint=str(exc))
            raise SourceError(f"{what}.", problems=[problem]) from exc

    @classmethod
    def of(cls, given: Mapping[str, Any], what: str) -> AdapterConfig:
        """A config from plain data.

        Args:
            given: Fields of ``LoraConfig``.
            what: Description of the adapter, for messages.

        Raises:
            SourceError: The fields are not a valid config; lists every problem.
        """
        try:
            return cls.model_validate(dict(given))
        except ValidationError as exc:
            message = f"The config of {what} cannot be used."
            raise SourceError(message, problems=_problems(exc, what)) from exc

    def unmergeable(self) -> Iterator[Problem]:
        """A problem for each setting whose effect cannot be merged into weights."""
        kind = self.peft_type.rpartition(".")[2].upper()
        if kind != "LORA":
            yield Problem("peft_type", "cannot be merged", kind, "LORA")
            return
        init = self.init_lora_weights
        # These adapters are differences to a base that the initialization changed.
        if isinstance(init, str) and init.lower().startswith(_OTHER_BASES):
            hint = "save it with path_initial_model_for_weight_conversion, to convert it to yours"
            yield Problem("init_lora_weights", "made for a changed base", init, hint=hint)
        for name, value in (self.model_extra or {}).items():
            # Unset settings are harmless: newer versions of peft write all fields with defaults.
            if value and name in NOT_MERGED:
                yield Problem(name, "cannot be merged", hint=NOT_MERGED[name])
            elif value and name not in _TRAINING_ONLY:
                hint = "this plugin does not know it; a newer peft may"
                yield Problem(name, "unknown setting", repr(value)[:80], hint=hint)
        for pattern in [*self.rank_pattern, *self.alpha_pattern]:
            if not _is_fast(pattern):
                yield Problem(pattern, "pattern", hint="the regular expression may be too slow")

    @property
    def is_known(self) -> bool:
        """Whether the peft that saved the adapter is not newer than the one followed here."""
        found = re.match(r"(\d{1,4})\.(\d{1,4})", self.peft_version or "0.0")
        return found is not None and (int(found[1]), int(found[2])) <= _NEWEST

    def rank(self, *modules: str) -> int | None:
        """The declared rank of a module's factors; None if not declared.

        Args:
            modules: Names of the module: with and without the prefix of its component.
        """
        return self.rank_pattern.get(_matching(self.rank_pattern, modules), self.r)

    def scaling(self, rank: int, *modules: str) -> float | None:
        """The factor of a module's product, before the user's scale; None if alpha is unknown.

        Args:
            rank: Rank of the module's factors.
            modules: Names of the module: with and without the prefix of its component.
        """
        key = _matching(self.alpha_pattern, modules)
        alpha = self.alpha_pattern.get(key, self.lora_alpha)
        return None if alpha is None else self.scaling_of(alpha, rank)

    def scaling_of(self, alpha: float, rank: int) -> float:
        """The factor for an alpha and a rank.

        Formula of ``LoraLayer.update_layer`` in ``tuners/lora/layer.py``, peft 0.21.2.
        """
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parsed(text: str | bytes) -> Any:
    """The data in a JSON text.

    Raises:
        ValueError: The text is not JSON, is nested too deeply, or repeats a name in an object.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:80]!r} is repeated")
        found[name] = value
    return found


def _matching(patterns: Iterable[str], modules: Iterable[str]) -> str:
    """The first pattern that matches the end of a module's name, else a name.

    As ``get_pattern_key`` in ``utils/other.py`` of peft. ``_is_fast`` bounds the time of a match.
    """
    # The regular expression is peft's, so that the same modules match.
    names = list(modules)
    found = (key for key in patterns if any(re.match(rf"(.*\.)?({key})$", name) for name in names))
    return next(found, names[0])


def _is_fast(pattern: str) -> bool:
    """Whether a match takes at most polynomial time of low degree in the length of a name.

    Repeated groups can take exponential time, and many repeats a high degree. The pattern comes
    from a file, which may be hostile.
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
