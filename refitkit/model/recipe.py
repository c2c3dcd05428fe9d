"""Recipes: how slot values follow from the model's own state, as plain data.

All recipes of a plan are one list of calls of aten ops, in an order in which each refers to earlier
ones only; a slot refers to the result that is its value. So what two slots have in common is
computed once. The list is part of ``manifest.json`` (see :mod:`refitkit.recipe.store`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from refitkit.model.base import Frozen
from refitkit.model.slot import Dim, DtypeName


class SourceRef(Frozen):
    """A tensor of the weight source.

    Of what no state_dict holds the plan keeps a value, for sources that have none.
    """

    kind: Literal["source"] = "source"
    fqn: str


class PinnedRef(Frozen):
    """A tensor that is kept in the plan, under this name."""

    kind: Literal["pinned"] = "pinned"
    name: str


class CallRef(Frozen):
    """A result of an earlier call.

    Attributes:
        call: Position of the call in the plan's list.
        output: Which of its results.
    """

    kind: Literal["call"] = "call"
    call: Dim
    output: Dim = 0


Value = Annotated[SourceRef | PinnedRef | CallRef, Field(discriminator="kind")]
"""Where a tensor comes from."""


class TorchName(Frozen):
    """A constant of torch: ``torch.float32``, ``torch.strided``, ``torch.contiguous_format``.

    Devices do not occur: a recipe runs where its operands are, or where it was recorded.
    """

    kind: Literal["torch"] = "torch"
    name: str


class Number(Frozen):
    """A number that JSON has no way to write: ``inf``, ``-inf``, ``nan``, complex ones."""

    kind: Literal["number"] = "number"
    text: str


Atom = SourceRef | PinnedRef | CallRef | TorchName | Number | bool | int | float | str | None
"""One argument of a call that is no list."""

Argument = Atom | tuple[Atom, ...]
"""One argument of a call. Lists are not nested: no schema of aten has a list of lists."""


class Tensor(Frozen):
    """What a call gives: dtype and shape."""

    dtype: DtypeName
    shape: tuple[Dim, ...]


class OpCall(Frozen):
    """One call of an aten op. It changes nothing: an op that writes does so to a copy.

    Attributes:
        op: Name of the overload, as torch writes it: ``aten.mul.Tensor``.
        args: Positional arguments.
        kwargs: Keyword arguments.
        results: Dtype and shape of each result; for an op that writes, of what it has written.
        device: Kind of device on which it was recorded: ``cpu``, ``cuda``.
    """

    op: str
    args: tuple[Argument, ...] = ()
    kwargs: dict[str, Argument] = Field(default_factory=dict)
    results: tuple[Tensor, ...]
    device: str = "cpu"


class Guard(Frozen):
    """A value that decided, while the plan was made, what the engines are or what a slot holds.

    Where it is another one now, recipes say nothing any more.

    Attributes:
        value: The value.
        sha256: Of its bytes, C-contiguous, little endian.
        dtype: Its dtype.
        shape: Its shape.
        shown: The value as text, where it is small.
        reason: How it was used.
    """

    value: Value
    sha256: str
    dtype: DtypeName
    shape: tuple[Dim, ...]
    shown: str = ""
    reason: str = ""
