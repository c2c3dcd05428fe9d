"""Weights that are in memory already: state_dicts, live modules, programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from refitkit.builtin.weights.nesting import flattened
from refitkit.errors import Problem, SourceError
from refitkit.program.facts import tensors_of
from refitkit.recipe import TensorMap
from refitkit.recipe.module_weights import ModuleWeights

if TYPE_CHECKING:
    from collections.abc import Mapping

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
