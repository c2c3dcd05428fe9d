"""One adapter for one model: its tensors by module, and the scale of each module.

:func:`adapter_of` sorts the contents of files into :class:`ModuleParts` and :class:`WholeWeight`,
and checks each tensor by itself. :class:`Scales` in the second half finds the factor of each
module's product from alpha and rank, or reports that alpha is unknown.

An unknown alpha is never assumed. Loaders do assume it: without any alpha, diffusers
(``get_peft_kwargs`` in ``utils/peft_utils.py``, 0.42.1) and kohya's scripts
(``create_network_from_weights`` in ``networks/lora.py``: "support old LoRA without alpha") take the
rank. This is wrong for every file whose alpha was lost: in an ``adapter_config.json`` that was left
behind, or in a header that a conversion dropped. A user who knows alpha passes it, or ``"rank"``.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import torch
from refitkit.errors import Problem, SourceError
from refitkit.program.bits import all_finite, counted, finite

from refitkit_peft.config import AdapterConfig
from refitkit_peft.declarations import DENOISERS, is_component
from refitkit_peft.keys import PEFT_PREFIX, AdapterKey, Role, read_key

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from refitkit_peft.declarations import Declaration
    from refitkit_peft.lora import Alpha
    from refitkit_peft.reading import Contents


_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


@dataclass(frozen=True)
class ModuleParts:
    """The tensors of an adapter for one module.

    Attributes:
        module: Path of the module in the model.
        flat: Whether the path has underscores instead of dots.
        component: Model of the pipeline that the keys name; empty if they name none.
        parts: Tensors by their role.
        keys: Keys of the tensors in the adapter, by their role.
    """

    module: str
    flat: bool
    component: str = ""
    parts: dict[Role, torch.Tensor] = field(default_factory=dict)
    keys: dict[Role, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The first of its keys, for messages."""
        return next(iter(self.keys.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """The path with and without the component, since a config is for one component."""
        inner = self.module.removeprefix(f"{self.component}.")
        return tuple(dict.fromkeys((self.module, inner)))

    @property
    def rank(self) -> int:
        """The rank of the first factor; 0 if it is missing or has fewer than two dimensions."""
        down = self.parts.get(Role.DOWN, self.parts.get(Role.TABLE_DOWN))
        return 0 if down is None or down.dim() < 2 else down.shape[0]  # noqa: PLR2004

    @property
    def has_kernel(self) -> bool:
        """Whether the module is a convolution with a kernel larger than 1."""
        down = self.parts.get(Role.DOWN)
        return down is not None and prod(down.shape[2:]) > 1

    @property
    def twice(self) -> bool:
        """Whether peft adds the product twice, as for ``out_proj`` of ``MultiheadAttention``.

        ``MultiheadAttention.merge`` in ``tuners/lora/layer.py`` does so up to 0.21.2. ``forward``
        calls it, so adapters were trained in this way (huggingface/peft#3774).
        """
        return ".base_layer.out_proj.lora_" in self.key


@dataclass(frozen=True)
class WholeWeight:
    """A weight that an adapter contains whole, to replace the base's.

    Attributes:
        name: Name of the weight in the model.
        key: Key in the adapter.
        value: The weight.
        of_base: Whether it was saved beside factors for it, so that it may be the base's own.
    """

    name: str
    key: str
    value: torch.Tensor
    of_base: bool


@dataclass(frozen=True)
class Adapter:
    """One adapter for one model.

    Attributes:
        what: Description for messages.
        scales: Alpha, rank and settings of each module.
        modules: Tensors of each module.
        wholes: Whole weights.
        problems: Problems of the adapter that do not depend on a base.
        digest: Hash of 128 bits, in hex: adapters with equal digests add the same.
        nbytes: Bytes of its tensors.
    """

    what: str
    scales: Scales
    modules: tuple[ModuleParts, ...]
    wholes: tuple[WholeWeight, ...]
    problems: tuple[Problem, ...]
    digest: str
    nbytes: int


def adapter_of(contents: Contents, component: str = "", alpha: Alpha | None = None) -> Adapter:
    """The adapter in some files for one model.

    Args:
        contents: Tensors and declarations of the files.
        component: Model of a pipeline; empty if the files are for one model.
        alpha: The user's alpha in place of the one in the files.

    Raises:
        SourceError: The files contain several adapters, or none for this model.
    """
    keys = _keys_of(contents, component)
    _require_one_adapter(contents.what, keys)
    tensors = {key.text: contents.tensors[key.text] for key in keys}
    modules, wholes = _by_module(keys, tensors)
    scales = Scales(contents.declarations, alpha, modules.values())
    return Adapter(
        what=contents.what,
        scales=scales,
        modules=tuple(modules.values()),
        wholes=tuple(wholes),
        problems=(*_problems_of_entries(keys, tensors), *scales.problems),
        digest=_digest(tensors, contents.declarations, alpha),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def _keys_of(contents: Contents, component: str) -> list[AdapterKey]:
    """The keys for one model of a pipeline, with module paths inside that model."""
    keys = [read_key(text) for text in contents.tensors]
    components = sorted({key.component for key in keys if key.component})
    if not component and len(components) <= 1:
        return keys
    if component not in components:
        hint = 'choose one: Lora(base, {...}, component="...")'
        problems = [Problem(name, "component", hint=hint) for name in components]
        what = f"has nothing for {component!r}" if component else "is for several models"
        raise SourceError(f"{contents.what} {what}.", problems=problems)
    chosen = [key for key in keys if key.component == component]
    return [key if key.flat else _without_component(key) for key in chosen]


def _without_component(key: AdapterKey) -> AdapterKey:
    module = key.module.removeprefix(f"{key.component}.")
    return AdapterKey(key.text, key.role, module, key.adapter, key.component, of_base=key.of_base)


def _require_one_adapter(what: str, keys: Iterable[AdapterKey]) -> None:
    names = sorted({key.adapter for key in keys if key.adapter})
    if len(names) > 1:
        problems = [Problem(name, "adapter") for name in names]
        hint = "Save each by itself: model.save_pretrained(path, selected_adapters=[name])."
        raise SourceError(f"{what} contains several adapters.", problems=problems, hint=hint)
    # Foreign entries count here: their own problem says more than "no factors".
    factors = {Role.DOWN, Role.UP, Role.TABLE_DOWN, Role.TABLE_UP, Role.FOREIGN}
    if not any(key.role in factors for key in keys):
        raise SourceError(f"{what} contains no factors of a LoRA adapter.")


def _by_module(
    keys: Iterable[AdapterKey], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, ModuleParts], list[WholeWeight]]:
    modules: dict[str, ModuleParts] = {}
    wholes: list[WholeWeight] = []
    for key in keys:
        value = tensors[key.text]
        if key.role is Role.WHOLE:
            wholes.append(WholeWeight(key.module, key.text, value, key.of_base))
        elif key.role is not Role.FOREIGN:
            parts = modules.setdefault(key.module, ModuleParts(key.module, key.flat, key.component))
            parts.parts[key.role] = value
            parts.keys[key.role] = key.text
    return modules, wholes


def _problems_of_entries(
    keys: Iterable[AdapterKey], tensors: Mapping[str, torch.Tensor]
) -> Iterator[Problem]:
    """Problems of single entries: foreign kinds, duplicates, dtypes, and values."""
    seen: dict[tuple[str, Role], str] = {}
    for key in keys:
        value = tensors[key.text]
        first = seen.setdefault((key.module, key.role), key.text)
        if key.role is Role.FOREIGN:
            hint = "an entry of another kind of adapter than LoRA"
            yield Problem(key.text, "cannot be merged", hint=hint)
        elif first != key.text:
            yield Problem(key.text, "given twice", hint=f"{first!r} is for the same tensor")
        elif key.role is not Role.WHOLE and value.dtype not in _dtypes_of(key.role):
            found = str(value.dtype).removeprefix("torch.")
            yield Problem(key.text, "dtype", found, "float16, bfloat16, float32 or float64")
        elif key.role is Role.ALPHA:
            # Only the shape: Scales checks the number, and only if the user passes no alpha.
            if value.numel() != 1:
                yield Problem(key.text, "shape", str(tuple(value.shape)), "one number")
        elif key.role is not Role.WHOLE:
            # Whole weights may be infinite, such as masks: refitkit's own check covers them.
            yield from _not_finite(key.text, value)


def _dtypes_of(role: Role) -> set[torch.dtype]:
    """Allowed dtypes. Alpha may be an integer: ``torch.tensor(alpha)`` in kohya's ``lora.py``."""
    return _FLOATS | _INTEGERS if role is Role.ALPHA else _FLOATS


def _not_finite(name: str, value: torch.Tensor) -> Iterator[Problem]:
    if not all_finite(value):
        yield Problem(name, "non-finite", counted(~finite(value)), "finite")


def _digest(
    tensors: Mapping[str, torch.Tensor],
    declarations: Iterable[Declaration],
    alpha: Alpha | None,
) -> str:
    """Hash of keys, dtypes, shapes and bytes, of the declarations, and of the user's alpha."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((alpha, [one.as_data() for one in declarations])).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -- the scale of each module -------------------------------------------------------------------

UNKNOWN = "alpha unknown"
"""Kind of the problem of a module without any alpha."""

_COMPARED = ("r", "rank_pattern", "use_rslora", "use_dora", "fan_in_fan_out")
_COMPARED_ALPHAS = ("lora_alpha", "alpha_pattern")
_GIVE_ALPHA = "pass an alpha for this adapter to decide"


@dataclass(frozen=True)
class _Declared:
    """The merged declarations for one module.

    Attributes:
        config: All declared fields; None if nothing is declared.
        where: Place of the declaration of alpha, for messages.
        for_all: Whether this alpha is for all layers of the component.
        by_layer: Setting that gives layers alphas of their own; ``config`` then has no alpha.
        of_rank: Whether alpha is the rank by definition.
        problems: Declarations that contradict each other.
    """

    config: AdapterConfig | None
    where: str = ""
    for_all: bool = False
    by_layer: str = ""
    of_rank: bool = False
    problems: tuple[Problem, ...] = ()


class Scales:
    """The factor of the product of each module, from alpha and rank."""

    def __init__(
        self,
        declarations: Sequence[Declaration],
        alpha: Alpha | None,
        modules: Collection[ModuleParts],
    ) -> None:
        """Merge the declarations for each module.

        Args:
            declarations: All declarations of the files.
            alpha: The user's alpha, which overrides all others; None if the user passed none.
            modules: The adapter's modules.
        """
        self._alpha = alpha
        self._declarations = declarations
        without_alpha = [parts for parts in modules if Role.ALPHA not in parts.parts]
        ranks = {parts.rank for parts in without_alpha if parts.rank}
        self._mixed = len(ranks) > 1
        self._by_scope: dict[str, list[int]] = {}
        for number, one in enumerate(declarations):
            self._by_scope.setdefault(one.scope, []).append(number)
        self._components = {one.scope for one in declarations if one.scope and one.of_component}
        # Many modules share the same declarations, so each combination is merged once.
        self._merged: dict[tuple[int, ...], _Declared] = {}
        self._declared = {parts.module: self._find(parts) for parts in modules}

    @property
    def problems(self) -> Iterator[Problem]:
        """Declarations that contradict each other, each once."""
        found = {p: None for declared in self._merged.values() for p in declared.problems}
        return iter(found)

    def config(self, parts: ModuleParts) -> AdapterConfig:
        """The fields that are declared for a module."""
        return self._declared[parts.module].config or AdapterConfig()

    def rank_problem(self, parts: ModuleParts, rank: int) -> Problem | None:
        """A problem if the rank of a module's factors differs from the declared one."""
        config = self.config(parts)
        wanted = {config.rank(*parts.names)}
        if parts.flat and config.rank_pattern:
            # Patterns match names with dots, so any of their ranks may be the right one.
            wanted = {config.r, *config.rank_pattern.values()}
        if rank in wanted or None in wanted:
            return None
        ranks = " or ".join(str(one) for one in sorted(one for one in wanted if one is not None))
        hint = "the tensors and the config are of different adapters"
        return Problem(parts.key, "rank", str(rank), f"{ranks}, as the config says", hint)

    def scaling(self, parts: ModuleParts, rank: int) -> tuple[float, Problem | None]:
        """The factor of a module's product, before the user's scale.

        Returns:
            The factor and None; or 1.0 and the reason why the factor is unknown.
        """
        config = self.config(parts)
        found: float | Problem
        if self._alpha == "rank":
            found = 1.0
        elif self._alpha is not None:
            found = config.scaling_of(self._alpha, rank)
        else:
            # Patterns match names with dots, so they do not apply to names with underscores.
            patterns = parts.flat and bool(config.alpha_pattern)
            declared = None if patterns else config.scaling(rank, *parts.names)
            tensor = parts.parts.get(Role.ALPHA)
            if tensor is not None:
                found = self._of_tensor(parts, tensor, rank, declared)
            elif declared is not None:
                found = self._of_declared(parts, declared)
            else:
                found = self._undeclared(parts)
        if isinstance(found, Problem):
            return 1.0, found
        return found * (2 if parts.twice else 1), None

    def _undeclared(self, parts: ModuleParts) -> float | Problem:
        """The factor of a module whose alpha is neither a tensor nor declared."""
        known = self._declared[parts.module]
        if known.of_rank and any(".lora_A" in key for key in parts.keys.values()):
            return 1.0
        if self.config(parts).alpha_pattern:
            hint = f"alpha_pattern matches names with dots; {_GIVE_ALPHA}"
            return Problem(parts.module, "unclear", "names with underscores", hint=hint)
        found = f"{known.by_layer}, but no tensor with alpha" if known.by_layer else ""
        return Problem(parts.module, UNKNOWN, found)

    def _of_declared(self, parts: ModuleParts, scaling: float) -> float | Problem:
        """The declared factor, unless it contradicts the trainer or may be for another rank."""
        known = self._declared[parts.module]
        if known.of_rank and not math.isclose(scaling, 1.0, rel_tol=1e-6):
            found = f"{known.where}, but files of ai-toolkit have a scale of 1"
            return Problem(parts.module, "contradiction", found, hint=_GIVE_ALPHA)
        if self._mixed and known.for_all and self.config(parts).r is None:
            hint = f"one alpha without a rank, but layers of several ranks; {_GIVE_ALPHA}"
            return Problem(parts.module, "unclear", known.where, hint=hint)
        return scaling

    def _of_tensor(
        self,
        parts: ModuleParts,
        tensor: torch.Tensor,
        rank: int,
        declared: float | None,
    ) -> float | Problem:
        """``alpha / rank`` from a tensor, as in kohya's scripts, unless declarations differ."""
        key, known = parts.keys[Role.ALPHA], self._declared[parts.module]
        if tensor.numel() != 1 or tensor.is_complex():
            return 1.0  # _problems_of_entries reports it
        alpha = float(tensor)
        if not math.isfinite(alpha) or alpha <= 0:
            kind = "number" if math.isfinite(alpha) else "non-finite"
            return Problem(key, kind, f"{alpha:g}", "a number greater than 0", _GIVE_ALPHA)
        found = alpha / rank
        if declared is None:
            if self.config(parts).use_rslora and not known.by_layer:
                hint = f"is it divided by the rank, or by its square root? {_GIVE_ALPHA}"
                return Problem(key, "unclear", "an alpha, and use_rslora", hint=hint)
            return found
        # The tensor may be float16 or bfloat16, and round the declared alpha.
        floating = tensor.dtype.is_floating_point
        tolerance = 1e-6 + (2 * torch.finfo(tensor.dtype).eps if floating else 0.0)
        if not math.isclose(found, declared, rel_tol=tolerance):
            scale = f"a scale of {found:g} = {alpha:g} / {rank}"
            wanted = f"{declared:g}, as {known.where} says"
            return Problem(key, "contradiction", scale, wanted, _GIVE_ALPHA)
        return found

    # -- which declarations are for a module ----------------------------------------------------

    def _find(self, parts: ModuleParts) -> _Declared:
        scopes = {"", *self._scopes_of(parts)}
        found = sorted(number for scope in scopes for number in self._by_scope.get(scope, ()))
        # -1 keeps convolutions apart: a declaration may have another alpha for them.
        key = (*found, -1) if parts.has_kernel else tuple(found)
        if key not in self._merged:
            self._merged[key] = self._merge([self._declarations[n] for n in found], parts)
        return self._merged[key]

    def _scopes_of(self, parts: ModuleParts) -> Iterator[str]:
        """The scopes of a module: all prefixes of its path, and its component."""
        path = parts.key.removeprefix(PEFT_PREFIX).split(".")
        yield from itertools.accumulate(path, lambda before, part: f"{before}.{part}")
        own = parts.component or path[0]
        yield own
        others = self._components & DENOISERS if own in DENOISERS else self._components
        named = own in self._components if own in DENOISERS else is_component(own)
        # Trainers name one model in several ways, or not at all: see DENOISERS.
        if not named and len(others) == 1:
            yield from others

    def _merge(self, declarations: Sequence[Declaration], parts: ModuleParts) -> _Declared:
        fields: dict[str, object] = {}
        places: dict[str, Declaration] = {}
        problems: list[Problem] = []
        names = _COMPARED if self._alpha is not None else (*_COMPARED, *_COMPARED_ALPHAS)
        # Declarations for single layers come last: they override those for the whole file.
        ordered = sorted(declarations, key=lambda one: not one.of_component and len(one.scope))
        for one in ordered:
            config = one.conv if one.conv is not None and parts.has_kernel else one.config
            # Defaults are not declarations, so only the fields that the file sets count.
            given = config.model_dump(exclude_unset=True)
            if one.by_layer:
                given = {k: v for k, v in given.items() if k not in {"r", "lora_alpha"}}
            for name, value in given.items():
                first = places.get(name, one)
                comparable = one.of_component or one.scope == first.scope
                if comparable and name in names and fields.get(name, value) != value:
                    found = f"{fields[name]} in {first.where}, {value} in {one.where}"
                    problems.append(Problem(name, "contradiction", found, "one value", _GIVE_ALPHA))
                fields[name] = value
                places[name] = one
        alpha = places.get("lora_alpha", places.get("alpha_pattern"))
        return _Declared(
            AdapterConfig.model_validate(fields) if fields else None,
            "" if alpha is None else alpha.where,
            alpha is not None and alpha.of_component,
            next((one.by_layer for one in ordered if one.by_layer), ""),
            any(one.of_rank for one in ordered),
            tuple(problems),
        )
