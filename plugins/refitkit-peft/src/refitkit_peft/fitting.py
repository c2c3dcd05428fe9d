"""Fit an adapter to a base: find the weight of each module, and make edits of its tensors.

:class:`BaseNames` finds modules in the base. An adapter was trained on a model whose names may have
a prefix more or less than those of the base: a head around an encoder, or the ``model.`` of a
trainer. One :class:`Shift` of the names has to fit the whole adapter; if several fit, that is an
error. :class:`Fitting` then checks shapes, dtypes and ranks, and lists every problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from refitkit.errors import Problem
from refitkit.model.rules import WRAPPERS

from refitkit_peft.edits import Added, Product, Replaced
from refitkit_peft.keys import Role

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    import torch
    from refitkit.model import TensorInfo

    from refitkit_peft.adapter import Adapter, ModuleParts, WholeWeight
    from refitkit_peft.edits import Edit


_FLOATS = {"float16", "bfloat16", "float32", "float64"}
_FACTORS = {
    Role.DOWN: Role.UP,
    Role.UP: Role.DOWN,
    Role.TABLE_DOWN: Role.TABLE_UP,
    Role.TABLE_UP: Role.TABLE_DOWN,
}
"""The other factor of each factor."""


@dataclass(frozen=True)
class Fitted:
    """The edits that an adapter makes to a base.

    Attributes:
        edits: Edits by the name of the base's entry.
        problems: Everything that does not fit. If there are any, the edits must not be used.
    """

    edits: Mapping[str, tuple[Edit, ...]]
    problems: tuple[Problem, ...] = ()


class Fitting:
    """The work of fitting one adapter to one base; call ``run`` once."""

    def __init__(self, adapter: Adapter, names: BaseNames, infos: Mapping[str, TensorInfo]) -> None:
        """Prepare the work.

        Args:
            adapter: The adapter.
            names: Names of the base.
            infos: Dtypes and shapes of the base by name.
        """
        self._adapter, self._names, self._infos = adapter, names, infos
        self._problems: list[Problem] = list(adapter.problems)
        self._edits: dict[str, list[Edit]] = {}

    def run(self) -> Fitted:
        """The edits of the adapter, and all problems."""
        dotted = [one.module for one in self._adapter.modules if not one.flat]
        wholes = self._adapter.wholes
        shift, problems = self._names.shift(dotted, [one.name for one in wholes])
        self._problems += problems
        for parts in self._adapter.modules:
            shifted = None if shift is None else shift.of(parts.module)
            self._add_module(parts, self._flat_path(parts) if parts.flat else shifted)
        for whole in wholes:
            if shift is not None:
                self._add_whole(whole, shift.of(whole.name))
        edits = {name: tuple(some) for name, some in self._edits.items()}
        return Fitted(edits, tuple(self._problems))

    def _flat_path(self, parts: ModuleParts) -> str | None:
        """The path in the base of a module whose name has underscores for dots."""
        found = self._names.flat(parts.module)
        if len(found) == 1:
            return found[0]
        if found:
            paths = ", ".join(repr(one) for one in found[:_SHOWN])
            wanted = "one module of the base"
            self._problems.append(Problem(parts.module, "ambiguous", paths, wanted))
        else:
            hint = "the base has no module of this name with dots for underscores"
            self._problems.append(Problem(parts.module, "unknown module", hint=hint))
        return None

    # -- modules ----------------------------------------------------------------------------

    def _add_module(self, parts: ModuleParts, path: str | None) -> None:
        """Add the edits of a module; without a path in the base only check its tensors."""
        problems = list(_incomplete(parts))
        if not problems:
            rank, problems = self._rank(parts)
            if not problems:
                scaling, unknown = self._adapter.scales.scaling(parts, rank)
                problems = [] if unknown is None else [unknown]
                if path is not None:
                    problems += self._add_at(parts, path, scaling)
        self._problems += problems

    def _rank(self, parts: ModuleParts) -> tuple[int, list[Problem]]:
        """The rank of a module's factors, or why they fit neither each other nor the config."""
        down, up = _factors(parts)
        key = parts.key
        rank = down.shape[0] if down.dim() > 1 else 0
        if up.dim() < 2 or not rank or up.shape[1] != rank:  # noqa: PLR2004
            found = f"{tuple(down.shape)} and {tuple(up.shape)}"
            wanted = "(rank, inputs, ...) and (outputs, rank, ...)"
            return 0, [Problem(key, "rank", found, wanted, _rank_hint(down, up))]
        problem = self._adapter.scales.rank_problem(parts, rank)
        return rank, [] if problem is None else [problem]

    def _add_at(self, parts: ModuleParts, path: str, scaling: float) -> Iterator[Problem]:
        """Add the edits of a module at a path of the base, or yield why they do not fit."""
        name = self._names.weight_of(path)
        if name is None:
            # For names with dots, BaseNames.shift has already reported the missing module.
            if parts.flat:
                yield Problem(parts.module, "unknown module", hint="it has no weight")
            return
        info = self._infos[name]
        problems = [*_not_float(name, info), *self._misfit(parts, name, info)]
        config = self._adapter.scales.config(parts)
        if parts.twice and not config.is_known:
            hint = "peft up to 0.21 adds it twice (huggingface/peft#3774); does a later one?"
            problems.append(Problem(parts.key, "unclear", f"peft {config.peft_version}", hint=hint))
        if not problems:
            self._add(name, self._product(parts, info, scaling))
            problems = list(self._add_bias(parts, path, scaling))
        yield from problems

    def _misfit(self, parts: ModuleParts, name: str, info: TensorInfo) -> Iterator[Problem]:
        """Why the factors and magnitudes of a module do not fit the shape of its weight."""
        _, up = _factors(parts)
        shape = self._shape(parts, info)
        if shape != info.shape:
            hint = _shape_hint(shape, info.shape)
            yield Problem(name, "shape", f"factors for {shape}", str(info.shape), hint)
        magnitude = parts.parts.get(Role.MAGNITUDE)
        if magnitude is not None and not _is_per_output(magnitude, up.shape[0]):
            found = str(tuple(magnitude.shape))
            hint = "only magnitudes for each output have a formula"
            yield Problem(parts.keys[Role.MAGNITUDE], "shape", found, f"({up.shape[0]},)", hint)
        if magnitude is None and self._adapter.scales.config(parts).use_dora:
            yield Problem(name, "missing", "no magnitude", "one: use_dora is set")

    def _shape(self, parts: ModuleParts, info: TensorInfo) -> tuple[int, ...]:
        """The shape of the weight that the factors were made for."""
        down, up = _factors(parts)
        outputs, inputs = up.shape[0], tuple(down.shape[1:])
        if Role.TABLE_DOWN in parts.parts or self._is_transposed(parts, info):
            return (*inputs, outputs)
        if prod(up.shape[2:]) != 1:
            return tuple(up.shape)
        # A linear adapter fits a 1x1 convolution, and the other way round.
        ones = (1,) * (len(inputs) - 1)
        if inputs[1:] == ones and info.shape[1:] == inputs[:1] + (1,) * (len(info.shape) - 2):
            return (outputs, *info.shape[1:])
        return (outputs, *inputs)

    def _is_transposed(self, parts: ModuleParts, info: TensorInfo) -> bool:
        config = self._adapter.scales.config(parts)
        return config.fan_in_fan_out and len(info.shape) == 2  # noqa: PLR2004

    def _product(self, parts: ModuleParts, info: TensorInfo, scaling: float) -> Product:
        down, up = (factor.flatten(1) for factor in _factors(parts))
        magnitude = parts.parts.get(Role.MAGNITUDE)
        if Role.TABLE_DOWN in parts.parts or self._is_transposed(parts, info):
            return Product(down.t(), up.t(), scaling, magnitude, by_column=True)
        return Product(up, down, scaling, magnitude)

    def _add_bias(self, parts: ModuleParts, path: str, scaling: float) -> Iterator[Problem]:
        value = parts.parts.get(Role.UP_BIAS)
        if value is None:
            return
        name = self._names.find(f"{path}.bias")
        if name is None:
            hint = f"the base has no '{path}.bias'"
            yield Problem(parts.keys[Role.UP_BIAS], "unexpected", hint=hint)
            return
        problems = [*_not_float(name, self._infos[name]), *_other_shape(name, value, self._infos)]
        if not problems:
            self._add(name, Added(value, scaling))
        yield from problems

    # -- whole weights ----------------------------------------------------------------------

    def _add_whole(self, whole: WholeWeight, path: str) -> None:
        name = self._names.find(path)
        if name is None:
            return  # BaseNames.shift has already reported it
        problems = list(_other_shape(name, whole.value, self._infos, whole.key))
        dtype = str(whole.value.dtype).removeprefix("torch.")
        wanted = self._infos[name].dtype
        if dtype != wanted and not {dtype, wanted} <= _FLOATS:
            problems.append(Problem(whole.key, "dtype", dtype, wanted))
        if not problems:
            self._add(name, Replaced(whole.value, of_base=whole.of_base))
        self._problems += problems

    def _add(self, name: str, edit: Edit) -> None:
        some = self._edits.setdefault(name, [])
        if any(type(other) is type(edit) for other in some):
            hint = "several entries of the adapter are for this weight"
            self._problems.append(Problem(name, "given twice", hint=hint))
        some.append(edit)


def _factors(parts: ModuleParts) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of a module: down, up."""
    table = Role.TABLE_DOWN in parts.parts
    down, up = (Role.TABLE_DOWN, Role.TABLE_UP) if table else (Role.DOWN, Role.UP)
    return parts.parts[down], parts.parts[up]


def _incomplete(parts: ModuleParts) -> Iterator[Problem]:
    """Factors without their other factor, and other tensors without any factor."""
    present: Collection[Role] = parts.parts.keys()
    factors = [role for role in _FACTORS if role in present]
    for role in factors:
        if _FACTORS[role] not in present:
            hint = f"{_FACTORS[role].value} of this module is missing"
            yield Problem(parts.keys[role], "incomplete", hint=hint)
    if not factors:
        for key in parts.keys.values():
            yield Problem(key, "incomplete", hint="the factors of this module are missing")


def _not_float(name: str, info: TensorInfo) -> Iterator[Problem]:
    if info.unusable:
        yield Problem(name, "unusable", info.unusable)
    elif info.dtype not in _FLOATS:
        hint = "no product can be added to it: pass the base as floats, and quantize afterwards"
        yield Problem(name, "dtype", info.dtype, "a float dtype", hint)


def _other_shape(
    name: str, value: torch.Tensor, infos: Mapping[str, TensorInfo], key: str = ""
) -> Iterator[Problem]:
    if tuple(value.shape) != infos[name].shape:
        yield Problem(key or name, "shape", str(tuple(value.shape)), str(infos[name].shape))


def _is_per_output(magnitude: torch.Tensor, outputs: int) -> bool:
    """Whether a magnitude has one number for each output.

    Such shapes are (n,), (n, 1, ...) of kohya's scripts, and (1, n, 1, ...) of peft. A row of shape
    (1, inputs) has numbers for inputs; LyCORIS writes these, too.
    """
    if magnitude.numel() != outputs:
        return False
    along = 1 if magnitude.dim() > 2 and magnitude.shape[0] == 1 else 0  # noqa: PLR2004
    return magnitude.shape[along] == outputs if magnitude.dim() else False


def _shape_hint(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    if len(found) == 2 and found == wanted[::-1]:  # noqa: PLR2004
        return "stored as (in, out)? add the adapter with config={'fan_in_fan_out': True, ...}"
    return "the adapter is for another model"


def _rank_hint(down: torch.Tensor, up: torch.Tensor) -> str:
    # For a convolution with groups, peft splits the second factor but not the first.
    if down.dim() > 2 and up.dim() > 2 and up.shape[1] and not down.shape[0] % up.shape[1]:  # noqa: PLR2004
        return "of a convolution with groups? its product mixes them, which no weight can represent"
    return "the factors do not fit each other"


# -- names of the base ----------------------------------------------------------------------------

_WRAPPERS = frozenset(WRAPPERS) - {"model"}
"""Path parts that wrappers add. ``model`` is not among them: models use it as a name, too."""
_SHOWN = 4
_SUGGESTIONS = 10
_LEAVES = ("weight", "in_proj_weight")
"""Parameters that factors add to: the first that a module has.

Layers have ``weight``; ``torch.nn.MultiheadAttention`` has ``in_proj_weight``
(``MultiheadAttention`` in ``tuners/lora/layer.py``, peft 0.21.2).
"""


@dataclass(frozen=True)
class Shift:
    """The change that turns a path of the adapter into the path of the base.

    Attributes:
        cut: Number of parts to remove at the beginning of the path.
        prefix: Prefix to add afterwards, with its dot.
    """

    cut: int = 0
    prefix: str = ""

    def of(self, path: str) -> str:
        """The path in the base."""
        return self.prefix + ".".join(path.split(".")[self.cut :])

    def keeps_apart(self, *groups: Collection[str]) -> bool:
        """Whether the paths of each group stay different from each other."""
        return all(len({*map(self.of, group)}) == len({*group}) for group in groups)


class BaseNames:
    """An index of the names of a base."""

    def __init__(self, names: Collection[str] | Mapping[str, str]) -> None:
        """Index the names of a base.

        Args:
            names: The names; or a mapping from names to look up to names of the base.
        """
        self._names = names if isinstance(names, Mapping) else {name: name for name in names}
        modules = (name.rpartition(".")[0] for name in names if _leaf(name) in _LEAVES)
        self._flat: dict[str, list[str]] = {}
        for module in dict.fromkeys(modules):
            self._flat.setdefault(module.replace(".", "_"), []).append(module)

    def weight_of(self, module: str) -> str | None:
        """Name of the weight that a module's factors add to; None if the base has none."""
        found = (self.find(f"{module}.{leaf}" if module else leaf) for leaf in _LEAVES)
        return next((name for name in found if name is not None), None)

    def find(self, name: str) -> str | None:
        """The base's name of an entry, with wrappers if it has some; None if it has no entry."""
        return self._names.get(name) or (self._unwrapped.find(name) if self._unwrapped else None)

    @cached_property
    def _unwrapped(self) -> BaseNames | None:
        """The same names without wrappers; None if no name has a wrapper."""
        by_bare: dict[str, list[str]] = {}
        for name in self._names:
            bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
            by_bare.setdefault(bare, []).append(name)
        if by_bare.keys() == self._names.keys():
            return None
        # Two names that differ only in wrappers are ambiguous, so neither is found.
        return BaseNames({bare: found[0] for bare, found in by_bare.items() if len(found) == 1})

    def flat(self, path: str) -> list[str]:
        """Modules whose path with underscores for dots is this one."""
        return self._flat.get(path, [])

    def shift(
        self, modules: Collection[str], wholes: Collection[str]
    ) -> tuple[Shift | None, list[Problem]]:
        """The only shift that fits all modules and whole weights, or the reason why none does.

        Returns:
            The shift without problems. If no shift fits all, the one that fits most, with a problem
            for each missing name. If several fit all, None and a problem that lists them.
        """
        wanted = [*modules, *wholes]
        if not wanted or self._fits_all(Shift(), modules, wholes):
            return Shift(), []
        some, leaves = (list(modules), _LEAVES) if modules else (list(wholes), ("",))
        # Candidates of three paths are enough: the shift has to fit every path.
        found = self._shifts({some[0], some[len(some) // 2], some[-1]}, leaves)
        candidates = [one for one in found if one.keeps_apart(modules, wholes)]
        fitting = [one for one in candidates if self._fits_all(one, modules, wholes)]
        if len(fitting) == 1:
            return fitting[0], []
        if fitting:
            return None, [_ambiguous(some[0], fitting)]
        if self._unwrapped is not None:
            shift, problems = self._unwrapped.shift(modules, wholes)
            if not problems:
                return shift, []
        best = max([Shift(), *candidates], key=lambda one: self._count(one, modules, wholes))
        return best, list(self._missing(best, modules, wholes))

    def _fits_all(self, shift: Shift, modules: Iterable[str], wholes: Iterable[str]) -> bool:
        return all(self.weight_of(shift.of(one)) for one in modules) and all(
            self.find(shift.of(one)) for one in wholes
        )

    def _count(self, shift: Shift, modules: Iterable[str], wholes: Iterable[str]) -> int:
        found = sum(self.weight_of(shift.of(one)) is not None for one in modules)
        return found + sum(self.find(shift.of(one)) is not None for one in wholes)

    def _shifts(self, paths: Collection[str], leaves: Collection[str]) -> list[Shift]:
        """All shifts that turn one of some paths into a name of the base."""
        ends = [f"{path}.{leaf}" if leaf else path for path in paths for leaf in leaves]
        longer = {
            Shift(0, name.removesuffix(end))
            for name in self._names
            for end in ends
            if name.endswith(f".{end}")
        }
        shorter = {
            Shift(cut)
            for end in ends
            for cut in range(1, end.count(".") + 1)
            if Shift(cut).of(end) in self._names
        }
        return sorted(longer | shorter, key=lambda one: (one.cut, one.prefix))

    def _missing(
        self, shift: Shift, modules: Iterable[str], wholes: Iterable[str]
    ) -> Iterator[Problem]:
        missing = [one for one in modules if self.weight_of(shift.of(one)) is None]
        known = sorted({name.rpartition(".")[0] for name in self._names})
        for number, module in enumerate(missing):
            path = shift.of(module)
            # get_close_matches is slow, and hundreds of suggestions are useless.
            near = get_close_matches(path, known, n=1, cutoff=0.8) if number < _SUGGESTIONS else []
            hint = f"did you mean {near[0]!r}?" if near else "the base has no weight for it"
            yield Problem(module, "unknown module", hint=hint)
        for name in wholes:
            if self.find(shift.of(name)) is None:
                yield Problem(name, "unexpected", hint="the base has no such entry")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _ambiguous(module: str, fitting: Collection[Shift]) -> Problem:
    """The problem that a module has several places in the base."""
    paths = ", ".join(repr(shift.of(module)) for shift in list(fitting)[:_SHOWN])
    more = f" and {len(fitting) - _SHOWN} more" if len(fitting) > _SHOWN else ""
    hint = "rename the entries of the base to the names that the adapter was trained with"
    if all(shift.prefix for shift in fitting):
        prefixes = (repr(shift.prefix) for shift in list(fitting)[:_SHOWN])
        begin = " or ".join(prefixes)
        hint = f"choose one with rules.subtree or --subtree: names start with {begin}"
    return Problem(module, "ambiguous", f"{paths}{more}", "one place in the base", hint)
