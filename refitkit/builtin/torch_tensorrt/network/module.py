"""A network module: the parts of one program, built here and run on another machine.

The module implements ``refitkit.protocols.OpenedModule`` except for calls, which need a GPU. A
session (``planning.PlannedProgram``) has its networks. Each part is a ``NetworkEngine``.
"""

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
"""Name of the default verifier; see ``backend.EngineBytesVerifier``."""

_OFFLINE = (
    "Save the module with save() and run its engines on a machine with a GPU. Refits, plans and "
    "the verifiers 'weights' and 'engine-bytes' work without one."
)


class NetworkModule:
    """An opened network module; see ``refitkit.protocols.OpenedModule``.

    Attributes:
        attachments: Data that was saved with the module, by name.
        planned: The session with the networks, their settings and versions.
        options: Options that the module was compiled with, as JSON data.
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
        """Create a module without values; call ``build_all``, or ``load_part`` for each part, next.

        Args:
            planned: The session with the networks.
            options: Options that the session was planned with.
            template: The program without its weights, to create the same networks again.
            tools: Layer types and progress reports of the pipeline.
            attachments: Data that was saved with the module, by name.
        """
        self.attachments = dict(attachments or {})
        self.planned, self.options, self.template = planned, options, template
        self._tools = tools
        scratch = ScratchFolder()
        # one builder: all parts share a session, and its replacement if it dies
        builder = PartBuilder(
            planned.session, lambda: _replan_identically(planned, template, options, tools).session
        )
        self._engines = {
            structure.name: NetworkEngine(
                structure, planned.slots[structure.name], builder, scratch
            )
            for structure in planned.structures
        }
        self._compiled_program: weakref.ref[ExportedProgram] | None = None

    # -- the OpenedModule protocol ----------------------------------------------------------

    @property
    def backend(self) -> str:
        """``tensorrt_network``."""
        return NETWORK

    @property
    def engines(self) -> Mapping[str, NetworkEngine]:
        """All parts by name, including those that torch runs."""
        return self._engines

    @property
    def offline(self) -> str:
        """The reason why the module cannot be called, and what to do instead."""
        return _OFFLINE

    @property
    def verifier(self) -> str:
        """``engine-bytes``."""
        return VERIFIER_NAME

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> NoReturn:  # noqa: ARG002
        """Raise an error, because the engines need a GPU.

        Raises:
            NotRefittableError: Always.
        """
        raise NotRefittableError(
            "A module of the backend 'tensorrt_network' cannot be called: its engines need a GPU.",
            hint=_OFFLINE,
        )

    def probe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> NoReturn:
        """Raise an error, like ``run``.

        Raises:
            NotRefittableError: Always.
        """
        self.run(args, kwargs)

    def synchronize(self) -> None:
        """Do nothing: the module never has pending work."""

    def save(self, path: Path, attachments: Mapping[str, bytes]) -> None:
        """Write the module or its engine; see ``saving.save`` for formats and errors."""
        saving.save(self, path, attachments)

    def reopen(self) -> NetworkModule:
        """A second module with its own networks and the same current values."""
        planned = plan_program(self.template.program(), self.options, self._tools)
        # planned without a recording: the pipeline gives a copy the plan of this module
        other = NetworkModule(planned, self.options, self.template, self._tools, self.attachments)
        for name, engine in self._engines.items():
            # views, which ``load_part`` copies into files of the second module
            values = {slot: engine.read(slot) for slot in engine.slots}
            other.load_part(name, values, self.engine_bytes(name))
        return other

    # -- planning ---------------------------------------------------------------------------

    def build_all(self) -> None:
        """Build all parts with the values of the planned program.

        Raises:
            CompileError: A part cannot be built.
        """
        for engine in self._engines.values():
            self._tools.progress(f"building {engine.name}")
            engine.build_from_session(self.planned.session)

    def load_part(self, name: str, values: Mapping[str, torch.Tensor], engine: bytes) -> None:
        """Give one part its values and the engine that was built with them.

        Args:
            name: Name of the part.
            values: Tensors by slot name, with the dtypes and counts of the slots.
            engine: The engine bytes; empty for a part that torch runs.
        """
        self._engines[name].adopt(values, engine or None)

    def was_compiled_from(self, program: ExportedProgram) -> bool:
        """Whether the module was compiled from this very program object."""
        return self._compiled_program is not None and self._compiled_program() is program

    def set_compiled_from(self, program: ExportedProgram) -> None:
        """Note the program that the module was compiled from, by a weak reference."""
        # weak: the module must not keep the weights of the program alive
        self._compiled_program = weakref.ref(program)

    def replan(
        self, program: ExportedProgram, tools: Tools, *, record: bool = False
    ) -> PlannedProgram:
        """A program in its own session, partitioned with the module's options.

        Args:
            program: The program; it is not changed.
            tools: Layer types and progress reports of the pipeline.
            record: Whether to write recipes that compute the weights from those of the program.

        Raises:
            PlanMismatchError: The program has other parts than the module. Lists the differences.
        """
        planned = plan_program(program, self.options, tools, record=record)
        check_structures(
            planned.structures, [engine.structure for engine in self._engines.values()]
        )
        return planned

    def rebuilt(
        self, program: ExportedProgram, tools: Tools
    ) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Values of all slots, as the interpreter computes them from a program.

        Returns:
            Flat tensors by part and slot.

        Raises:
            PlanMismatchError: The program has other parts than the module. Lists the differences.
        """
        return self.replan(program, tools).values()

    def engine_bytes(self, name: str) -> bytes:
        """The engine bytes of one part with its live values; empty if torch runs the part."""
        file = self._engines[name].live.engine
        return b"" if file is None else file.read_bytes()

    def built_from(
        self, program: ExportedProgram, tools: Tools
    ) -> tuple[dict[str, bytes], dict[str, dict[str, torch.Tensor]]]:
        """Build a program from scratch.

        Returns:
            Engine bytes by part; and for parts that torch runs, flat tensors by part and slot.

        Raises:
            PlanMismatchError: The program has other parts than the module. Lists the differences.
            CompileError: A part cannot be built.
        """
        planned = self.replan(program, tools)
        built: dict[str, bytes] = {}
        for structure in planned.structures:
            if structure.accelerated:
                tools.progress(f"building {structure.name} from scratch")
                built[structure.name] = planned.build(structure.name)
        # torch's parts have no engine, so their values are compared instead
        values = planned.values()
        return built, {name: values[name] for name in values.keys() - built.keys()}


def _replan_identically(
    planned: PlannedProgram, template: Template, options: Mapping[str, Any], tools: Tools
) -> PlannedProgram:
    """The same networks in another session. Their values are those of the template.

    Raises:
        EngineError: The new networks have other parts or slots.
    """
    tools.progress("the session with the networks died; starting another one")
    replanned = plan_program(template.program(), options, tools)
    # a region has the values in the order of the slots, so both must be equal
    if (replanned.structures, replanned.slots) != (planned.structures, planned.slots):
        raise EngineError(
            "The new session creates other networks than the one that died.",
            hint="Save the module and load it in another process, or compile it again.",
        )
    return replanned
