"""Sources held against one another: do they have the same names, dtypes and shapes?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import Problem, SourceError
from refitkit.recipe.sources import describe_tensor
from refitkit.recipe.strangers import unexpected

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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
    wanted = infos_of(first)
    return [
        problem
        for other, part in others
        for problem in misfits(wanted, infos_of(part), f"part {number}", place_of(other, part))
    ]


def place_of(number: int, part: WeightSource) -> str:
    """A part, for messages."""
    return f"part {number} ({part.description})"


def misfits(
    first: Infos, other: Mapping[str, TensorInfo], whose: str, where: str
) -> Iterator[Problem]:
    """Everything in which one source is not like the first.

    What a state_dict would not hold may be missing, and more of it may be there: a live module
    fits to a file. Entries that are unusable have no dtype and shape to compare.

    Args:
        first: What is wanted.
        other: What is there.
        whose: What the first is, and
        where: what the other is, for messages.
    """
    more = {n: info for n, info in other.items() if n not in first and info.persistent}
    yield from unexpected(more, first.keys(), whose, more.__getitem__, where, given=other)
    for name, wanted in first.items():
        found = other.get(name)
        if found is not None:
            yield from _differences(name, found, wanted, where)
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
