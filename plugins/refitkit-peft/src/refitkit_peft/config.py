"""``adapter_config.json``: what peft keeps beside an adapter, read as data.

Fields and their meaning are those of ``peft.LoraConfig`` (peft 0.21.2, ``tuners/lora/config.py``).
Nothing in it is run, followed or downloaded: ``base_model_name_or_path`` is text.
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

NOT_MERGED = {
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


def _no_flag(value: Any) -> Any:
    """Pydantic reads ``true`` as the number 1."""
    if isinstance(value, bool):
        raise ValueError("a number is needed")  # noqa: TRY004 - pydantic collects ValueErrors
    return value


_Rank = Annotated[int, BeforeValidator(_no_flag), Field(gt=0)]
_Alpha = Annotated[float, BeforeValidator(_no_flag), Field(gt=0, allow_inf_nan=False)]
"""An alpha of 0 is refused: kohya's scripts take it as the rank, and for peft it adds nothing."""


class AdapterConfig(BaseModel):
    """The fields of ``LoraConfig`` that determine the values an adapter adds to weights.

    Attributes:
        peft_type: The kind of adapter.
        r: Rank; None if the file does not say.
        lora_alpha: The adapter adds ``lora_alpha / r`` times the product of its factors. None if
            the file does not say: peft would take 8, but peft itself always writes the field.
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
        """Read a file.

        Raises:
            SourceError: It is no such config; lists everything that is wrong.
        """
        what = f"{str(path)!r} cannot be read as the config of an adapter"
        try:
            if path.stat().st_size > _LIMIT:
                raise SourceError(f"{what}: it has more than {_LIMIT} bytes.")
            return cls.model_validate(parsed(path.read_bytes()))
        except OSError as exc:
            raise_if_resource(exc, what)
            raise SourceError(f"{what}: {exc}.") from exc
        except ValidationError as exc:
            raise SourceError(f"{what}.", problems=_problems(exc, path.name)) from exc
        except ValueError as exc:
            problem = Problem(path.name, "no JSON", hint=str(exc))
            raise SourceError(f"{what}.", problems=[problem]) from exc

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
            if value and name in NOT_MERGED:
                yield Problem(name, "cannot be merged", hint=NOT_MERGED[name])
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

    def rank(self, *modules: str) -> int | None:
        """The rank that a module's factors are to have; None if the config does not say.

        Args:
            modules: Names of the module: with and without the prefix of its component.
        """
        return self.rank_pattern.get(_matching(self.rank_pattern, modules), self.r)

    def scaling(self, rank: int, *modules: str) -> float | None:
        """The factor of a module's product, before the user's scale; None if alpha is unknown.

        Args:
            rank: The rank of the module's factors.
            modules: Names of the module: with and without the prefix of its component.
        """
        key = _matching(self.alpha_pattern, modules)
        alpha = self.alpha_pattern.get(key, self.lora_alpha)
        return None if alpha is None else self.scaling_of(alpha, rank)

    def scaling_of(self, alpha: float, rank: int) -> float:
        """The same for a given alpha.

        ``LoraLayer.update_layer`` in ``tuners/lora/layer.py``, peft 0.21.2.
        """
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parsed(text: str | bytes) -> Any:
    """JSON as data.

    Raises:
        ValueError: It is no JSON, is nested too deeply, or gives one name two values.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:80]!r} is given twice")
        found[name] = value
    return found


def _matching(patterns: Iterable[str], modules: Iterable[str]) -> str:
    """The first pattern that a module's name ends with; ``get_pattern_key`` in ``utils/other.py``.

    The longest of these names has a few hundred letters, and ``_plain`` bounds the work for each.
    """
    names = list(modules)
    found = (key for key in patterns if any(re.match(rf"(.*\.)?({key})$", name) for name in names))
    return next(found, names[0])


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
