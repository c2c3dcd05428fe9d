"""Parts of a checkpoint that are one weight of a program: q, k and v; gate and up."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from refitkit.errors import Problem, WeightMismatchError
from refitkit.model import TensorInfo
from refitkit.protocols import Made, WeightGroup

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from refitkit.model import Leaf, Pack
    from refitkit.protocols import TransformRequest, WeightSource


class Headers(Protocol):
    """What a source says of its entries, without data."""

    def names(self) -> Collection[str]:
        """Names of all entries."""

    def info(self, fqn: str) -> TensorInfo:
        """Dtype and shape of an entry."""


class Packs:
    """Joins parts into weights that the source does not have itself."""

    name = "packs"
    priority = 20

    def __init__(self, rules: tuple[Pack, ...]) -> None:
        """Follow rules."""
        self._rules = rules

    def groups(self, request: TransformRequest) -> Iterator[WeightGroup]:
        """One for each weight that is packed."""
        names, problems = request.source.names(), list[Problem]()
        for leaf in request.plan.data.leaves:
            for rule in self._rules if leaf.fqn not in names else ():
                parts = part_names(rule, leaf.fqn)
                if not any(part in names for part in parts):
                    continue
                found = list(misfits(parts, request.source, leaf, rule.dim))
                problems += found
                if not found:
                    yield _group(parts, request.source, leaf, rule.dim)
                break
        if problems:
            raise WeightMismatchError("Parts do not make up a weight.", problems=problems)


def part_names(rule: Pack, name: str) -> tuple[str, ...]:
    """Names of the parts of a weight; none where it is none of this rule."""
    before, _, after = rule.into.partition("{}")
    fits = name.startswith(before) and name.endswith(after)
    if not fits or len(name) < len(before) + len(after):
        return ()
    place = name[len(before) : len(name) - len(after)]
    return tuple(part.replace("{}", place) for part in rule.parts)


def _group(parts: tuple[str, ...], source: WeightSource, leaf: Leaf, dim: int) -> WeightGroup:
    info = TensorInfo(dtype=source.info(parts[0]).dtype, shape=leaf.shape)
    along = dim % len(leaf.shape)
    make = partial(_joined, source, parts, leaf.fqn, along)
    return WeightGroup(parts, {leaf.fqn: info}, make, formula=("joined", along))


def misfits(parts: tuple[str, ...], source: Headers, leaf: Leaf, dim: int) -> Iterator[Problem]:
    """Why parts do not make up a weight; of which dtype it is, is a matter of casts."""
    wanted, names = leaf.shape, source.names()
    lacking = [part for part in parts if part not in names]
    if lacking:
        yield from (Problem(part, "missing", wanted=f"a part of {leaf.fqn!r}") for part in lacking)
    elif not -len(wanted) <= dim < len(wanted):
        yield Problem(leaf.fqn, "cannot be packed", f"dim {dim}", f"a dimension of {wanted}")
    else:
        yield from _unlike({part: source.info(part) for part in parts}, leaf, dim % len(wanted))


def _unlike(infos: Mapping[str, TensorInfo], leaf: Leaf, dim: int) -> Iterator[Problem]:
    wanted, first = leaf.shape, next(iter(infos.values()))
    for part, info in infos.items():
        if _without(info.shape, dim) != _without(wanted, dim) or len(info.shape) != len(wanted):
            fit = f"one that fits into {wanted} in dimension {dim}"
            yield Problem(part, "shape", str(info.shape), fit)
        if info.dtype != first.dtype:
            yield Problem(part, "dtype", info.dtype, f"{first.dtype}, as the first part")
    total = sum(info.shape[dim] for info in infos.values() if len(info.shape) > dim)
    if total != wanted[dim]:
        found = f"{total} in dimension {dim} of all parts"
        yield Problem(leaf.fqn, "shape", found, str(wanted[dim]))


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return shape[:dim] + shape[dim + 1 :]


def _joined(source: WeightSource, parts: tuple[str, ...], name: str, dim: int) -> Made:
    tensors = [source.get(part) for part in parts]
    with torch.no_grad():
        return Made({name: torch.cat([t.to(tensors[0].device) for t in tensors], dim)})
