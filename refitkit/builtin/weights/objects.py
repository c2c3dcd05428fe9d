"""Open weights that are in memory: state_dicts, trainers' dictionaries, modules, programs, streams.

The module also defines the names of nested state_dicts (``flattened``), which ``torch_files`` uses
for files.
"""

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
    """Return a source of a state_dict, or of a trainer's dictionary that contains some.

    Tensors are read where they are, and neither copied nor changed.

    Raises:
        SourceError: A key is not a string, two tensors have one name, or the nesting is too deep.
    """
    if isinstance(state, dict):  # iterating another mapping may read its values
        state = flattened(state, "This dictionary")
    if not all(issubclass(kind, str) for kind in _kinds(state)):
        invalid = [key for key in state if not isinstance(key, str)]
        problems = [Problem(repr(key), "key", type(key).__name__, "str") for key in invalid]
        raise SourceError("A state_dict maps names to tensors.", problems=problems)
    return TensorMap(state, f"a state_dict of {len(state)} entries")


def _kinds(values: Iterable[object]) -> set[type]:
    """The types of values. They are few, and asking each value takes longer."""
    return set(map(type, values))


def from_object(thing: object) -> WeightSource | None:
    """Return a source of a live module or a program; None for any other object."""
    if isinstance(thing, torch.nn.Module):
        return ModuleWeights(thing)
    if isinstance(thing, ExportedProgram):
        return ProgramWeights(thing)
    return None


class ProgramWeights(TensorMap):
    """A source of the weights of a program; see ``refitkit.protocols.HoldsProgram``.

    Constants and all buffers are part of a program, so they are entries, too: a refit then gives
    what compiling the program would give.

    Attributes:
        program: The program.
    """

    def __init__(self, program: ExportedProgram) -> None:
        """Create a source. It refers to the program's tensors and copies none."""
        constants = program.constants.keys()
        super().__init__(tensors_of(program), "an ExportedProgram", not_persistent=constants)
        self.program = program


# -- nested dictionaries ----------------------------------------------------------------------
#
# Names of {"model": state_dict, "epoch": 3} are those of ``torch.distributed.checkpoint``
# (``flatten_state_dict``): keys, joined with dots. Lists, and mappings whose keys are not strings,
# such as an optimizer's state, get no names: they hold no weights of a module.

_MAX_DEPTH = 16
_MAX_LETTERS = 1 << 27
"""Most letters of all names. A few bytes of a pickle may refer to one mapping a billion times."""
_COST = 64
"""Letters that count for each name in addition to its own."""


def flattened(state: Any, label: str) -> Any:
    """Return one mapping from names to all tensors in nested mappings.

    A value without nested tensors is returned unchanged.

    Args:
        state: Content of a file, or a dictionary of a trainer.
        label: Label of the source for error messages.

    Raises:
        SourceError: Two tensors have one name, the nesting is too deep, or there are too many
            names.
    """
    if not isinstance(state, Mapping) or not all(issubclass(kind, str) for kind in _kinds(state)):
        return state
    # Nearly always it is a flat state_dict. The rest takes time for each name.
    if not any(issubclass(kind, Mapping) for kind in _kinds(state.values())):
        return state
    found = list(_tensors(state, label))
    if not any(depth for depth, _, _ in found):
        return state
    problems = [
        Problem(name, "given twice", hint="by keys with dots in them: rename one")
        for name, times in Counter(name for _, name, _ in found).items()
        if times > 1
    ]
    if problems:
        raise SourceError(f"{label} has several tensors of one name.", problems=problems)
    return {name: value for _, name, value in found}


def _tensors(state: Mapping[str, Any], label: str) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Yield the depth, name and value of each tensor, in the order of the mappings."""
    remaining = _MAX_LETTERS
    # An explicit stack, so that a deep nesting cannot exhaust Python's.
    stack = [(0, "", iter(state.items()))]
    while stack:
        depth, prefix, entries = stack[-1]
        for key, value in entries:
            name = prefix + key
            remaining -= len(name) + _COST + (len(value) if isinstance(value, Mapping) else 0)
            if depth > _MAX_DEPTH or remaining < 0:
                raise SourceError(f"{label} is nested too deeply, or has too many names.")
            if isinstance(value, torch.Tensor):
                yield depth, name, value
            elif _may_have_tensors(key, value):
                stack.append((depth + 1, f"{name}.", iter(value.items())))
                break
        else:
            stack.pop()


def _may_have_tensors(key: object, value: object) -> bool:
    """Return whether a value is a mapping that may hold tensors with names."""
    if not isinstance(value, Mapping) or not isinstance(key, str):
        return False
    # The extra state of a module (``get_extra_state``) may be any mapping.
    return key.rpartition(".")[2] != "_extra_state" and all(isinstance(k, str) for k in value)


# -- streams ----------------------------------------------------------------------------------


def from_pairs(pairs: Iterable[Any]) -> TensorMap:
    """Read an iterable of ``(name, tensor)`` to its end, and return a source of all tensors.

    Each tensor is copied on its device when it arrives, because a sender may reuse its buffer. So a
    second set of weights is in memory until the refit ends. Nothing is refitted before the end of
    the stream.

    Args:
        pairs: Iterable of names and tensors, as trainers of policies send them.

    Raises:
        SourceError: The iterable raised, or yielded an invalid pair or a name twice. The error
            lists all of these.
    """
    received: dict[str, torch.Tensor] = {}
    problems: list[Problem] = []

    # A generator may enter a mode of torch before it yields. The mode is then on in this function.
    @plain
    def take(index: int, pair: Any) -> None:
        problem = _invalid_pair(index, pair, received)
        if problem is None:
            name, value = pair
            # Torch cannot clone dtypes that refitkit does not know. Such an entry is unusable.
            can_copy = not unusable_dtype(dtype_name(value.dtype)) or value.is_quantized
            received[name] = value.detach().clone() if can_copy else value.detach()
        else:
            problems.append(problem)

    with raised_as(SourceError, "The stream of weights broke off"), torch.no_grad():
        for index, pair in enumerate(pairs):
            take(index, pair)
    if problems:
        raise SourceError("The stream of weights cannot be used.", problems=problems)
    return TensorMap(received, f"a stream of {len(received)} tensors")


def _invalid_pair(index: int, pair: Any, received: dict[str, torch.Tensor]) -> Problem | None:
    """Return what is wrong with an item of a stream; None if it is a new name and a tensor."""
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):  # noqa: PLR2004
        return Problem(f"item {index}", "not a pair", type(pair).__name__, "(name, tensor)")
    name, value = pair
    if not isinstance(value, torch.Tensor):
        return Problem(name, "not a tensor", type(value).__name__)
    if not_real := why_not_real(value):
        return Problem(name, "unusable", not_real)
    return Problem(name, "given twice") if name in received else None
