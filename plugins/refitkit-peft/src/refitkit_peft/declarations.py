"""Declarations: the places in adapter files that give alpha, rank and settings.

An adapter adds ``alpha / rank`` times the product of its factors, and the factors do not show
alpha. Trainers write it in these places:

- peft: ``adapter_config.json`` (``PeftConfigMixin.save_pretrained`` in ``config.py``, 0.21.2).
- diffusers: JSON in the header entry ``lora_adapter_metadata``, each field after the name of its
  component: ``{"unet.r": 4, "unet.lora_alpha": 8}`` (``pack_weights`` and ``write_lora_layers`` in
  ``loaders/lora_base.py``, ``save_lora_adapter`` in ``loaders/peft.py``, 0.42.1).
- SimpleTuner: the same entry, or the same fields as separate header entries, written with ``str``
  (``save_lora_weights`` in ``helpers/models/ace_step/pipeline.py``; Comfy-Org/ComfyUI#15830).
- kohya's sd-scripts: ``ss_network_alpha``, ``ss_network_dim`` and, as JSON, ``ss_network_args``
  (``train_network.py``), besides one tensor ``*.alpha`` for each layer. ``resize_lora.py`` and
  ``merge_lora.py`` write ``Dynamic`` if layers differ; a missing number is ``None``.
- LyCORIS: kohya's entries, and always the tensors (``custom_state_dict`` in
  ``modules/locon.py``).
- ai-toolkit: neither for keys of peft; there alpha is the rank by definition (``peft_format``
  in ``toolkit/lora_special.py``, "no alpha" in ``toolkit/network_mixins.py``). The header entry
  ``software`` names the trainer (``toolkit/metadata.py``).
- Many others: plain entries ``lora_alpha``, ``network_alpha`` or ``alpha``, which sglang
  (sgl-project/sglang#36082) and diffusers (``MiniMaxH3LoraLoaderMixin``) also read.

``torch.save`` files have the same names beside or around the state_dict. Adapter files come from
untrusted people, so all of this is parsed as data, with limits on size, depth and number.
:func:`declarations_in` is the entry point; the parsers of each trainer follow it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from refitkit.errors import Problem, SourceError

from refitkit_peft.config import NOT_MERGED, AdapterConfig, parsed

if TYPE_CHECKING:
    from collections.abc import Iterable

_LIMIT = 1 << 24
"""Largest length of an entry. A config with a rank for each of 100,000 modules is shorter."""
_LITERAL_LIMIT = 1 << 16
"""Largest length of a Python literal, whose parser needs far more memory than JSON's."""
_DEPTH = 4
"""Largest depth of nested dictionaries."""
_SCOPES = 1 << 14
"""Largest number of layers with numbers of their own in one file."""
_SHOWN = 80
"""Largest length of a value in a message."""

_ALPHAS = frozenset({"lora_alpha", "alpha", "network_alpha"})
_RANKS = frozenset({"r", "rank", "lora_rank", "lora_r", "lora_dim", "network_dim", "network_rank"})
_ROOTS = frozenset({"rslora", "rs_lora", "use_rs_lora"})
"""Other names of ``use_rslora``; LyCORIS uses ``rs_lora``."""
_SETTINGS = (frozenset(AdapterConfig.model_fields) | NOT_MERGED.keys() | _ROOTS) - {
    *_ALPHAS,
    *_RANKS,
    "bias",
}
_TEXTS = {"peft_type", "peft_version"}
_KNOWN = _SETTINGS | {"r", "lora_alpha"}
_ABSENT = frozenset({"", "none", "null"})
_JSON = frozenset(
    {"lora_adapter_metadata", "adapter_config", "adapter_config.json", "lora_config", "peft_config"}
)
"""Entries with a whole config: the one of diffusers, and those of various trainers."""
_CONTAINERS = _JSON | frozenset(
    {"metadata", "config", "args", "hparams", "hyper_parameters", "network_config", "default"}
)
"""Names of dictionaries around settings in ``torch.save`` files; none is the name of a model."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

DENOISERS = frozenset({"unet", "transformer", "diffusion_model", "denoiser", "dit"})
"""Names of the same model in diffusers, ComfyUI and trainers."""
_COMPONENT = re.compile(
    r"(unet|transformer|text_encoder|controlnet|vae|prior|decoder)(_\d+|_ref)?|"
    + "|".join(sorted(DENOISERS))
)

_ARGUMENTS_WITH_SCALES = re.compile(r"alpha|dim|rank|rs_?lora|algo|preset|block_|factor")
"""Network arguments that give some layers other numbers than the network.

They are arguments of ``create_network`` in ``networks/lora*.py`` of sd-scripts, and of
``create_network`` in ``kohya.py`` of LyCORIS.
"""


@dataclass(frozen=True)
class Declaration:
    """A config, or a part of one, that a file declares.

    Attributes:
        where: Place in the file, for messages.
        config: The declared fields; others are None or peft's defaults.
        scope: Component of a pipeline or path of modules; empty for the whole file.
        conv: Config of layers with a kernel larger than 1; None if it is the same.
        by_layer: Setting that gives layers numbers of their own, so that only tensors count; or
            empty.
        of_rank: Whether alpha is the rank of each layer.
    """

    where: str
    config: AdapterConfig
    scope: str = ""
    conv: AdapterConfig | None = None
    by_layer: str = ""
    of_rank: bool = False

    @property
    def of_component(self) -> bool:
        """Whether the scope is the whole file or a component."""
        return not self.scope or is_component(self.scope)

    def as_data(self) -> tuple[object, ...]:
        """The parts that determine values, as plain data for a hash."""
        conv = None if self.conv is None else self.conv.model_dump(mode="json")
        fields = self.config.model_dump(mode="json")
        return self.scope, fields, conv, self.by_layer, self.of_rank


def is_component(scope: str) -> bool:
    """Whether a scope is the name of a model in a pipeline."""
    return _COMPONENT.fullmatch(scope) is not None


def may_declare(key: object) -> bool:
    """Whether an entry with this name can be a declaration instead of a weight."""
    if not isinstance(key, str):
        return False
    name = key.rpartition(".")[2]
    return key in _CONTAINERS or name in _ALPHAS or name in _RANKS or name in _SETTINGS


def declarations_in(metadata: Mapping[str, Any], what: str) -> list[Declaration]:
    """All declarations in the metadata of a file.

    Args:
        metadata: Header of a safetensors file, or the entries of a ``torch.save`` file that are
            not tensors.
        what: Description of the file, for messages.

    Raises:
        SourceError: An alpha or a rank is not a positive number, a config cannot be parsed, or
            there are too many layers; lists every problem.
    """
    problems: list[Problem] = []
    found: list[Declaration] = []
    fields: dict[str, dict[str, tuple[str, Any]]] = {}
    # Contradicting values become separate declarations: Scales reports them where both apply.
    contradicting: list[tuple[str, dict[str, tuple[str, Any]]]] = []
    for entry in _entries(metadata, problems):
        some, one = fields.setdefault(entry.scope, {}), (entry.where, entry.value)
        if _differ(some.setdefault(entry.field, one)[1], entry.value):
            contradicting.append((entry.scope, {entry.field: one}))
    if len(fields) + len(contradicting) > _SCOPES:
        message = f"The metadata of {what} has alphas and ranks for more than {_SCOPES} layers."
        raise SourceError(message)
    for scope, given in [*fields.items(), *contradicting]:
        found += _declared(scope, given, what, problems)
    found += _of_kohya(metadata, problems)
    found += _of_ai_toolkit(metadata)
    if problems:
        raise SourceError(f"The metadata of {what} cannot be used.", problems=problems)
    return found


_FIX = "correct it, or pass a config instead of the metadata: base.add(name, path, config={...})"


@dataclass(frozen=True)
class _Entry:
    """One declared field.

    Attributes:
        where: Entry of the metadata that declares it.
        scope: Component or path of modules.
        field: Name of the field in ``LoraConfig``.
        value: A number, boolean, text or dictionary.
    """

    where: str
    scope: str
    field: str
    value: Any


def _entries(metadata: Mapping[str, Any], problems: list[Problem]) -> Iterator[_Entry]:
    """Fields in all spellings except kohya's."""
    for key, value in metadata.items():
        # Three spellings: JSON text, a dictionary, and one entry for each field.
        if key in _JSON:
            config = _json(key, value, problems)
            if config is not None:
                yield from _of_config(config, key, "", _DEPTH)
        elif isinstance(value, Mapping):
            if key in _CONTAINERS or is_component(key):
                scope = key if is_component(key) else ""
                entries = _of_config(value, key, scope, _DEPTH)
                yield from (one for one in entries if one.field in _KNOWN)
        else:
            yield from _of_entry(key, value, problems)


def _json(key: str, value: Any, problems: list[Problem]) -> Mapping[str, Any] | None:
    try:
        return _object(value)
    except ValueError as exc:
        problems.append(Problem(key, "not a JSON object", _shown(value), hint=str(exc)))
        return None


def _object(value: Any) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, str) or len(value) > _LIMIT:
        raise ValueError(f"it is a {type(value).__name__}, or too long")
    config = parsed(value)
    if not isinstance(config, dict):
        raise ValueError(f"it is a {type(config).__name__}")  # noqa: TRY004 - the file is wrong
    return config


def _of_config(config: Mapping[Any, Any], where: str, scope: str, left: int) -> Iterator[_Entry]:
    """Fields of a config: plain, after a component and a dot, or in a nested dictionary."""
    for key, value in config.items():
        if not isinstance(key, str) or value is None:
            continue
        before, _, name = key.rpartition(".")
        inner = is_component(key) or key in _CONTAINERS
        # A dictionary named after a component gives its fields this scope.
        if inner and left and isinstance(value, Mapping):
            own = key if is_component(key) else scope
            yield from _of_config(value, f"{where}.{key}", own, left - 1)
        else:
            own = f"{scope}.{before}" if scope and before else before or scope
            yield _Entry(f"{where}: {key}", own, _field(name), value)


def _of_entry(key: str, value: Any, problems: list[Problem]) -> Iterator[_Entry]:
    """A field that is a separate entry, usually as text."""
    before, _, name = key.rpartition(".")
    known = name in _ALPHAS or name in _RANKS
    setting = name in _SETTINGS and (not before or is_component(before))
    # Anything else in the metadata does not concern the values of the adapter.
    if not known and not setting:
        return
    # Header entries are texts, also numbers and None.
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in _ABSENT:
            return
        if known and len(text) <= _SHOWN and _NUMBER.fullmatch(text):
            value = float(text)
        elif setting and name not in _TEXTS:
            value = _plain_value(text)
    if known and (isinstance(value, bool) or not isinstance(value, int | float)):
        problems.append(Problem(key, "number", _shown(value), "a number greater than 0", _FIX))
        return
    yield _Entry(key, before, _field(name), value)


def _field(name: str) -> str:
    if name in _ALPHAS:
        return "lora_alpha"
    if name in _ROOTS:
        return "use_rslora"
    return "r" if name in _RANKS else name


def _plain_value(text: str) -> Any:
    """The value of a text from ``json.dumps`` or ``str``; other texts unchanged."""
    try:
        return parsed(text) if len(text) <= _LIMIT else text
    except ValueError:
        pass
    try:
        return ast.literal_eval(text) if len(text) <= _LITERAL_LIMIT else text
    # ast.literal_eval documents these errors for hostile input.
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return text


def _declared(
    scope: str, given: Mapping[str, tuple[str, Any]], what: str, problems: list[Problem]
) -> Iterator[Declaration]:
    where = _main_entry(entry for entry, _ in given.values())
    # A dotted name without alpha or rank is an entry of something else.
    if scope and not is_component(scope) and not {"lora_alpha", "r"} & given.keys():
        return
    try:
        config = AdapterConfig.of({name: value for name, (_, value) in given.items()}, what)
    except SourceError as exc:
        for problem in exc.problems:
            name = problem.subject.partition(".")[0]
            entry, value = given.get(name, (where, ""))
            found = problem.found or _shown(value)
            problems.append(replace(problem, subject=entry, found=found))
        return
    yield Declaration(where, config, scope)


def _main_entry(entries: Iterable[str]) -> str:
    """The entry to name in messages: one of alpha if there is one, else the first."""
    some = list(entries)
    # Entries are named "<entry>: <key>" or "<component>.<field>".
    alphas = [one for one in some if one.rpartition(" ")[2].rpartition(".")[2] in _ALPHAS]
    return (alphas or some)[0]


# -- kohya's scripts ------------------------------------------------------------------------


def _of_kohya(metadata: Mapping[str, Any], problems: list[Problem]) -> Iterator[Declaration]:
    """Entries ``ss_network_*``; see ``create_network`` in ``networks/lora.py`` of sd-scripts."""
    alpha = _of_kohya_number("ss_network_alpha", metadata, problems)
    rank = _of_kohya_number("ss_network_dim", metadata, problems)
    if alpha is None and rank is None:
        return
    # Some arguments give single layers other numbers. Then only their tensors count.
    conv, by_layer = _arguments_of_kohya(metadata, problems)
    if rank is None and metadata.get("ss_network_dim") is not None:
        # The text is "None" with --dim_from_weights, which ignores ss_network_alpha, or "Dynamic".
        by_layer = by_layer or f"ss_network_dim: {_shown(metadata['ss_network_dim'])}"
    if alpha == 0 and "-" not in str(metadata["ss_network_alpha"]):
        # LoRAModule: "if alpha == 0 or None, alpha is rank". Each layer's tensor has the number.
        alpha, by_layer = None, by_layer or "ss_network_alpha: 0"
    given = {"ss_network_dim": ("r", rank), "ss_network_alpha": ("lora_alpha", alpha)}
    fields = {name: value for name, value in given.values() if value is not None}
    try:
        yield Declaration(
            "ss_network_dim" if alpha is None else "ss_network_alpha",
            AdapterConfig.of(fields, "the header"),
            conv=AdapterConfig.of(conv, "the header") if conv else None,
            by_layer=by_layer,
        )
    except SourceError as exc:
        entries = {name: entry for entry, (name, _) in given.items()}
        for problem in exc.problems:
            value = fields.get(problem.subject, conv.get(problem.subject))
            entry = entries.get(problem.subject, problem.subject)
            problems.append(replace(problem, subject=entry, found=_shown(value)))


def _arguments_of_kohya(
    metadata: Mapping[str, Any], problems: list[Problem]
) -> tuple[dict[str, float], str]:
    """The rank and alpha of convolutions, and the arguments that give layers other numbers."""
    given = metadata.get("ss_network_args")
    if given is None or (isinstance(given, str) and given.strip().lower() in _ABSENT):
        return {}, ""
    arguments = _json("ss_network_args", given, problems) or {}
    scaling = (name for name in arguments if _ARGUMENTS_WITH_SCALES.search(name))
    scaling_names = [name for name in scaling if "dropout" not in name]  # rank_dropout: training
    of_lycoris = "lycoris" in str(metadata.get("ss_network_module"))
    if not {*scaling_names} <= {"conv_dim", "conv_alpha"} or (scaling_names and of_lycoris):
        return {}, f"ss_network_args: {', '.join(scaling_names)}"
    rank = _of_kohya_number("conv_dim", arguments, problems)
    if rank is None:  # convolutions were not trained
        return {}, ""
    # conv_alpha is 1 by default (create_network in networks/lora.py of sd-scripts).
    alpha = _of_kohya_number("conv_alpha", arguments, problems)
    return {"r": rank, "lora_alpha": 1.0 if alpha is None else alpha}, ""


def _of_kohya_number(name: str, given: Mapping[str, Any], problems: list[Problem]) -> float | None:
    """A number; None if it is missing, or ``Dynamic``: layers then have tensors with numbers."""
    value = given.get(name)
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    if value is None or text.lower() in {*_ABSENT, "dynamic"}:
        return None
    if isinstance(value, bool) or len(text) > _SHOWN or not _NUMBER.fullmatch(text):
        problems.append(Problem(name, "number", _shown(value), "a number greater than 0", _FIX))
        return None
    return float(text)


# -- ai-toolkit -----------------------------------------------------------------------------


def _of_ai_toolkit(metadata: Mapping[str, Any]) -> Iterator[Declaration]:
    text = metadata.get("software")
    if not isinstance(text, str) or len(text) > _LITERAL_LIMIT:
        return
    try:
        software = parsed(text)
    except ValueError:
        return
    if isinstance(software, dict) and software.get("name") == "ai-toolkit":
        yield Declaration("software", AdapterConfig(), of_rank=True)


def _differ(one: Any, other: Any) -> bool:
    # Values come from a file: comparing deeply nested ones may fail.
    try:
        return bool(one != other)
    except (RecursionError, ValueError):
        return True


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return repr(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}...")
    return repr(value) if isinstance(value, int | None) else type(value).__name__
