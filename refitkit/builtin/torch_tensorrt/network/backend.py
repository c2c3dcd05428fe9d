"""The backend object: what ``refitkit.protocols.Backend`` asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt.matching import check_slots, check_structures
from refitkit.builtin.torch_tensorrt.names import NETWORK
from refitkit.builtin.torch_tensorrt.network import saving
from refitkit.builtin.torch_tensorrt.network.module import NetworkModule
from refitkit.builtin.torch_tensorrt.network.planning import Planned, plan_program
from refitkit.builtin.torch_tensorrt.network.template import Template
from refitkit.builtin.torch_tensorrt.options import plain, trusted
from refitkit.builtin.torch_tensorrt.plan_key import key_of_options
from refitkit.builtin.torch_tensorrt.rows import draft_of, slots_of
from refitkit.errors import RefitError, UnsupportedTargetError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch.export import ExportedProgram

    from refitkit.protocols import OpenedModule, PlanDraft, PlanKey, Tools


class NetworkBackend:
    """``tensorrt_network``: engines of TensorRT-RTX, built without a GPU."""

    @property
    def name(self) -> str:
        """Its name."""
        return NETWORK

    def compile(
        self, program: ExportedProgram, options: Mapping[str, Any], tools: Tools
    ) -> NetworkModule:
        """Build a program; ``options`` are those of ``torch_tensorrt.dynamo.compile``."""
        chosen = plain(options)
        planned = plan_program(program, chosen, tools, record=True)
        module = NetworkModule(planned, chosen, Template.of(program), tools)
        module.settle()
        module.remember(program)
        return module

    def draft(
        self,
        parts: Mapping[str, Any],
        module: OpenedModule | None,
        tools: Tools,  # noqa: ARG002 - the protocol's
    ) -> PlanDraft:
        """Every slot, with the recipe that was recorded for it."""
        planned: Planned = next(iter(parts.values()))
        slots = planned.all_slots if module is None else slots_of(module)
        return draft_of(planned, slots, "cpu")

    def plan_key(
        self,
        program: ExportedProgram,  # noqa: ARG002 - the protocol's
        module: OpenedModule | None,
        options: Mapping[str, Any],
    ) -> PlanKey | None:
        """The options: those that the module was made with, where there is one."""
        return key_of_options(module.options if isinstance(module, NetworkModule) else options)

    def describe(self, path: Path) -> Mapping[str, Any] | None:
        """What a saved module holds."""
        return saving.describe(path) if saving.is_ours(path) else None

    def attachments(self, path: Path) -> Mapping[str, bytes]:
        """What a saved module keeps beside its engines."""
        return saving.read_attachments(path) if saving.is_ours(path) else {}


def partition(
    program: ExportedProgram,
    module: OpenedModule | None,
    options: Mapping[str, Any],
    tools: Tools,
) -> Mapping[str, Planned]:
    """The parts of a program, as the session that holds all of them, by name.

    Raises:
        PlanMismatchError: They are not the parts of the module.
    """
    if isinstance(module, NetworkModule):
        planned = module.planned if module.was_made_from(program) else None
        if planned is None or planned.recorded is None:
            planned = module.planned_again(program, tools, record=True)
    else:
        planned = plan_program(program, options, tools, record=True)
    return {structure.name: planned for structure in planned.structures}


def open_folder(path: Path, tools: Tools) -> NetworkModule | None:
    """A module that ``save`` wrote; its networks are made again, with the saved values.

    Raises:
        UnsupportedTargetError: It is damaged, of another version, or made by other versions of
            torch_tensorrt, which make other networks.
    """
    if not saving.is_ours(path):
        return None
    manifest = saving.read_manifest(path)
    template = saving.read_template(path)
    attachments = saving.read_attachments(path)
    options = trusted(manifest.options, str(path))
    planned = plan_program(saving.program_of(template, path), options, tools)
    _check_same(planned, manifest, path)
    module = NetworkModule(planned, options, template, tools, attachments)
    for part in manifest.parts:
        values = saving.read_values(path, part)
        module.take(part.structure.name, values, saving.engine_bytes(path, part))
    return module


def _check_same(planned: Planned, manifest: saving.Manifest, path: Path) -> None:
    try:
        check_structures(planned.structures, [part.structure for part in manifest.parts])
        check_slots(planned.slots, {part.structure.name: part.slots for part in manifest.parts})
    except RefitError as exc:
        raise UnsupportedTargetError(
            f"The networks of {str(path)!r} cannot be made again here.",
            problems=exc.problems,
            hint=f"It was made with {manifest.versions}; here are {dict(planned.versions)}.",
        ) from exc
