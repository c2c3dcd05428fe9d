"""An adapter held against a base: what it does to which weight, or everything that does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from refitkit.errors import Problem

from refitkit_peft.edits import Added, Product, Replaced
from refitkit_peft.keys import Part
from refitkit_peft.placing import ambiguous_flat

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    import torch
    from refitkit.model import TensorInfo

    from refitkit_peft.adapter import Adapter, ModuleParts, Whole
    from refitkit_peft.edits import Edit
    from refitkit_peft.placing import Places

_FLOATS = {"float16", "bfloat16", "float32", "float64"}
_FACTORS = {
    Part.DOWN: Part.UP,
    Part.UP: Part.DOWN,
    Part.TABLE_DOWN: Part.TABLE_UP,
    Part.TABLE_UP: Part.TABLE_DOWN,
}


@dataclass(frozen=True)
class Fitted:
    """What an adapter does to a base.

    Attributes:
        edits: By name of the entry of the base.
        problems: Everything that does not fit; there are no edits then that one may use.
    """

    edits: Mapping[str, tuple[Edit, ...]]
    problems: tuple[Problem, ...] = ()


class Fitting:
    """One adapter on its way to one base."""

    def __init__(self, adapter: Adapter, places: Places, infos: Mapping[str, TensorInfo]) -> None:
        """Nothing is looked up yet.

        Args:
            adapter: The adapter.
            places: Names of the base.
            infos: Dtypes and shapes of the base, by name.
        """
        self._adapter, self._places, self._infos = adapter, places, infos
        self._problems: list[Problem] = list(adapter.problems)
        self._edits: dict[str, list[Edit]] = {}

    def run(self) -> Fitted:
        """Look everything up."""
        dotted = [one.module for one in self._adapter.modules if not one.flat]
        wholes = self._adapter.wholes
        shift, problems = self._places.shift(dotted, [one.name for one in wholes])
        self._problems += problems
        for parts in self._adapter.modules:
            shifted = None if shift is None else shift.of(parts.module)
            self._take(parts, self._flat(parts) if parts.flat else shifted)
        for whole in wholes:
            if shift is not None:
                self._take_whole(whole, shift.of(whole.name))
        edits = {name: tuple(some) for name, some in self._edits.items()}
        return Fitted(edits, tuple(self._problems))

    def _flat(self, parts: ModuleParts) -> str | None:
        found = self._places.flat(parts.module)
        if len(found) == 1:
            return found[0]
        if found:
            self._problems.append(ambiguous_flat(parts.module, found))
        else:
            hint = "the base has no module that is called so with underscores for dots"
            self._problems.append(Problem(parts.module, "unknown module", hint=hint))
        return None

    # -- modules ----------------------------------------------------------------------------

    def _take(self, parts: ModuleParts, place: str | None) -> None:
        """Turn the parts of a module into edits; without a place only look at them."""
        problems = list(_torn(parts))
        if not problems:
            rank, problems = self._rank(parts)
            if not problems:
                scaling, unknown = self._adapter.scales.scaling(parts, rank)
                problems = [] if unknown is None else [unknown]
                if place is not None:
                    problems += self._place(parts, place, scaling)
        self._problems += problems

    def _rank(self, parts: ModuleParts) -> tuple[int, list[Problem]]:
        """The rank of a module's factors; or that they do not fit one another, or the config."""
        down, up = _factors(parts)
        key = parts.key
        rank = down.shape[0] if down.dim() > 1 else 0
        if up.dim() < 2 or not rank or up.shape[1] != rank:  # noqa: PLR2004
            found = f"{tuple(down.shape)} and {tuple(up.shape)}"
            wanted = "(rank, inputs, ...) and (outputs, rank, ...)"
            return 0, [Problem(key, "rank", found, wanted, _rank_hint(down, up))]
        problem = self._adapter.scales.rank_problem(parts, rank)
        return rank, [] if problem is None else [problem]

    def _place(self, parts: ModuleParts, place: str, scaling: float) -> Iterator[Problem]:
        name = self._places.weight_of(place)
        if name is None:
            if parts.flat:
                yield Problem(parts.module, "unknown module", hint="it has no weight")
            return  # of others, the look for the shift has told already
        info = self._infos[name]
        problems = [*_not_float(name, info), *self._misfit(parts, name, info)]
        config = self._adapter.scales.config(parts)
        if parts.twice and not config.is_known:
            hint = "peft up to 0.21 adds it twice (huggingface/peft#3774): does a later one?"
            problems.append(Problem(parts.key, "unclear", f"peft {config.peft_version}", hint=hint))
        if not problems:
            self._add(name, self._product(parts, info, scaling))
            problems = list(self._take_bias(parts, place, scaling))
        yield from problems

    def _misfit(self, parts: ModuleParts, name: str, info: TensorInfo) -> Iterator[Problem]:
        """Why the product of the factors is not of the weight's shape."""
        _, up = _factors(parts)
        shape = self._shape(parts, info)
        if shape != info.shape:
            hint = _shape_hint(shape, info.shape)
            yield Problem(name, "shape", f"factors for {shape}", str(info.shape), hint)
        magnitude = parts.parts.get(Part.MAGNITUDE)
        if magnitude is not None and not _per_output(magnitude, up.shape[0]):
            found = str(tuple(magnitude.shape))
            hint = "only magnitudes for each output have a formula"
            yield Problem(parts.keys[Part.MAGNITUDE], "shape", found, f"({up.shape[0]},)", hint)
        if magnitude is None and self._adapter.scales.config(parts).use_dora:
            yield Problem(name, "missing", "no magnitude", "one: use_dora is set")

    def _shape(self, parts: ModuleParts, info: TensorInfo) -> tuple[int, ...]:
        """The shape of the weight that the factors were made for."""
        down, up = _factors(parts)
        outputs, inputs = up.shape[0], tuple(down.shape[1:])
        if Part.TABLE_DOWN in parts.parts or self._transposed(parts, info):
            return (*inputs, outputs)
        if prod(up.shape[2:]) != 1:
            return tuple(up.shape)
        ones = (1,) * (len(inputs) - 1)
        if inputs[1:] == ones and info.shape[1:] == inputs[:1] + (1,) * (len(info.shape) - 2):
            return (outputs, *info.shape[1:])  # a linear adapter of a 1x1 convolution, or reversed
        return (outputs, *inputs)

    def _transposed(self, parts: ModuleParts, info: TensorInfo) -> bool:
        config = self._adapter.scales.config(parts)
        return config.fan_in_fan_out and len(info.shape) == 2  # noqa: PLR2004

    def _product(self, parts: ModuleParts, info: TensorInfo, scaling: float) -> Product:
        down, up = (factor.flatten(1) for factor in _factors(parts))
        magnitude = parts.parts.get(Part.MAGNITUDE)
        if Part.TABLE_DOWN in parts.parts or self._transposed(parts, info):
            return Product(down.t(), up.t(), scaling, magnitude, by_column=True)
        return Product(up, down, scaling, magnitude)

    def _take_bias(self, parts: ModuleParts, place: str, scaling: float) -> Iterator[Problem]:
        value = parts.parts.get(Part.UP_BIAS)
        if value is None:
            return
        name = self._places.find(f"{place}.bias")
        if name is None:
            hint = f"the base has no '{place}.bias'"
            yield Problem(parts.keys[Part.UP_BIAS], "unexpected", hint=hint)
            return
        problems = [*_not_float(name, self._infos[name]), *_other_shape(name, value, self._infos)]
        if not problems:
            self._add(name, Added(value, scaling))
        yield from problems

    # -- whole weights ----------------------------------------------------------------------

    def _take_whole(self, whole: Whole, path: str) -> None:
        name = self._places.find(path)
        if name is None:
            return  # the look for the shift has told
        problems = list(_other_shape(name, whole.value, self._infos, whole.key))
        dtype = str(whole.value.dtype).removeprefix("torch.")
        wanted = self._infos[name].dtype
        if dtype != wanted and not {dtype, wanted} <= _FLOATS:
            problems.append(Problem(whole.key, "dtype", dtype, wanted))
        if not problems:
            self._add(name, Replaced(whole.value, beside=whole.of_base))
        self._problems += problems

    def _add(self, name: str, edit: Edit) -> None:
        some = self._edits.setdefault(name, [])
        if any(type(other) is type(edit) for other in some):
            hint = "entries of the adapter that are called otherwise are for the same weight"
            self._problems.append(Problem(name, "given twice", hint=hint))
        some.append(edit)


def _factors(parts: ModuleParts) -> tuple[torch.Tensor, torch.Tensor]:
    """Down, up."""
    table = Part.TABLE_DOWN in parts.parts
    down, up = (Part.TABLE_DOWN, Part.TABLE_UP) if table else (Part.DOWN, Part.UP)
    return parts.parts[down], parts.parts[up]


def _torn(parts: ModuleParts) -> Iterator[Problem]:
    """Parts without those that they belong to."""
    there: Collection[Part] = parts.parts.keys()
    factors = [part for part in _FACTORS if part in there]
    for part in factors:
        if _FACTORS[part] not in there:
            hint = f"{_FACTORS[part].value} of this module is needed, too"
            yield Problem(parts.keys[part], "torn apart", hint=hint)
    if not factors:
        for key in parts.keys.values():
            yield Problem(key, "torn apart", hint="there are no factors for this module")


def _not_float(name: str, info: TensorInfo) -> Iterator[Problem]:
    if info.unusable:
        yield Problem(name, "unusable", info.unusable)
    elif info.dtype not in _FLOATS:
        hint = "a product cannot be added to it: give the base as floats, and quantize after that"
        yield Problem(name, "dtype", info.dtype, "a float dtype", hint)


def _other_shape(
    name: str, value: torch.Tensor, infos: Mapping[str, TensorInfo], key: str = ""
) -> Iterator[Problem]:
    if tuple(value.shape) != infos[name].shape:
        yield Problem(key or name, "shape", str(tuple(value.shape)), str(infos[name].shape))


def _per_output(magnitude: torch.Tensor, outputs: int) -> bool:
    """Whether it is a vector for the outputs: (n,), (n, 1, ...) of kohya, (1, n, 1, ...) of peft.

    A row, (1, inputs), has magnitudes for inputs: LyCORIS writes such ones, too.
    """
    if magnitude.numel() != outputs:
        return False
    along = 1 if magnitude.dim() > 2 and magnitude.shape[0] == 1 else 0  # noqa: PLR2004
    return magnitude.shape[along] == outputs if magnitude.dim() else False


def _shape_hint(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    if len(found) == 2 and found == wanted[::-1]:  # noqa: PLR2004
        return "stored as (in, out)? give the adapter with config={'fan_in_fan_out': True, ...}"
    return "the adapter is for another model"


def _rank_hint(down: torch.Tensor, up: torch.Tensor) -> str:
    """Of a convolution with groups peft splits the second factor, but not the first."""
    if down.dim() > 2 and up.dim() > 2 and up.shape[1] and not down.shape[0] % up.shape[1]:  # noqa: PLR2004
        return "of a convolution with groups? the product mixes them: no weight of it can hold that"
    return "the factors do not fit each other"
