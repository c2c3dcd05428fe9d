"""What is kept of a program so that its networks can be made again: all but the weights.

Weights are slots, whose values the module has. Integers and what no state_dict holds are kept,
because converters may put such values into the network's structure.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load, save

from refitkit.errors import CompileError
from refitkit.model import Leaf
from refitkit.program import KeptProgram, facts_of
from refitkit.program.dtypes import dtype_of
from refitkit.program.facts import tensors_of
from refitkit.recipe import TensorMap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram

GRAPH, FACTS, CONSTANTS = "template.json", "template-facts.json", "template-constants.safetensors"
_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
_FILLED = 0.5  # any number will do that is no special case: not 0, not 1, positive


@dataclass(frozen=True)
class Template:
    """A program without its weights.

    Attributes:
        graph: Its graph, as ``KeptProgram`` writes it.
        leaves: Its leaves.
        ties: Names of one tensor.
        constants: Values of integers, and of what no state_dict holds.
    """

    graph: bytes
    leaves: tuple[Leaf, ...]
    ties: tuple[tuple[str, ...], ...]
    constants: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, program: ExportedProgram) -> Template:
        """Keep a program.

        Raises:
            CompileError: torch cannot write it without a pickle.
        """
        kept = KeptProgram.of(program)
        if kept is None:
            raise CompileError(
                "torch cannot write this program without a pickle: it holds custom objects."
            )
        facts, tensors = facts_of(program), tensors_of(program)
        constants = {
            leaf.fqn: tensors[leaf.fqn].detach().clone().contiguous()
            for leaf in facts.leaves
            if leaf.kept or not tensors[leaf.fqn].is_floating_point()
        }
        return cls(kept.to_bytes(), facts.leaves, facts.ties, constants)

    def program(self) -> ExportedProgram:
        """The program again; its floating-point weights are all the same number."""
        tensors = {leaf.fqn: self._value(leaf) for leaf in self.leaves}
        kept = KeptProgram(self.graph, self.leaves, self.ties)
        return kept.restore(TensorMap(tensors), tensors.__getitem__)

    def _value(self, leaf: Leaf) -> torch.Tensor:
        kept = self.constants.get(leaf.fqn)
        return torch.full(leaf.shape, _FILLED, dtype=dtype_of(leaf.dtype)) if kept is None else kept

    def members(self) -> dict[str, bytes]:
        """As members of an archive."""
        facts = {"leaves": [leaf.model_dump() for leaf in self.leaves], "ties": self.ties}
        return {
            GRAPH: self.graph,
            FACTS: json.dumps(facts).encode(),
            CONSTANTS: save(dict(self.constants)),
        }

    @classmethod
    def from_members(cls, members: Mapping[str, bytes]) -> Template:
        """From members of an archive.

        Raises:
            ValueError: They are damaged.
        """
        facts = json.loads(members[FACTS])
        leaves = tuple(map(Leaf.model_validate, facts["leaves"]))
        _check_size(leaves)
        ties = tuple(tuple(map(str, tie)) for tie in facts["ties"])
        return cls(members[GRAPH], leaves, ties, load(members[CONSTANTS]))


def _check_size(leaves: tuple[Leaf, ...]) -> None:
    """Refuse what would not fit: a few bytes of a file can claim any number of elements."""
    size = sum(prod(leaf.shape) * dtype_of(leaf.dtype).itemsize for leaf in leaves)
    if size > _MEMORY:
        raise ValueError(f"its tensors have {size} bytes, which this machine cannot hold")
