"""Weights that come one after another, as trainers of policies send them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import Problem, SourceError, raised_as
from refitkit.program.ambient import plain, why_not_real
from refitkit.program.dtypes import dtype_name, unusable_dtype
from refitkit.recipe import TensorMap

if TYPE_CHECKING:
    from collections.abc import Iterable


def from_pairs(pairs: Iterable[Any]) -> TensorMap:
    """Everything that an iterable of ``(name, tensor)`` gives, to its end.

    Tensors are copied, where they are, as they come: a sender may use its buffer again. So a whole
    second set of weights is in memory until the refit is done. Nothing is refitted before all came.

    Args:
        pairs: Gives names and tensors until it ends.

    Raises:
        SourceError: It broke off, or gave what is no pair, or a name twice; lists all of those.
    """
    spooled: dict[str, torch.Tensor] = {}
    problems: list[Problem] = []

    @plain  # a generator may give a tensor from inside of a mode of its own, which is then on
    def take(number: int, pair: Any) -> None:
        problem = _misfit(number, pair, spooled)
        if problem is None:
            name, value = pair
            known = not unusable_dtype(dtype_name(value.dtype)) or value.is_quantized
            spooled[name] = value.detach().clone() if known else value.detach()
        else:
            problems.append(problem)

    with raised_as(SourceError, "The stream of weights broke off"), torch.no_grad():
        for number, pair in enumerate(pairs):
            take(number, pair)
    if problems:
        raise SourceError("The stream of weights cannot be used.", problems=problems)
    return TensorMap(spooled, f"a stream of {len(spooled)} tensors")


def _misfit(number: int, pair: Any, known: dict[str, torch.Tensor]) -> Problem | None:
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):  # noqa: PLR2004
        return Problem(f"item {number}", "no pair", type(pair).__name__, "(name, tensor)")
    name, value = pair
    if not isinstance(value, torch.Tensor):
        return Problem(name, "not a tensor", type(value).__name__)
    if not_real := why_not_real(value):
        return Problem(name, "unusable", not_real)
    return Problem(name, "given twice") if name in known else None
