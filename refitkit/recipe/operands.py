"""What calls are made of: operands, calls below them, leaves that they follow from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

from refitkit.model import CallRef, PinnedRef, SourceRef

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from refitkit.model import OpCall, Value


_REFERENCES = (SourceRef, PinnedRef, CallRef)


def is_reference(argument: Any) -> TypeGuard[Value]:
    """Whether an argument of a call stands for a tensor."""
    return isinstance(argument, _REFERENCES)


def operands_of(one: OpCall) -> tuple[Value, ...]:
    """The tensors among the arguments of a call."""
    flat: list[Any] = []
    for argument in (*one.args, *one.kwargs.values()):
        flat += argument if isinstance(argument, tuple) else (argument,)
    return tuple(filter(is_reference, flat))


def calls_below(values: Iterable[Value], operands: Callable[[int], Iterable[Value]]) -> set[int]:
    """Numbers of the calls that values are made by.

    Args:
        values: The values.
        operands: What a call is made of, by its number; nothing where the walk ends.
    """
    found: set[int] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if isinstance(value, CallRef) and value.call not in found:
            found.add(value.call)
            stack += operands(value.call)
    return found


class Followed:
    """The leaves that values follow from."""

    def __init__(self, calls: Sequence[OpCall], ties: Iterable[Sequence[str]] = ()) -> None:
        """Find out nothing yet; more calls may come.

        Args:
            calls: Each after those whose results it takes.
            ties: Classes of leaves that are one tensor: who follows from one follows from all.
        """
        self._calls = calls
        self._twins = {name: frozenset(tie) for tie in ties for name in tie}
        self._found: dict[int, frozenset[str]] = {}

    def by(self, value: Value) -> frozenset[str]:
        """Their names; none of what the plan keeps."""
        if isinstance(value, SourceRef):
            return self._twins.get(value.fqn, frozenset({value.fqn}))
        if isinstance(value, PinnedRef):
            return frozenset()
        return self.by_call(value.call)

    def by_call(self, number: int) -> frozenset[str]:
        """The same for what a call gives."""
        for below in range(len(self._found), number + 1):  # chains can be long: no recursion
            parts = map(self.by, operands_of(self._calls[below]))
            self._found[below] = frozenset[str]().union(*parts)  # threads may both find it
        return self._found[number]
