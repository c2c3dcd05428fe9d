"""Programs in, networks out: opening sessions for a program."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt.options import IMPORTS, plain
from refitkit.builtin.torch_tensorrt.parts import Structure
from refitkit.builtin.torch_tensorrt.rows import constants_of
from refitkit.builtin.torch_tensorrt.worker import programs, recordings
from refitkit.builtin.torch_tensorrt.worker.client import SERVER, SessionClient
from refitkit.builtin.torch_tensorrt.worker.regions import Region
from refitkit.errors import ConfigError, Problem
from refitkit.model import Slot
from refitkit.temporary import TemporaryFolder

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch.export import ExportedProgram

    from refitkit.protocols import Tools
    from refitkit.recipe import Recorded


@dataclass(frozen=True)
class Planned:
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
) -> Planned:
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
    chosen = plain(options)
    imports = chosen.pop(IMPORTS, [])
    if not isinstance(imports, list) or not all(isinstance(name, str) for name in imports):
        problem = Problem(IMPORTS, "type", repr(imports), "a list of names of modules")
        raise ConfigError("These options cannot be used.", problems=[problem])
    session = SERVER.session(tools.tell)
    with TemporaryFolder() as folder:
        programs.write_program(program, folder.path)
        found = session.call(
            "open",
            tell=tools.tell,
            folder=str(folder.path),
            options=chosen,
            layer_types=[one.model_dump() for one in tools.layer_types.values()],
            imports=imports,
            places=sys.path if imports else [],
            record=record,
        )
        recorded = recordings.read_recording(folder.path, found["recorded"]) if record else None
    return Planned(
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
