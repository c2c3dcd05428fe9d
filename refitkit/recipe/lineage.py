"""Which leaves recorded values follow from, if anybody knows."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from refitkit.recipe.origins import Call, LeafOrigin, Literal, Origin, Unknown, bottom_up

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHAPES_ONLY = frozenset(
    f"aten.{name}"
    for name in (
        "empty_like.default",
        "full_like.default",
        "new_empty.default",
        "new_empty_strided.default",
        "new_full.default",
        "new_ones.default",
        "new_zeros.default",
        "ones_like.default",
        "zeros_like.default",
    )
)
"""Ops whose result does not depend on the values of their operand."""


_IN_AN_ARRAY = (
    "its numbers are in an array of NumPy on a weight that was given to code of a third party: "
    "they may have been read there, unseen"
)


class UnwritableError(Exception):
    """A value whose way is not known, or cannot stand in a plan; says why."""


class Lineage:
    """What the values of one recording follow from."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._follows: dict[Call, frozenset[str]] = {}

    def follows(self, origin: Origin) -> frozenset[str]:
        """The leaves that a value follows from.

        Raises:
            UnwritableError: Nobody knows.
        """
        for below in bottom_up(origin, lambda one: one.node in self._follows):
            with suppress(UnwritableError):
                self._followed(below)
        return self._followed(origin)

    def _followed(self, origin: Origin) -> frozenset[str]:
        node = origin.node
        if isinstance(node, Unknown):
            raise UnwritableError(f"{node.reason}, so nobody knows what it follows from")
        if isinstance(node, LeafOrigin):
            return frozenset({node.fqn})
        if isinstance(node, Literal):
            if any(loan.only_passed_on for loan in node.loans):
                raise UnwritableError(_IN_AN_ARRAY)
            return frozenset()
        found = self._follows.get(node)
        if found is None:
            found = frozenset[str]().union(*map(self._followed, _read_by(node)))
            self._follows[node] = found
        return found


def reads_first(call: Call) -> bool:
    """Whether the values of a call's first operand matter, not only its dtype and shape."""
    return call.op is not _aten.copy_.default and str(call.op) not in _SHAPES_ONLY


def _read_by(call: Call) -> Sequence[Origin]:
    """The operands whose values matter."""
    if reads_first(call):
        return call.inputs
    return [one for one in (*call.args[1:2], *call.numbers) if isinstance(one, Origin)]
