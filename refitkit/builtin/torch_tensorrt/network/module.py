"""A network module: the parts of one program, which are built here and run elsewhere."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NoReturn

from refitkit.builtin.torch_tensorrt.names import NETWORK
from refitkit.builtin.torch_tensorrt.network import saving
from refitkit.builtin.torch_tensorrt.network.engine import NetworkEngine, PartBuilder, ScratchFolder
from refitkit.builtin.torch_tensorrt.network.planning import PlannedProgram, plan_program
from refitkit.builtin.torch_tensorrt.parts import check_structures
from refitkit.errors import EngineError, NotRefittableError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch.export import ExportedProgram

    from refitkit.builtin.torch_tensorrt.network.planning import Template
    from refitkit.protocols import Tools

VERIFIER_NAME = "engine-bytes"

_OFFLINE = (
    "Networks are built here and run where there is a GPU: save() writes the engines. Refits, "
    "plans and the verifiers 'weights' and 'engine-bytes' work."
)


class NetworkModule:
    """An opened network module; see ``refitkit.protocols.OpenedModule``.

    Attributes:
        attachments: What was saved beside it.
        planned: The session that holds its networks, with settings and versions.
        options: Options that it was compiled with.
        template: The program without its weights.
    """

    def __init__(
        self,
        planned: PlannedProgram,
        options: Mapping[str, Any],
        template: Template,
        tools: Tools,
        attachments: Mapping[str, bytes] | None = None,
    ) -> None:
        """Take a session; ``settle`` or ``adopt`` of its engines bring the values.

        Args:
            planned: The session.
            options: What it was planned with.
            template: Makes the same networks again.
            tools: What the pipeline lends.
            attachments: What was saved beside it.
        """
        self.attachments = dict(attachments or {})
        self.planned, self.options, self.template = planned, options, template
        self._tools = tools
        scratch = ScratchFolder()
        builder = PartBuilder(
            planned.session, lambda: _planned_alike(planned, template, options, tools).session
        )
        self._engines = {
            structure.name: NetworkEngine(
                structure, planned.slots[structure.name], builder, scratch
            )
            for structure in planned.structures
        }
        self._made_from: weakref.ref[ExportedProgram] | None = None

    # -- what a module offers ---------------------------------------------------------------

    @property
    def backend(self) -> str:
        """``tensorrt_network``."""
        return NETWORK

    @property
    def engines(self) -> Mapping[str, NetworkEngine]:
        """All parts by name, those that torch runs included."""
        return self._engines

    @property
    def offline(self) -> str:
        """Why it cannot be called."""
        return _OFFLINE

    @property
    def verifier(self) -> str:
        """``engine-bytes``."""
        return VERIFIER_NAME

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> NoReturn:  # noqa: ARG002
        """Refuse.

        Raises:
            NotRefittableError: Always: it cannot be called.
        """
        raise NotRefittableError(
            "A module of the backend 'tensorrt_network' cannot be called: its engines need a GPU.",
            hint=_OFFLINE,
        )

    def probe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> NoReturn:
        """Refuse, as ``run``."""
        self.run(args, kwargs)

    def drain(self) -> None:
        """Nothing is ever pending."""

    def save(self, path: Path, attachments: Mapping[str, bytes]) -> None:
        """Write the engines; see ``saving``."""
        saving.save(self, path, attachments)

    def reopen(self) -> NetworkModule:
        """A second module with networks of its own and the same present values."""
        planned = plan_program(self.template.program(), self.options, self._tools)
        other = NetworkModule(planned, self.options, self.template, self._tools, self.attachments)
        for name, engine in self._engines.items():
            values = {slot: engine.read(slot) for slot in engine.slots}
            other.take(name, values, self.engine_bytes(name))
        return other

    # -- planning ---------------------------------------------------------------------------

    def settle(self) -> None:
        """Build all parts with the values of the program that was planned.

        Raises:
            CompileError: One cannot be built.
        """
        for engine in self._engines.values():
            self._tools.progress(f"building {engine.name}")
            engine.settle(self.planned.session)

    def take(self, name: str, values: Mapping[str, torch.Tensor], engine: bytes) -> None:
        """Give one part its values and, unless torch runs it, the engine built with them."""
        self._engines[name].adopt(values, engine or None)

    def was_made_from(self, program: ExportedProgram) -> bool:
        """Whether this very program was compiled into it."""
        return self._made_from is not None and self._made_from() is program

    def remember(self, program: ExportedProgram) -> None:
        """Note that this program was compiled into it."""
        self._made_from = weakref.ref(program)

    def planned_again(
        self, program: ExportedProgram, tools: Tools, *, record: bool = False
    ) -> PlannedProgram:
        """A program in a session of its own, cut into the parts of this module.

        Raises:
            PlanMismatchError: It is cut into other parts; says what differs.
        """
        planned = plan_program(program, self.options, tools, record=record)
        check_structures(
            planned.structures, [engine.structure for engine in self._engines.values()]
        )
        return planned

    def rebuilt(
        self, program: ExportedProgram, tools: Tools
    ) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Values of all slots as the interpreter makes them of a program."""
        return self.planned_again(program, tools).values()

    def engine_bytes(self, name: str) -> bytes:
        """The engine bytes of one part with its present values; none where torch runs it."""
        file = self._engines[name].live.engine
        return b"" if file is None else file.read_bytes()

    def built_from(
        self, program: ExportedProgram, tools: Tools
    ) -> tuple[dict[str, bytes], dict[str, dict[str, torch.Tensor]]]:
        """What a program makes from scratch.

        Returns:
            Engine bytes by part, and for parts that torch runs the values of their tensors.
        """
        planned = self.planned_again(program, tools)
        built: dict[str, bytes] = {}
        for structure in planned.structures:
            if structure.accelerated:
                tools.progress(f"building {structure.name} from scratch")
                built[structure.name] = planned.build(structure.name)
        values = planned.values()
        return built, {name: values[name] for name in values.keys() - built.keys()}


def _planned_alike(
    planned: PlannedProgram, template: Template, options: Mapping[str, Any], tools: Tools
) -> PlannedProgram:
    """The same networks in another session, with other values.

    Raises:
        EngineError: They are not the same.
    """
    tools.progress("starting another session: the one that held the networks has died")
    again = plan_program(template.program(), options, tools)
    if (again.structures, again.slots) != (planned.structures, planned.slots):
        raise EngineError(
            "The networks cannot be made again: they come out differently.",
            hint="Save the module and load it in another process, or compile it again.",
        )
    return again
