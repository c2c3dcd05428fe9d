"""Weights that are in memory already: state_dicts, live modules, programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from refitkit.errors import Problem, SourceError, raised_as
from refitkit.program.ambient import plain, why_not_real
from refitkit.program.dtypes import dtype_name, unusable_dtype
from refitkit.program.facts import tensors_of
from refitkit.recipe import TensorMap
from refitkit.recipe.sources import ModuleWeights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from refitkit.protocols import WeightSource


def from_mapping(state: Mapping[Any, Any]) -> WeightSource:
    """A state_dict, or a trainer's dictionary with some in it.

    Tensors are read where they are, never copied or changed.

    Raises:
        SourceError: Keys are not names.
    """
    if isinstance(state, dict):  # other mappings may read a value when it is looked at
        state = flattened(state, "This dictionary")
    odd = [key for key in state if not isinstance(key, str)]
    if odd:
        problems = [Problem(repr(key), "key", type(key).__name__, "str") for key in odd]
        raise SourceError("A state_dict maps names to tensors.", problems=problems)
    return TensorMap(state, f"a state_dict of {len(state)} entries")


def from_object(thing: object) -> WeightSource | None:
    """A live module or a program; None for anything else."""
    if isinstance(thing, torch.nn.Module):
        return ModuleWeights(thing)
    if isinstance(thing, ExportedProgram):
        return ProgramWeights(thing)
    return None


class ProgramWeights(TensorMap):
    """The weights of a program; see ``refitkit.protocols.HoldsProgram``.

    Its constants and all of its buffers are among them, as they are part of the program: a refit
    gives what compiling it would.

    Attributes:
        program: The program.
    """

    def __init__(self, program: ExportedProgram) -> None:
        """Keep the program, no copies."""
        constants = program.constants.keys()
        super().__init__(tensors_of(program), "an ExportedProgram", not_persistent=constants)
        self.program = program


# MERGED nesting: State_dicts in a trainer's dictionary: ``{"model": state_dict, "epoch": 3}``.
#
# Names are made as ``torch.distributed.checkpoint`` makes them (``flatten_state_dict``): keys,
# joined with dots. Lists, and mappings with keys that are no strings, such as an optimizer's
# state, have no names here: nothing in them is a weight of a module.

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


# MERGED streams: Weights that come one after another, as trainers of policies send them.


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
