"""Rules of ``pack``: a weight that one side has in one piece and the other side in parts.

Examples are q, k and v in one ``qkv`` weight, gate and up, and experts. A rule is an equation
between a piece and its parts. The module hides in which direction a rule is applied and where a
part lies in its piece. Names say the direction: the program has one side, the source the other.
Shapes of the program say where a piece is cut. Parts are views of their piece: cutting copies
nothing.

Read from top to bottom: ``PackTransform`` is the transform that a refit calls, ``PackIndex`` finds
the rule for a name, and ``PackConversion`` checks shapes and moves the data.
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

_MAX_PARTS = 1 << 12
"""A rule with numbers does not apply to a piece with more parts: those are not experts."""
_MAX_BATCH = 8
"""Most pieces that are in memory at once."""
_MATRIX_DIMS = 2


class PackTransform:
    """Joins parts into pieces that the program has, and cuts pieces into parts that it has.

    Attributes:
        name: Name of the transform in reports.
        priority: Place in the order of transforms: after names, before casts.
    """

    name = "packs"
    priority = 20

    def __init__(self, rules: tuple[Pack, ...]) -> None:
        """Create a transform that applies these rules; the first that fits is used."""
        self._rules = rules

    def groups(self, request: TransformRequest) -> Iterator[WeightGroup]:
        """Yield groups that convert pieces, mostly one for each piece.

        Raises:
            WeightMismatchError: Parts are missing or unusable, or their dtypes or shapes do not
                fit. The error lists all problems.
        """
        source, problems = request.source, list[Problem]()
        leaves = {leaf.fqn: leaf for leaf in request.plan.data.leaves}
        order = {name: index for index, name in enumerate(leaves)}
        index = PackIndex(self._rules, leaves)
        names = source.names()
        fitting = []
        # A conversion that cuts a piece is found by each of its parts: dict.fromkeys keeps it once.
        for conversion in dict.fromkeys(index.find(name, names) for name in order):
            if conversion is None:
                continue
            found = list(conversion.problems(source))
            problems += found
            if not found:
                fitting.append(conversion)
        if problems:
            raise WeightMismatchError("Parts do not make up a weight.", problems=problems)
        for batch in _batches(fitting, order):
            yield _as_one([conversion.group(source) for conversion in batch])


def _batches(
    conversions: Iterable[PackConversion], order: Mapping[str, int]
) -> Iterator[list[PackConversion]]:
    """Yield conversions; those whose parts alternate in the program come in one list.

    The pipeline asks for weights in the order of the program and keeps the results of one group
    only. Experts alternate: gate, down and up of the first, then of the second. In groups of their
    own, each piece would be read again for each of its parts.

    Args:
        conversions: Conversions that fit.
        order: Position of each weight in the program.
    """
    spans = []
    for conversion in conversions:
        if len(conversion.gives) == 1:
            yield [conversion]
            continue
        positions = [order[name] for name in conversion.gives]
        spans.append((min(positions), max(positions), conversion))
    batches: list[list[PackConversion]] = []
    end = -1
    for first, last, conversion in sorted(spans, key=lambda span: span[:2]):
        if first < end and len(batches[-1]) < _MAX_BATCH:
            batches[-1].append(conversion)
        else:
            batches.append([conversion])
        end = max(end, last) if first < end else last
    yield from batches


def _as_one(groups: Sequence[WeightGroup]) -> WeightGroup:
    """Return a group that takes and gives everything that some groups do."""
    if len(groups) == 1:
        return groups[0]

    def make() -> Made:
        return Made({name: value for one in groups for name, value in one.make().values.items()})

    takes = tuple(name for one in groups for name in one.takes)
    gives = {name: info for one in groups for name, info in one.gives.items()}
    return WeightGroup(takes, gives, make, formula=tuple(one.formula for one in groups))


# -- finding the rule for a name --------------------------------------------------------------


class PackIndex:
    """All conversions that rules allow for one program, by the names of its weights."""

    def __init__(self, rules: Iterable[Pack], leaves: Mapping[str, Leaf]) -> None:
        """Match every name of the program with every rule, once.

        Args:
            rules: Rules of ``pack``; those that come first are tried first.
            leaves: Leaves of the program, by FQN.
        """
        self._leaves = leaves
        self._by_result: dict[str, list[PackConversion]] = defaultdict(list)
        for rule in rules:
            for conversion in (*self._joining(rule), *self._cutting(rule)):
                for name in conversion.gives:
                    self._by_result[name].append(conversion)

    @property
    def source_names(self) -> set[str]:
        """All names that a source may have for a conversion to apply."""
        return self.source_names_of(self._by_result)

    def source_names_of(self, names: Iterable[str]) -> set[str]:
        """Return all names in a source from which some weights of the program can be made."""
        conversions = {one for name in names for one in self._by_result.get(name, ())}
        return {name for conversion in conversions for name in conversion.takes}

    def find(self, name: str, given: Collection[str]) -> PackConversion | None:
        """Return the conversion that makes a weight; None if the source has nothing for one.

        Args:
            name: Name of the weight in the program.
            given: Names in the source. Some that the conversion takes may be missing.
        """
        for conversion in self._by_result.get(name, ()):
            # A weight that the source has under its own name is left alone, unless the rule
            # transposes it under that name.
            applies = conversion.takes == (name,) or name not in given
            if applies and any(taken in given for taken in conversion.takes):
                return conversion
        return None

    def find_complete(self, name: str, given: Collection[str]) -> PackConversion | None:
        """Return what ``find`` returns if the source has all names that the conversion takes."""
        found = self.find(name, given)
        return found if found and all(taken in given for taken in found.takes) else None

    def _joining(self, rule: Pack) -> Iterator[PackConversion]:
        """Yield a conversion for each piece that the program has."""
        match = _matcher(rule.into)
        for leaf in self._leaves.values():
            found = match(leaf.fqn)
            if found is None:
                continue
            count = _count_numbers(rule, leaf.shape) if rule.numbered else 1
            if count <= _MAX_PARTS:
                yield self._conversion(rule, found["place"] or "", count, cuts=False)

    def _cutting(self, rule: Pack) -> Iterator[PackConversion]:
        """Yield a conversion for each piece that has a part in the program."""
        if rule.parts == (rule.into,):
            return  # the rule transposes a weight in place: ``_joining`` has yielded it
        counts: dict[str, int] = {}
        for match in map(_matcher, rule.parts):
            for name in self._leaves:
                found = match(name)
                if found is not None:
                    count = int(found["number"]) + 1 if rule.numbered else 1
                    place = found["place"] or ""
                    counts[place] = max(count, counts.get(place, 0))
        for place, count in counts.items():
            if count <= _MAX_PARTS:
                yield self._conversion(rule, place, count, cuts=True)

    def _conversion(self, rule: Pack, place: str, count: int, *, cuts: bool) -> PackConversion:
        parts = tuple(
            _expand(part, place).replace("*", str(number))
            for part in rule.parts
            for number in range(count)
        )
        return PackConversion(rule, _expand(rule.into, place), parts, self._leaves, cuts)


def _count_numbers(rule: Pack, shape: Shape) -> int:
    """Return how many numbers ``*`` stands for, given the shape of the piece."""
    if not shape:
        return 0
    # Stacks of several templates lie one after another in dimension 0 if ``dim`` is 0, too.
    shares_dim = len(rule.parts) > 1 and rule.dim % len(shape) == 0
    return shape[0] // len(rule.parts) if shares_dim else shape[0]


def _expand(template: str, place: str) -> str:
    """Return a template with ``{}`` replaced.

    An empty place stands for weights of the model itself, which have no dot before their name.
    """
    return template.removeprefix("" if place else "{}.").replace("{}", place)


def _matcher(template: str) -> Callable[[str], re.Match[str] | None]:
    """Return a function that matches a name with a template: groups ``place`` and ``number``."""
    begin = "{}." if template.startswith("{}.") else ""
    rest = template.removeprefix(begin)
    literals = re.split(r"\{\}|\*", rest)
    pattern = re.escape(rest).replace(r"\{\}", "(?P<place>.*)")
    pattern = r"(?:(?P<place>.*)\.)?" + pattern if begin else pattern
    pattern = pattern.replace(r"\*", r"(?P<number>0|[1-9]\d{0,3})")
    matches = re.compile(pattern, re.DOTALL).fullmatch

    def match(name: str) -> re.Match[str] | None:
        # Comparing literal ends first is faster: nearly all names fail there.
        if (begin or name.startswith(literals[0])) and name.endswith(literals[-1]):
            return matches(name)
        return None

    return match


# -- one piece --------------------------------------------------------------------------------


class Headers(Protocol):
    """Names and headers of a source, without its data."""

    def names(self) -> Collection[str]:
        """Return the names of all entries."""

    def info(self, fqn: str) -> TensorInfo:
        """Return dtype and shape of an entry."""


@dataclass(frozen=True, eq=False)  # compared by identity
class PackConversion:
    """A rule applied to one piece, in one direction.

    Without ``*`` in the rule, each template of it names one part. Parts lie one after another along
    a dimension of the piece (as ``torch.cat`` puts them), or are stacked along it (``torch.stack``)
    if they have one dimension less.

    With ``*``, each template names as many parts as there are numbers. They are stacked along
    dimension 0. If the rule's ``dim`` is another one, the parts form a grid: numbers along
    dimension 0, templates along ``dim``.

    Attributes:
        rule: Rule that the conversion applies.
        piece: Name of the piece.
        parts: Names of the parts: all numbers of the first template, then those of the second.
        leaves: Leaves of the program, by FQN.
        cuts: Whether the program has the parts, and the source the piece.
    """

    rule: Pack
    piece: str
    parts: tuple[str, ...]
    leaves: Mapping[str, Leaf]
    cuts: bool

    @property
    def takes(self) -> tuple[str, ...]:
        """Names that the source has."""
        return (self.piece,) if self.cuts else self.parts

    @property
    def gives(self) -> tuple[str, ...]:
        """Names that the program has."""
        return self.parts if self.cuts else (self.piece,)

    def group(self, source: WeightSource) -> WeightGroup:
        """Return the group that converts the entries of a source without ``problems``."""
        dtype = source.info(self.takes[0]).dtype
        gives = {
            name: TensorInfo(dtype=dtype, shape=self.leaves[name].shape) for name in self.gives
        }
        shapes = self._part_shapes(source)
        formula = ("packed", self.rule, self.cuts, shapes, tuple(i.shape for i in gives.values()))
        return WeightGroup(self.takes, gives, partial(self._make, source, shapes), formula=formula)

    def problems(self, source: Headers) -> Iterator[Problem]:
        """Yield everything that prevents the conversion.

        Dtypes need not be those of the program: casts are applied later.
        """
        names = source.names()
        missing = [name for name in self.takes if name not in names]
        unknown = [name for name in self.gives if name not in self.leaves]
        if missing or unknown:
            wanted = f"a part of {self.piece!r}"
            yield from (Problem(name, "missing", wanted=wanted) for name in missing)
            hint = f"{self.piece!r} would be cut into it and {len(self.parts) - 1} more"
            yield from (Problem(name, "not in the model", wanted, hint=hint) for name in unknown)
            return
        infos = {name: source.info(name) for name in self.takes}
        unusable = {name: info.unusable for name, info in infos.items() if info.unusable}
        if unusable:  # has no dtype and shape to compare
            yield from (Problem(name, "unusable", why) for name, why in unusable.items())
            return
        first = infos[self.takes[0]]
        for name, info in infos.items():
            if info.dtype != first.dtype:
                yield Problem(name, "dtype", info.dtype, f"{first.dtype}, as the first part")
        whole = infos[self.piece].shape if self.cuts else self.leaves[self.piece].shape
        yield from self._shape_problems(whole, self._part_shapes(source))

    # -- checking shapes ----------------------------------------------------------------------

    def _part_shapes(self, source: Headers) -> tuple[Shape, ...]:
        """Return the shape of each part, on the side that has the parts."""
        if self.cuts:
            return tuple(self.leaves[name].shape for name in self.parts)
        return tuple(source.info(name).shape for name in self.parts)

    def _shape_problems(self, whole: Shape, parts: Sequence[Shape]) -> Iterator[Problem]:
        """Yield parts that do not fit into the piece, and sizes that do not add up.

        Args:
            whole: Shape of the piece.
            parts: Shapes of the parts.
        """
        if len(parts) == 1:
            yield from self._single_part_problems(parts[0], whole)
            return
        shapes = dict(zip(self.parts, parts, strict=True))
        dim = self._dim(whole)
        if dim is None:
            wanted = f"a dimension of {whole}"
            yield Problem(self.piece, "cannot be packed", f"dim {self.rule.dim}", wanted)
            return
        inside = {name: self._shape_in_piece(shape, whole) for name, shape in shapes.items()}
        misfits = [
            name
            for index, (name, shape) in enumerate(inside.items())
            if self._is_misfit(shape, whole, dim, inside[self.parts[self._template_start(index)]])
            or (self.rule.transposed and len(shapes[name]) < _MATRIX_DIMS)
        ]
        for name in misfits:
            if self.cuts:
                yield Problem(self.piece, "shape", str(whole), f"{name!r} {shapes[name]} in it")
            else:
                wanted = f"one that fits into {whole} in dimension {dim}"
                yield Problem(name, "shape", str(shapes[name]), wanted)
        if len(misfits) < len(inside):
            yield from self._size_problems(inside, whole, dim)

    def _single_part_problems(self, part: Shape, whole: Shape) -> Iterator[Problem]:
        """Yield a problem if the only part does not have the shape of the piece.

        Dimensions of size 1 do not count: a linear layer is a convolution of 1 x 1.
        """
        fits = _without_ones(self._transpose(part)) == _without_ones(whole)
        if not fits or (self.rule.transposed and len(part) < _MATRIX_DIMS):
            found, wanted = (whole, part) if self.cuts else (part, whole)
            how = "transposed " if self.rule.transposed else ""
            hint = "leave out the rule that transposes it" if found == wanted else ""
            yield Problem(self.takes[0], "shape", str(found), f"{how}{wanted}", hint)

    def _size_problems(
        self, inside: Mapping[str, Shape], whole: Shape, dim: int
    ) -> Iterator[Problem]:
        """Yield dimensions in which the sizes of all parts do not add up to that of the piece.

        Args:
            inside: Shapes of the parts with all dimensions of the piece, by name.
            whole: Shape of the piece.
            dim: Dimension in which parts lie one after another.
        """
        known = {name: shape for name, shape in inside.items() if len(shape) > dim}
        # In a grid, one part of each template shows the size along ``dim``.
        counted = self.parts[:: self._count] if self._is_grid(dim) else self.parts
        totals = {dim: sum(known[name][dim] for name in counted if name in known)}
        if self._is_grid(dim):
            totals[0] = self._count
        for d, total in sorted(totals.items()):
            if total == whole[d]:
                continue
            if self.cuts:
                found, wanted = f"{whole[d]} in dimension {d}", f"{total}, as the model's parts"
            else:
                found, wanted = f"{total} in dimension {d} of all parts", str(whole[d])
            yield Problem(self.piece, "shape", found, wanted)

    def _is_misfit(self, shape: Shape, whole: Shape, dim: int, first: Shape) -> bool:
        """Return whether a part has a size that the piece does not allow.

        Args:
            shape: Shape of the part with all dimensions of the piece.
            whole: Shape of the piece.
            dim: Dimension in which parts lie one after another.
            first: Shape of the first part of the same template.
        """
        if len(shape) != len(whole):
            return True
        others = [d for d in range(len(whole)) if d != dim]
        if self._is_grid(dim):
            others.remove(0)
            if shape != first or shape[0] != 1:
                return True
        return any(shape[d] != whole[d] for d in others)

    # -- where a part lies --------------------------------------------------------------------

    @property
    def _count(self) -> int:
        """Number of parts that each template of the rule names."""
        return len(self.parts) // len(self.rule.parts)

    def _template_start(self, index: int) -> int:
        """Return the index of the first part of the same template."""
        return index - index % self._count

    def _dim(self, whole: Shape) -> int | None:
        """Return the dimension in which parts lie one after another; None if there is none."""
        if self.rule.numbered and len(self.rule.parts) == 1:
            return 0 if whole else None
        dim = self.rule.dim
        return dim % len(whole) if -len(whole) <= dim < len(whole) else None

    def _is_grid(self, dim: int) -> bool:
        """Return whether numbers lie along dimension 0 and templates along another one."""
        return self.rule.numbered and dim != 0

    def _transpose(self, shape: Shape) -> Shape:
        """Return the shape of a part after the rule has transposed it, if it does."""
        if self.rule.transposed and len(shape) > 1:
            return (*shape[:-2], shape[-1], shape[-2])
        return shape

    def _shape_in_piece(self, shape: Shape, whole: Shape) -> Shape:
        """Return the shape of a part with all dimensions of the piece: size 1 if it is stacked."""
        shape = self._transpose(shape)
        if len(shape) == len(whole) - 1:
            dim = 0 if self.rule.numbered else self._dim(whole) or 0
            return (*shape[:dim], 1, *shape[dim:])
        return shape

    # -- moving the data ----------------------------------------------------------------------

    def _make(self, source: WeightSource, shapes: Sequence[Shape]) -> Made:
        """Convert the entries. ``shapes`` are those of the parts."""
        with torch.no_grad():
            if self.cuts:
                views = self._views(source.get(self.piece), shapes)
                return Made(dict(zip(self.parts, views, strict=True)))
            return Made({self.piece: self._join(source, shapes)})

    def _join(self, source: WeightSource, shapes: Sequence[Shape]) -> torch.Tensor:
        """Return the piece: a new tensor, or a view if it has one part.

        Raises:
            SourceError: The source returned a tensor that does not match its header.
        """
        whole, first = self.leaves[self.piece].shape, source.get(self.parts[0])
        if len(self.parts) == 1:
            return (first.mT if self.rule.transposed else first).reshape(whole)
        piece = torch.empty(whole, dtype=first.dtype, device=first.device)
        # Filling views of the piece reads one part at a time; torch.cat would need all of them.
        for name, view in zip(self.parts, self._views(piece, shapes), strict=True):
            part = first if name == self.parts[0] else source.get(name)
            if part.dtype is not piece.dtype or part.shape != view.shape:
                raise SourceError(
                    f"{source.description}: the tensor of {name!r} does not match its header."
                )
            view.copy_(part)
        return piece

    def _views(self, piece: torch.Tensor, shapes: Sequence[Shape]) -> Iterator[torch.Tensor]:
        """Yield each part as a view of the piece.

        Args:
            piece: Tensor of the piece.
            shapes: Shapes of the parts, in their order.
        """
        if len(shapes) == 1:
            yield (piece.mT if self.rule.transposed else piece).reshape(shapes[0])
            return
        whole = tuple(piece.shape)
        dim = self._dim(whole) or 0
        start = 0
        for index, shape in enumerate(shapes):
            size = self._shape_in_piece(shape, whole)[dim]
            view = piece.narrow(dim, start, size)
            if self._is_grid(dim):
                number = index % self._count
                view = view.narrow(0, number, 1)
                # All numbers of a template lie at one place along ``dim``.
                start += size if number == self._count - 1 else 0
            else:
                start += size
            if len(shape) < len(whole):
                view = view.squeeze(0 if self.rule.numbered else dim)
            yield view.mT if self.rule.transposed else view


def _without_ones(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)
