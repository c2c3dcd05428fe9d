"""Bringing a caller's values into the staging set of an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refitkit.builtin.torch_tensorrt.arena import Constant
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

    What the plan keeps is not copied where the arena holds it already: some networks have more
    constants than weights.

    Raises:
        WeightMismatchError: Lists all that do not fit.
    """
    problems: list[Problem] = []
    copied: dict[str, Constant] = {}
    try:
        with torch.no_grad():
            for value in values:
                name, tensor = value.slot.name, value.load()
                constant = Constant.of(tensor) if value.pinned else None
                if constant and constant.is_same_as(arena.constants.get(name)):
                    continue
                room = arena.tensors[name]
                if tensor.dtype is not room.dtype or tensor.shape != room.shape:
                    wrong = list(_misfits(facts[name], tensor))
                    problems += wrong
                    if wrong:
                        continue
                arena.constants.pop(name, None)
                uploader.copy(room, tensor)
                if constant:
                    copied[name] = constant
    finally:
        uploader.finish()
    arena.constants |= copied  # they are there only now
    if problems:
        raise WeightMismatchError("Values do not fit the engine.", problems=problems)


def _misfits(fact: WeightFact, tensor: torch.Tensor) -> Iterator[Problem]:
    """What keeps a tensor from being the weight: nothing where only nobody knows its shape."""
    kind = dtype_name(tensor.dtype)
    if kind != fact.dtype:
        yield Problem(fact.name, "dtype", kind, fact.dtype)
    if tensor.numel() != fact.count:
        found = f"{tensor.numel()} {tuple(tensor.shape)}"
        yield Problem(fact.name, "number of elements", found, str(fact.count))
    elif fact.shape is not None and tuple(tensor.shape) != fact.shape:
        yield Problem(fact.name, "shape", str(tuple(tensor.shape)), str(fact.shape))
