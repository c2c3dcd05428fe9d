"""Sources held against one another: do they have the same names, dtypes and shapes?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import Problem, SourceError
from refitkit.recipe.sources import describe_tensor
from refitkit.recipe.strangers import unexpected
from refitkit.recipe.ties import broken_ties, name_in, twins_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import torch

    from refitkit.model import TensorInfo
    from refitkit.protocols import WeightSource

Infos = dict[str, "TensorInfo"]


def infos_of(source: WeightSource) -> Infos:
    """What a source has, without reading data."""
    return {name: source.info(name) for name in source.names()}


def all_misfits(parts: Mapping[int, WeightSource]) -> list[Problem]:
    """Everything in which the others are not like the first of some parts.

    Args:
        parts: Sources, by the number that they have for users.
    """
    (number, first), *others = parts.items()
    wanted, found = infos_of(first), {other: infos_of(part) for other, part in others}
    twins = twins_where_needed(parts.values(), [wanted, *found.values()])
    problems = [
        problem
        for other, part in others
        for problem in misfits(wanted, found[other], f"part {number}", place_of(other, part), twins)
    ]
    return problems or [
        problem for part in parts.values() for problem in broken(set(twins.values()), part)
    ]


def twins_where_needed(
    parts: Iterable[WeightSource], infos: Sequence[Infos], more: Iterable[tuple[str, ...]] = ()
) -> dict[str, tuple[str, ...]]:
    """Names of one tensor, where a part lacks one of them and another part shows that it is tied.

    Args:
        parts: Sources of one model.
        infos: Headers of all of them, and of others.
        more: Further classes of names that are known to be one tensor.
    """
    first, *others = infos
    if all(first.keys() == other.keys() for other in others):  # as nearly always
        return {}
    twins = twins_of(parts, more)
    return {
        name: tie
        for name, tie in twins.items()
        if any(not other.keys() >= {*tie} for other in infos)
    }


def broken(ties: Iterable[tuple[str, ...]], part: WeightSource) -> Iterator[Problem]:
    """Names that are one tensor elsewhere, and that this part has several tensors for."""
    mine = {name for tie in ties for name in tie if name in part.names()}
    usable = {name for name in mine if not part.info(name).unusable}
    yield from broken_ties(ties, usable, part)


def place_of(number: int, part: WeightSource) -> str:
    """A part, for messages."""
    return f"part {number} ({part.description})"


def misfits(
    first: Infos,
    other: Mapping[str, TensorInfo],
    whose: str,
    where: str,
    twins: Mapping[str, tuple[str, ...]],
) -> Iterator[Problem]:
    """Everything in which one source is not like the first.

    What a state_dict would not hold may be missing, and more of it may be there: a live module
    fits to a file. Entries that are unusable have no dtype and shape to compare.

    Args:
        first: What is wanted.
        other: What is there.
        whose: What the first is, and
        where: what the other is, for messages.
        twins: Names of one tensor: it is enough to have it under one of them.
    """
    more = {
        name: info
        for name, info in other.items()
        if name_in(first, name, twins) is None and info.persistent
    }
    yield from unexpected(more, first.keys(), whose, more.__getitem__, where, given=other)
    for name, wanted in first.items():
        here = name_in(other, name, twins)
        if here is not None:
            yield from _differences(here, other[here], wanted, where)
        elif wanted.persistent:
            yield Problem(name, "missing", f"nothing in {where}", f"{wanted.dtype} {wanted.shape}")


def _differences(name: str, found: TensorInfo, wanted: TensorInfo, where: str) -> Iterator[Problem]:
    if found.unusable or wanted.unusable:
        return
    if found.dtype != wanted.dtype:
        yield Problem(name, "dtype", f"{found.dtype} in {where}", wanted.dtype)
    if found.shape != wanted.shape:
        yield Problem(name, "shape", f"{found.shape} in {where}", str(wanted.shape))


def read_as(info: TensorInfo, source: WeightSource, fqn: str) -> torch.Tensor:
    """An entry of a source, which may no longer be what it was: others would be broadcast.

    Raises:
        SourceError: It cannot be read, or has another dtype or shape than is wanted.
    """
    value = source.get(fqn)
    found = describe_tensor(value)
    if (found.dtype, found.shape) != (info.dtype, info.shape):
        what = f"{found.dtype} {found.shape}, no longer {info.dtype} {info.shape}"
        raise SourceError(f"{source.description}: {fqn!r} is {what}.")
    return value
