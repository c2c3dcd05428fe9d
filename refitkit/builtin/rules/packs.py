"""Weights that one side has in one piece and the other in parts: q, k and v; gate and up; experts.

A rule is an equation between a piece and its parts. The names that a program and a source have say
which side is made of the other; shapes of the program say where a piece is cut. Parts are cut out
as views of the piece, without a copy.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from refitkit.errors import Problem, SourceError, WeightMismatchError
from refitkit.model import TensorInfo
from refitkit.protocols import Made, WeightGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from refitkit.model import Leaf, Pack
    from refitkit.protocols import TransformRequest, WeightSource

Shape = tuple[int, ...]

_MOST = 1 << 12
"""More parts of one name than this are no experts: the rule is not meant for that piece."""
_TOGETHER = 8
"""Most pieces that are in memory at once."""
_MATRIX = 2
"""Dimensions of what can be transposed."""


class Headers(Protocol):
    """What a source says of its entries, without data."""

    def names(self) -> Collection[str]:
        """Names of all entries."""

    def info(self, fqn: str) -> TensorInfo:
        """Dtype and shape of an entry."""


class Packs:
    """Joins parts into weights that the source does not have itself, and cuts pieces into parts."""

    name = "packs"
    priority = 20

    def __init__(self, rules: tuple[Pack, ...]) -> None:
        """Follow rules."""
        self._rules = rules

    def groups(self, request: TransformRequest) -> Iterator[WeightGroup]:
        """One for each piece.

        Raises:
            WeightMismatchError: Parts lack, or sizes do not add up; lists all of it.
        """
        source, problems = request.source, list[Problem]()
        order = {leaf.fqn: number for number, leaf in enumerate(request.plan.data.leaves)}
        packings = Packings(self._rules, {leaf.fqn: leaf for leaf in request.plan.data.leaves})
        names = source.names()
        meant = dict.fromkeys(packings.meant(name, names) for name in order)
        fitting = []
        for packing in meant:
            found = list(packing.misfits(source)) if packing else []
            problems += found
            if packing and not found:
                fitting.append(packing)
        if problems:
            raise WeightMismatchError("Parts do not make up a weight.", problems=problems)
        for together in _interleaved(fitting, order):
            yield _as_one([packing.group(source) for packing in together])


def _interleaved(packings: Iterable[Packing], order: Mapping[str, int]) -> Iterator[list[Packing]]:
    """Packings, those together whose parts come in turn: experts, weights and biases.

    Weights are asked for in the order of the program, and only what one group has made is kept: a
    piece would be read once for each of its parts.
    """
    spans = []
    for packing in packings:
        if len(packing.gives) == 1:
            yield [packing]
            continue
        places = [order[name] for name in packing.gives]
        spans.append((min(places), max(places), packing))
    found: list[list[Packing]] = []
    end = -1
    for first, last, packing in sorted(spans, key=lambda span: span[:2]):
        if first < end and len(found[-1]) < _TOGETHER:
            found[-1].append(packing)
        else:
            found.append([packing])
        end = max(end, last) if first < end else last
    yield from found


def _as_one(groups: Sequence[WeightGroup]) -> WeightGroup:
    if len(groups) == 1:
        return groups[0]

    def make() -> Made:
        return Made({name: value for one in groups for name, value in one.make().values.items()})

    takes = tuple(name for one in groups for name in one.takes)
    gives = {name: info for one in groups for name, info in one.gives.items()}
    return WeightGroup(takes, gives, make, formula=tuple(one.formula for one in groups))


@dataclass(frozen=True, eq=False)  # known by identity
class Packing:
    """A rule for one piece, in one direction.

    Attributes:
        rule: The rule.
        piece: Name of the piece.
        parts: Names of its parts; those of the first template come first, by their numbers.
        leaves: What the program has, by name.
        cuts: Whether the program has the parts.
    """

    rule: Pack
    piece: str
    parts: tuple[str, ...]
    leaves: Mapping[str, Leaf]
    cuts: bool

    @property
    def takes(self) -> tuple[str, ...]:
        """Names that are given."""
        return (self.piece,) if self.cuts else self.parts

    @property
    def gives(self) -> tuple[str, ...]:
        """Names that the program has."""
        return self.parts if self.cuts else (self.piece,)

    def misfits(self, source: Headers) -> Iterator[Problem]:
        """Why it cannot be followed; of which dtype a weight is, is a matter of casts."""
        names = source.names()
        lacking = [name for name in self.takes if name not in names]
        strange = [name for name in self.gives if name not in self.leaves]
        if lacking or strange:
            wanted = f"a part of {self.piece!r}"
            yield from (Problem(name, "missing", wanted=wanted) for name in lacking)
            hint = f"{self.piece!r} would be cut into it and {len(self.parts) - 1} more"
            yield from (Problem(name, "not in the model", wanted, hint=hint) for name in strange)
            return
        infos = {name: source.info(name) for name in self.takes}
        unusable = {name: info.unusable for name, info in infos.items() if info.unusable}
        yield from (Problem(name, "unusable", why) for name, why in unusable.items())
        first = infos[self.takes[0]]
        for name, info in infos.items() if not unusable else ():
            if info.dtype != first.dtype:
                yield Problem(name, "dtype", info.dtype, f"{first.dtype}, as the first part")
        if not unusable:
            given = {name: info.shape for name, info in infos.items()}
            yield from self._odd_shapes({n: self.leaves[n].shape for n in self.gives} | given)

    def _odd_shapes(self, shapes: Mapping[str, Shape]) -> Iterator[Problem]:
        """Parts that do not fit into the piece, or do not make it up."""
        whole = shapes[self.piece] if self.cuts else self.leaves[self.piece].shape
        sizes = {name: shapes[name] for name in self.parts}
        if len(sizes) == 1:
            yield from self._odd_part(sizes[self.parts[0]], whole)
            return
        dim = self._dim(whole)
        if dim is None:
            wanted = f"a dimension of {whole}"
            yield Problem(self.piece, "cannot be packed", f"dim {self.rule.dim}", wanted)
            return
        lies = {name: self._as_it_lies(shape, whole) for name, shape in sizes.items()}
        odd = [
            name
            for number, (name, shape) in enumerate(lies.items())
            if self._is_odd(shape, whole, lies[self._first_like(number)])
            or (self.rule.transposed and len(sizes[name]) < _MATRIX)
        ]
        for name in odd:
            fit = f"one that fits into {whole} in dimension {dim}"
            if self.cuts:
                yield Problem(self.piece, "shape", str(whole), f"{name!r} {sizes[name]} in it")
            else:
                yield Problem(name, "shape", str(sizes[name]), fit)
        if len(odd) < len(lies):
            yield from self._odd_totals(lies, whole, dim)

    def _odd_part(self, part: Shape, whole: Shape) -> Iterator[Problem]:
        """The only part, where it is not like the piece."""
        fits = _without_ones(self._turned(part)) == _without_ones(whole)
        if not fits or (self.rule.transposed and len(part) < _MATRIX):
            found, wanted = (whole, part) if self.cuts else (part, whole)
            how = "transposed " if self.rule.transposed else ""
            hint = "leave out the rule that transposes it" if found == wanted else ""
            yield Problem(self.takes[0], "shape", str(found), f"{how}{wanted}", hint)

    def _odd_totals(self, lies: Mapping[str, Shape], whole: Shape, dim: int) -> Iterator[Problem]:
        """Sizes that do not add up."""
        known = {name: shape for name, shape in lies.items() if len(shape) > dim}
        counted = self.parts[:: self._numbers] if self._is_grid(dim) else self.parts
        totals = {dim: sum(known[name][dim] for name in counted if name in known)}
        if self._is_grid(dim):
            totals[0] = self._numbers
        for d, total in sorted(totals.items()):
            if total == whole[d]:
                continue
            if self.cuts:
                found, wanted = f"{whole[d]} in dimension {d}", f"{total}, as the model's parts"
            else:
                found, wanted = f"{total} in dimension {d} of all parts", str(whole[d])
            yield Problem(self.piece, "shape", found, wanted)

    def _is_odd(self, shape: Shape, whole: Shape, first: Shape) -> bool:
        """Whether a part cannot lie in the piece beside the first one of its template."""
        dim = self._dim(whole)
        if len(shape) != len(whole):
            return True
        if dim is not None and self._is_grid(dim):
            rest = (n != m for d, (n, m) in enumerate(zip(shape, whole, strict=True)) if d != dim)
            next(rest)  # that of the first dimension, in which parts are stacked
            return shape != first or shape[0] != 1 or any(rest)
        return any(n != whole[d] for d, n in enumerate(shape) if d != dim)

    # -- where a part lies ------------------------------------------------------------------

    @property
    def _numbers(self) -> int:
        """How many parts each template of the rule has."""
        return len(self.parts) // len(self.rule.parts)

    def _dim(self, whole: Shape) -> int | None:
        """The dimension in which parts lie one after another; None if the piece has no such one."""
        if self.rule.numbered and len(self.rule.parts) == 1:
            return 0 if whole else None
        dim = self.rule.dim
        return dim % len(whole) if -len(whole) <= dim < len(whole) else None

    def _is_grid(self, dim: int) -> bool:
        """Whether parts are stacked in one dimension and lie one after another in another one."""
        return self.rule.numbered and dim != 0

    def _first_like(self, number: int) -> str:
        """The first part of the same template."""
        return self.parts[number - number % self._numbers]

    def _turned(self, shape: Shape) -> Shape:
        """The shape of a part, transposed where the rule says so."""
        if self.rule.transposed and len(shape) > 1:
            return (*shape[:-2], shape[-1], shape[-2])
        return shape

    def _as_it_lies(self, shape: Shape, whole: Shape) -> Shape:
        """The shape of a part in the piece, with all of its dimensions."""
        shape = self._turned(shape)
        if len(shape) == len(whole) - 1:
            dim = 0 if self.rule.numbered else self._dim(whole) or 0
            return (*shape[:dim], 1, *shape[dim:])
        return shape

    def _cut(self, piece: torch.Tensor, shapes: Sequence[Shape]) -> Iterator[torch.Tensor]:
        """All parts as views of the piece.

        Args:
            piece: The piece.
            shapes: Shapes of the parts.
        """
        if len(shapes) == 1:
            yield (piece.mT if self.rule.transposed else piece).reshape(shapes[0])
            return
        whole = tuple(piece.shape)
        dim = self._dim(whole) or 0
        start = 0
        for number, shape in enumerate(shapes):
            size = self._as_it_lies(shape, whole)[dim]
            if not self._is_grid(dim):
                view = piece.narrow(dim, start, size)
                start += size
            else:
                view = piece.narrow(dim, start, size).narrow(0, number % self._numbers, 1)
                start += size if (number + 1) % self._numbers == 0 else 0
            if len(shape) < len(whole):
                view = view.squeeze(0 if self.rule.numbered else dim)
            yield view.mT if self.rule.transposed else view

    # -- making it --------------------------------------------------------------------------

    def group(self, source: WeightSource) -> WeightGroup:
        """What it takes, gives and makes."""
        dtype = source.info(self.takes[0]).dtype
        gives = {
            name: TensorInfo(dtype=dtype, shape=self.leaves[name].shape) for name in self.gives
        }
        shapes = tuple(self._shape_of(name, source) for name in self.parts)
        formula = ("packed", self.rule, self.cuts, shapes, tuple(i.shape for i in gives.values()))
        return WeightGroup(self.takes, gives, partial(self._make, source, shapes), formula=formula)

    def _shape_of(self, part: str, source: Headers) -> Shape:
        return self.leaves[part].shape if self.cuts else source.info(part).shape

    def _make(self, source: WeightSource, shapes: Sequence[Shape]) -> Made:
        with torch.no_grad():
            if self.cuts:
                views = self._cut(source.get(self.piece), shapes)
                return Made(dict(zip(self.parts, views, strict=True)))
            return Made({self.piece: self._joined(source, shapes)})

    def _joined(self, source: WeightSource, shapes: Sequence[Shape]) -> torch.Tensor:
        whole, first = self.leaves[self.piece].shape, source.get(self.parts[0])
        if len(self.parts) == 1:  # a view of it will do
            return (first.mT if self.rule.transposed else first).reshape(whole)
        piece = torch.empty(whole, dtype=first.dtype, device=first.device)
        for name, view in zip(self.parts, self._cut(piece, shapes), strict=True):
            part = first if name == self.parts[0] else source.get(name)
            if part.dtype is not piece.dtype or part.shape != view.shape:
                raise SourceError(f"{source.description}: {name!r} is not what it was said to be.")
            view.copy_(part)
        return piece


class Packings:
    """All rules for the pieces and parts of one program, by name."""

    def __init__(self, rules: Iterable[Pack], leaves: Mapping[str, Leaf]) -> None:
        """Look every name up once.

        Args:
            rules: The rules; those that come first are tried first.
            leaves: What the program has, by name.
        """
        self._leaves = leaves
        self._of: dict[str, list[Packing]] = defaultdict(list)
        for rule in rules:
            for packing in (*self._joining(rule), *self._cutting(rule)):
                for name in packing.gives:
                    self._of[name].append(packing)

    @property
    def names(self) -> set[str]:
        """Names that pieces and parts may have where they are given."""
        return self.names_for(self._of)

    def names_for(self, names: Iterable[str]) -> set[str]:
        """Names of all that some weights of the program can be made of."""
        packings = {packing for name in names for packing in self._of.get(name, ())}
        return {name for packing in packings for name in packing.takes}

    def meant(self, name: str, given: Collection[str]) -> Packing | None:
        """How a weight of the program is made of what is given; None if it is not.

        Args:
            name: The program's name.
            given: Names that there are; of what it is made of perhaps not all.
        """
        for packing in self._of.get(name, ()):
            here = packing.takes == (name,) or name not in given
            if here and any(one in given for one in packing.takes):
                return packing
        return None

    def complete(self, name: str, given: Collection[str]) -> Packing | None:
        """The same, where all is there that it is made of."""
        packing = self.meant(name, given)
        return packing if packing and all(one in given for one in packing.takes) else None

    def _joining(self, rule: Pack) -> Iterator[Packing]:
        """Pieces that the program has."""
        matches = _matcher(rule.into)
        for leaf in self._leaves.values():
            found = matches(leaf.fqn)
            if found is None:
                continue
            numbers = _numbers_in(rule, leaf.shape) if rule.numbered else 1
            if numbers <= _MOST:
                yield self._packing(rule, found["place"] or "", numbers, cuts=False)

    def _cutting(self, rule: Pack) -> Iterator[Packing]:
        """Pieces of which the program has a part."""
        if rule.parts == (rule.into,):
            return  # it is the same in both directions
        numbers: dict[str, int] = {}
        for matches in map(_matcher, rule.parts):
            for name in self._leaves:
                found = matches(name)
                if found is not None:
                    number = int(found["number"]) + 1 if rule.numbered else 1
                    place = found["place"] or ""
                    numbers[place] = max(number, numbers.get(place, 0))
        for place, number in numbers.items():
            if number <= _MOST:
                yield self._packing(rule, place, number, cuts=True)

    def _packing(self, rule: Pack, place: str, numbers: int, *, cuts: bool) -> Packing:
        parts = tuple(
            _at(part, place).replace("*", str(number))
            for part in rule.parts
            for number in range(numbers)
        )
        return Packing(rule, _at(rule.into, place), parts, self._leaves, cuts)


def _numbers_in(rule: Pack, shape: Shape) -> int:
    """How many parts of each template a piece of some shape has."""
    if not shape:
        return 0
    in_a_row = len(rule.parts) > 1 and rule.dim % len(shape) == 0
    return shape[0] // len(rule.parts) if in_a_row else shape[0]


def _at(template: str, place: str) -> str:
    """A name that a template stands for; weights of the model itself have no dot before them."""
    return template.removeprefix("" if place else "{}.").replace("{}", place)


def _matcher(template: str) -> Callable[[str], re.Match[str] | None]:
    """Matches names that a template stands for."""
    begin = "{}." if template.startswith("{}.") else ""
    rest = template.removeprefix(begin)
    literals = re.split(r"\{\}|\*", rest)
    pattern = re.escape(rest).replace(r"\{\}", "(?P<place>.*)")
    pattern = r"(?:(?P<place>.*)\.)?" + pattern if begin else pattern
    pattern = pattern.replace(r"\*", r"(?P<number>0|[1-9]\d{0,3})")
    matches = re.compile(pattern, re.DOTALL).fullmatch

    def matching(name: str) -> re.Match[str] | None:
        if (begin or name.startswith(literals[0])) and name.endswith(literals[-1]):
            return matches(name)
        return None

    return matching


def _without_ones(shape: Shape) -> Shape:
    """A shape without dimensions of one element: a linear layer is a convolution of 1 x 1."""
    return tuple(size for size in shape if size != 1)
