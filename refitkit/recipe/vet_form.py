"""Whether calls are written well: nothing is tried for it.

They are of ops that recipes may hold, with arguments that these take and references to what is
there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import Problem
from refitkit.recipe import ops
from refitkit.recipe.literals import decode_literal
from refitkit.recipe.operands import is_reference, operands_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from refitkit.model import Argument, OpCall
    from refitkit.recipe.vet_facts import Facts

ANY_STRIDE = ("aten.as_strided", "aten._reshape_alias")
"""How names of ops start that take any sizes and strides."""
_INT64 = range(-(2**63), 2**63)
_AT_LEAST_ONE = frozenset(
    {
        *("chunks", "dilation", "downscale_factor", "group", "groups", "kernel_size"),
        *(
            "num_groups",
            "output_size",
            "sections",
            "split_size",
            "step",
            "stride",
            "upscale_factor",
        ),
    }
)
"""Numbers that some kernels divide by without a look."""


class Form:
    """One call as it is written."""

    def __init__(self, number: int, call: OpCall) -> None:
        self._call, self._number = call, number
        self._name = name_of(number, call)
        any_stride = call.op.startswith(ANY_STRIDE)
        self._positive = frozenset[str]() if any_stride else _AT_LEAST_ONE

    def problems(self, facts: Facts) -> Iterator[Problem]:
        """What is wrong with it."""
        if not ops.is_allowed(self._call.op):
            hint = f"It may be one of another version of torch than {torch.__version__}."
            yield Problem(self._name, "no op that a recipe may hold", hint=hint)
            return
        op = ops.overload(self._call.op)
        names = [argument.name for argument in op._schema.arguments]  # noqa: SLF001
        unknown = set(self._call.kwargs) - set(names[len(self._call.args) :])
        if unknown or len(self._call.args) > len(names):
            yield Problem(self._name, "arguments that the op does not take", str(sorted(unknown)))
            return
        yield from self._of_results(op)
        operands = operands_of(self._call)
        if not operands or (ops.writes_to_operand(op) and not _starts_with_tensor(self._call)):
            yield Problem(self._name, "lacks an operand")
        for value in operands:
            if (reason := facts.missing(value, self._number)) is not None:
                yield Problem(self._name, *reason)
        for name, argument in by_name(op, self._call.args, self._call.kwargs):
            yield from self._of_argument(name, argument)

    def _of_results(self, op: Any) -> Iterator[Problem]:
        stated = len(self._call.results)
        if stated != _number_of_results(op, stated):
            yield Problem(self._name, "another number of results", str(stated))
        if not _is_device_kind(self._call.device):
            yield Problem(self._name, "no kind of device", self._call.device[:80])

    def _of_argument(self, name: str, argument: Argument) -> Iterator[Problem]:
        try:
            decoded = decode_literal(argument)
        except ValueError as exc:
            yield Problem(self._name, f"argument {name}", hint=str(exc))
            return
        if (name in {"device", "generator"} and argument is not None) or (
            name == "pin_memory" and argument
        ):
            yield Problem(self._name, f"argument {name}", str(argument)[:80], "none")
        for atom in decoded if isinstance(decoded, list) else [decoded]:
            if isinstance(atom, int) and atom not in _INT64:
                yield Problem(self._name, f"argument {name}", hint="a number of more than 64 bits")
            elif name in self._positive and isinstance(atom, int) and atom < 1:
                yield Problem(self._name, f"argument {name}", str(atom), "at least 1")


def by_name(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments by name."""
    for argument, given in zip(op._schema.arguments, args, strict=False):  # noqa: SLF001
        yield argument.name, given
    yield from kwargs.items()


def _number_of_results(op: Any, stated: int) -> int:
    """How many an op gives; of a list of any length, as many as the plan says."""
    returns = op._schema.returns  # noqa: SLF001
    return stated if any("List" in str(one.type) for one in returns) else len(returns)


def _starts_with_tensor(call: OpCall) -> bool:
    return bool(call.args) and is_reference(call.args[0])


def _is_device_kind(text: str) -> bool:
    try:
        return text != "meta" and torch.device(text).type == text
    except RuntimeError:
        return False


def name_of(number: int, call: OpCall) -> str:
    """What problems call it."""
    return f"calls.{number} ({call.op[:80]})"
