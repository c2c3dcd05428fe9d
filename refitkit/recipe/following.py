"""Which sources the guards of a plan follow from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.model import CallRef, SourceRef

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refitkit.model import OpCall, PlanData


def sources_of_guards(data: PlanData) -> tuple[str, ...]:
    """FQNs that the values of guards follow from, each once, as the recipe names them."""
    found: dict[str, None] = {}
    seen: set[int] = set()
    waiting: list[object] = [guard.value for guard in data.guards]
    while waiting:
        value = waiting.pop()
        if isinstance(value, SourceRef):
            found[value.fqn] = None
        elif isinstance(value, CallRef) and value.call not in seen:
            seen.add(value.call)
            waiting.extend(_arguments(data.calls[value.call]))
    return tuple(found)


def _arguments(call: OpCall) -> Iterator[object]:
    for argument in (*call.args, *call.kwargs.values()):
        yield from argument if isinstance(argument, tuple) else (argument,)
