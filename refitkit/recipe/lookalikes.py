"""Literals that hold the values of a weight: somebody read it where no recording sees that.

A method of torch that was looked up before the recording began, or a library that takes tensors as
they are, reads a weight unseen. What it makes of that looks like a literal of a converter.
"""

from __future__ import annotations

from collections import defaultdict
from math import prod
from typing import TYPE_CHECKING

import torch

from refitkit.program.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from refitkit.model import Leaf


class Lookalikes:
    """The weights of a program, to be compared with literals."""

    def __init__(self, leaves: Sequence[Leaf], tensors: Mapping[str, torch.Tensor]) -> None:
        """Look at no value yet.

        Args:
            leaves: All leaves of the program.
            tensors: Their values, by FQN.
        """
        self._tensors = tensors
        self._by_count: dict[int, list[str]] = defaultdict(list)
        for leaf in leaves:
            if leaf.persistent and dtype_of(leaf.dtype).is_floating_point:
                self._by_count[prod(leaf.shape)].append(leaf.fqn)

    def of(self, literal: torch.Tensor) -> str:
        """The FQN of a weight with these values, in any order and precision; empty if none has.

        A literal of a single value, such as zeros or ones, tells nothing.
        """
        names = self._by_count.get(literal.numel())
        if not names or not literal.is_floating_point():
            return ""
        wanted = _sorted(literal, literal.dtype)
        if wanted[0] == wanted[-1]:
            return ""
        for fqn in names:
            if torch.equal(_sorted(self._tensors[fqn], literal.dtype), wanted):
                return fqn
        return ""


def _sorted(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    found: torch.Tensor = value.detach().cpu().to(dtype).double().reshape(-1).sort().values
    return found
