"""State_dicts in a trainer's dictionary: ``{"model": state_dict, "epoch": 3}``.

Names are made as ``torch.distributed.checkpoint`` makes them (``flatten_state_dict``): keys, joined
with dots. Lists, and mappings with keys that are no strings, such as an optimizer's state, have no
names here: nothing in them is a weight of a module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import Problem, SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

_DEPTH = 16
_LIMIT = 1 << 27
"""Letters of all names: few bytes of a pickle may name one mapping a billion times."""
_COST = 64
"""Letters that a name counts for beside its own."""


def flattened(state: Any, what: str) -> Any:
    """A mapping in which others hold tensors, as one of names and tensors; all else as it is.

    Raises:
        SourceError: Two tensors have one name, or it is nested without end.
    """
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        return state
    if not any(isinstance(value, Mapping) for value in state.values()):
        return state  # as nearly always: the rest looks at every name
    found = list(_tensors(state, what))
    if not any(depth for depth, _, _ in found):
        return state
    problems = [
        Problem(name, "given twice", hint="by keys with dots in them: rename one")
        for name, times in Counter(name for _, name, _ in found).items()
        if times > 1
    ]
    if problems:
        raise SourceError(f"{what} has several tensors of one name.", problems=problems)
    return {name: value for _, name, value in found}


def _tensors(state: Mapping[str, Any], what: str) -> Iterator[tuple[int, str, torch.Tensor]]:
    """How deep each tensor lies, its name, and it, in the order of the file."""
    left = _LIMIT
    entered = [(0, "", iter(state.items()))]
    while entered:
        depth, before, entries = entered[-1]
        for key, value in entries:
            name = before + key
            left -= len(name) + _COST + (len(value) if isinstance(value, Mapping) else 0)
            if depth > _DEPTH or left < 0:
                raise SourceError(f"{what} is nested too deeply, or has too many names.")
            if isinstance(value, torch.Tensor):
                yield depth, name, value
            elif _is_inner(key, value):
                entered.append((depth + 1, f"{name}.", iter(value.items())))
                break
        else:
            entered.pop()


def _is_inner(key: object, value: object) -> bool:
    """Whether a value may hold tensors with names. Extra state of a module may be anything."""
    if not isinstance(value, Mapping) or not isinstance(key, str):
        return False
    return key.rpartition(".")[2] != "_extra_state" and all(isinstance(k, str) for k in value)
