"""Programs in, networks out: opening sessions for a program."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save

from refitkit.builtin.torch_tensorrt.parts import Structure
from refitkit.builtin.torch_tensorrt.recording import constants_of
from refitkit.builtin.torch_tensorrt.settings import IMPORTS, plain_options
from refitkit.builtin.torch_tensorrt.worker import messages as programs
from refitkit.builtin.torch_tensorrt.worker import messages as recordings
from refitkit.builtin.torch_tensorrt.worker.client import SERVER, SessionClient
from refitkit.builtin.torch_tensorrt.worker.messages import Region
from refitkit.errors import CompileError, ConfigError, Problem
from refitkit.files.temporary import TemporaryFolder
from refitkit.model import Leaf, Slot
from refitkit.program import KeptProgram, facts_of
from refitkit.program.dtypes import dtype_of
from refitkit.program.facts import tensors_of
from refitkit.recipe import TensorMap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram

    from refitkit.protocols import Tools
    from refitkit.recipe import Recorded


@dataclass(frozen=True)
class PlannedProgram:
    """A program in a session.

    Attributes:
        session: Holds its networks.
        structures: All parts, in the order of their calls.
        slots: Their slots, by part.
        settings: Settings on which they depend, as text.
        versions: Versions of what made them.
        constants: What the program has and no state_dict holds, by FQN.
        recorded: How slots follow from the program's weights; None where it was not recorded.
        layer_types: Names of the layer types that hold weights.
    """

    session: SessionClient
    structures: tuple[Structure, ...]
    slots: Mapping[str, tuple[Slot, ...]]
    settings: Mapping[str, str]
    versions: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]
    recorded: Recorded | None = None
    layer_types: tuple[str, ...] = ()

    @property
    def all_slots(self) -> list[Slot]:
        """Slots of all parts."""
        return [slot for slots in self.slots.values() for slot in slots]

    def values(self) -> dict[str, dict[str, torch.Tensor]]:
        """Values of all slots, by part and slot, flat; mapped from files that are gone already."""
        with TemporaryFolder() as folder:
            self.session.call("values", folder=str(folder.path))
            return {
                name: Region.open(folder.path / name, slots).views
                for name, slots in self.slots.items()
            }

    def build(self, name: str) -> bytes:
        """Engine bytes of one part with its present values.

        Raises:
            CompileError: TensorRT refused it.
        """
        with TemporaryFolder() as folder:
            path = folder.path / name
            self.session.call("build", engine=name, path=str(path))
            return path.read_bytes()


def plan_program(
    program: ExportedProgram, options: Mapping[str, Any], tools: Tools, *, record: bool = False
) -> PlannedProgram:
    """Cut a program into parts and make networks of them, in a session of its own.

    Args:
        program: The program; it is read only.
        options: Options of the backend.
        tools: What the pipeline lends.
        record: Whether to write down how weights follow from those of the program.

    Raises:
        ConfigError: An option does not exist.
        ToolchainError: torch_tensorrt is not installed.
        CompileError: The program cannot be lowered, cut or converted.
        NotRefittableError: Weights cannot be told apart.
    """
    chosen = plain_options(options)
    imports = chosen.pop(IMPORTS, [])
    if not isinstance(imports, list) or not all(isinstance(name, str) for name in imports):
        problem = Problem(IMPORTS, "type", repr(imports), "a list of names of modules")
        raise ConfigError("These options cannot be used.", problems=[problem])
    session = SERVER.session(tools.progress)
    with TemporaryFolder() as folder:
        programs.write_program(program, folder.path)
        found = session.call(
            "open",
            progress=tools.progress,
            folder=str(folder.path),
            options=chosen,
            layer_types=[one.model_dump() for one in tools.layer_types.values()],
            imports=imports,
            places=sys.path if imports else [],
            record=record,
        )
        recorded = recordings.read_recording(folder.path, found["recorded"]) if record else None
    return PlannedProgram(
        session=session,
        structures=tuple(map(Structure.model_validate, found["structures"])),
        slots={
            name: tuple(map(Slot.model_validate, slots)) for name, slots in found["slots"].items()
        },
        settings=found["settings"],
        versions=found["versions"],
        constants=constants_of(program),
        recorded=recorded,
        layer_types=tuple(found["layer_types"]),
    )


# MERGED template: What is kept of a program so that its networks can be made again: all but the
# weights.
#
# Weights are slots, whose values the module has. Integers and what no state_dict holds are kept,
# because converters may put such values into the network's structure.

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
