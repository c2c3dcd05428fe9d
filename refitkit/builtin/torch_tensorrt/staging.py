"""Bringing a caller's values into the staging set of an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refitkit.errors import Problem, WeightMismatchError
from refitkit.program.dtypes import dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from refitkit.builtin.torch_tensorrt.arena import Arena
    from refitkit.builtin.torch_tensorrt.upload import Uploader
    from refitkit.builtin.torch_tensorrt.weighttypes import WeightFact
    from refitkit.protocols import SlotValue


def fill(
    arena: Arena,
    facts: Mapping[str, WeightFact],
    values: Sequence[SlotValue],
    uploader: Uploader,
) -> None:
    """Copy values that fit; the caller's tensors are free when this returns, or raises.

    Raises:
        WeightMismatchError: Lists all that do not fit.
    """
    problems: list[Problem] = []
    try:
        with torch.no_grad():
            for value in values:
                tensor, fact = value.load(), facts[value.slot.name]
                found = list(_misfits(fact, tensor))
                problems += found
                if not found:
                    uploader.copy(arena.views[fact.name], tensor)
    finally:
        uploader.finish()
    if problems:
        raise WeightMismatchError("Values do not fit the engine.", problems=problems)


def _misfits(fact: WeightFact, tensor: torch.Tensor) -> Iterator[Problem]:
    kind = dtype_name(tensor.dtype)
    if kind != fact.dtype:
        yield Problem(fact.name, "dtype", kind, fact.dtype)
    if tensor.numel() != fact.count:
        found = f"{tensor.numel()} {tuple(tensor.shape)}"
        yield Problem(fact.name, "number of elements", found, str(fact.count))
    elif fact.shape is not None and tuple(tensor.shape) != fact.shape:
        yield Problem(fact.name, "shape", str(tuple(tensor.shape)), str(fact.shape))
