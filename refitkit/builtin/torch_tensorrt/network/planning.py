"""Plans programs: opens a session that partitions a program and makes networks of its parts.

``plan_program`` is the entry. :class:`PlannedProgram` is its result, the module's handle on the
session. :class:`Template` is the program without its weights; a saved module needs it to create the
same networks again.
"""

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
from refitkit.builtin.torch_tensorrt.worker.client import SERVER, SessionClient
from refitkit.builtin.torch_tensorrt.worker.messages import Region, read_recording, write_program
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
        session: Client of the session that has the networks.
        structures: Structures of all parts, in the order of their calls.
        slots: Slots of the parts, by name of the part.
        settings: Settings that parts and slots depend on, as text.
        versions: Versions of the packages that engines depend on.
        constants: Tensors of the program that no state_dict has, by FQN.
        recorded: Recipes that compute slots from the program's weights; None if not recorded.
        layer_types: Names of the layer types that have the weights.
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
        """Slots of all parts, in the order of the parts."""
        return [slot for slots in self.slots.values() for slot in slots]

    def values(self) -> dict[str, dict[str, torch.Tensor]]:
        """Values of all slots by part and slot; flat.

        The tensors are mapped from files that are already deleted, so they stay valid.
        """
        # a mapped file stays readable after it is deleted
        with TemporaryFolder() as folder:
            self.session.call("values", folder=str(folder.path))
            return {
                name: Region.open(folder.path / name, slots).views
                for name, slots in self.slots.items()
            }

    def build(self, name: str) -> bytes:
        """Build one part with its current values, and return the engine bytes.

        Raises:
            CompileError: TensorRT refuses the network.
        """
        with TemporaryFolder() as folder:
            path = folder.path / name
            self.session.call("build", engine=name, path=str(path))
            return path.read_bytes()


def plan_program(
    program: ExportedProgram, options: Mapping[str, Any], tools: Tools, *, record: bool = False
) -> PlannedProgram:
    """Partition a program and make networks of its parts, in a new session.

    Args:
        program: The program; it is not changed.
        options: Options of the backend.
        tools: Layer types and progress reports of the pipeline.
        record: Whether to write recipes that compute the weights from those of the program.

    Raises:
        ConfigError: An option does not exist or has another type.
        ToolchainError: torch_tensorrt is not installed.
        CompileError: The program cannot be lowered, partitioned or converted.
        NotRefittableError: Names do not identify the weights.
    """
    chosen = plain_options(options)
    # imports are for the session itself, not a setting of Torch-TensorRT
    imports = chosen.pop(IMPORTS, [])
    if not isinstance(imports, list) or not all(isinstance(name, str) for name in imports):
        problem = Problem(IMPORTS, "type", repr(imports), "a list of names of modules")
        raise ConfigError("These options cannot be used.", problems=[problem])
    # tensors go through files in a folder, because messages are JSON
    session = SERVER.session(tools.progress)
    with TemporaryFolder() as folder:
        write_program(program, folder.path)
        found = session.call(
            "open",
            progress=tools.progress,
            folder=str(folder.path),
            options=chosen,
            layer_types=[one.model_dump() for one in tools.layer_types.values()],
            imports=imports,
            # the worker may not find the user's modules by its own paths
            import_paths=sys.path if imports else [],
            record=record,
        )
        recorded = read_recording(folder.path, found["recorded"]) if record else None
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


# -- templates -----------------------------------------------------------------------------------

GRAPH, FACTS, CONSTANTS = "template.json", "template-facts.json", "template-constants.safetensors"
_PHYSICAL_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
_PLACEHOLDER_VALUE = 0.5  # a usual number: converters may treat 0, 1 and negative ones specially


@dataclass(frozen=True)
class Template:
    """A program without its weights, to create the same networks again.

    Weights are slots, and the module has their values. The template stores the other values.

    Attributes:
        graph: The program's graph, as ``KeptProgram`` writes it.
        leaves: The program's leaves.
        ties: Groups of names of one tensor.
        constants: Values of integer tensors and of tensors that no state_dict has, by FQN.
    """

    graph: bytes
    leaves: tuple[Leaf, ...]
    ties: tuple[tuple[str, ...], ...]
    constants: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, program: ExportedProgram) -> Template:
        """The template of a program.

        Raises:
            CompileError: torch cannot write the program without a pickle.
        """
        kept = KeptProgram.of(program)
        if kept is None:
            raise CompileError(
                "torch cannot write this program without a pickle, because it has custom objects."
            )
        facts, tensors = facts_of(program), tensors_of(program)
        constants = {
            # safetensors writes contiguous tensors only
            leaf.fqn: tensors[leaf.fqn].detach().clone().contiguous()
            for leaf in facts.leaves
            # converters may put integer values into the structure of a network
            if leaf.kept or not tensors[leaf.fqn].is_floating_point()
        }
        return cls(kept.to_bytes(), facts.leaves, facts.ties, constants)

    def program(self) -> ExportedProgram:
        """The program again. All elements of its floating-point weights have the same value."""
        tensors = {leaf.fqn: self._value(leaf) for leaf in self.leaves}
        kept = KeptProgram(self.graph, self.leaves, self.ties)
        return kept.restore(TensorMap(tensors), tensors.__getitem__)

    def _value(self, leaf: Leaf) -> torch.Tensor:
        kept = self.constants.get(leaf.fqn)
        return (
            torch.full(leaf.shape, _PLACEHOLDER_VALUE, dtype=dtype_of(leaf.dtype))
            if kept is None
            else kept
        )

    def members(self) -> dict[str, bytes]:
        """The template as members of an archive, by name."""
        facts = {"leaves": [leaf.model_dump() for leaf in self.leaves], "ties": self.ties}
        return {
            GRAPH: self.graph,
            FACTS: json.dumps(facts).encode(),
            CONSTANTS: save(dict(self.constants)),
        }

    @classmethod
    def from_members(cls, members: Mapping[str, bytes]) -> Template:
        """Read a template from members of an archive.

        Raises:
            ValueError: The members are damaged, or the tensors are larger than the memory.
        """
        facts = json.loads(members[FACTS])
        leaves = tuple(map(Leaf.model_validate, facts["leaves"]))
        _check_size(leaves)
        ties = tuple(tuple(map(str, tie)) for tie in facts["ties"])
        return cls(members[GRAPH], leaves, ties, load(members[CONSTANTS]))


def _check_size(leaves: tuple[Leaf, ...]) -> None:
    """Raise an error for tensors that do not fit: a small file can claim any shape."""
    size = sum(prod(leaf.shape) * dtype_of(leaf.dtype).itemsize for leaf in leaves)
    if size > _PHYSICAL_MEMORY:
        raise ValueError(f"its tensors have {size} bytes, more than the memory of this machine")
