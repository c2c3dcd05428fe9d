"""The backend object: what ``refitkit.protocols.Backend`` asks for."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt.names import NETWORK
from refitkit.builtin.torch_tensorrt.network import saving
from refitkit.builtin.torch_tensorrt.network.module import VERIFIER_NAME, NetworkModule
from refitkit.builtin.torch_tensorrt.network.planning import PlannedProgram, Template, plan_program
from refitkit.builtin.torch_tensorrt.parts import check_slots, check_structures
from refitkit.builtin.torch_tensorrt.rebuild import program_with
from refitkit.builtin.torch_tensorrt.recording import draft_of, slots_of
from refitkit.builtin.torch_tensorrt.settings import (
    key_of_options,
    options_from_file,
    plain_options,
)
from refitkit.errors import NotRefittableError, RefitError, UnsupportedTargetError
from refitkit.model import OutputMeasure, VerificationResult
from refitkit.program.bits import same_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import torch
    from torch.export import ExportedProgram

    from refitkit.protocols import OpenedModule, PlanDraft, PlanKey, Tools, VerifyRequest


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
        chosen = plain_options(options)
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
        planned: PlannedProgram = next(iter(parts.values()))
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
        return saving.describe(path) if saving.is_network_folder(path) else None

    def attachments(self, path: Path) -> Mapping[str, bytes]:
        """What a saved module keeps beside its engines."""
        return saving.read_attachments(path) if saving.is_network_folder(path) else {}


def partition(
    program: ExportedProgram,
    module: OpenedModule | None,
    options: Mapping[str, Any],
    tools: Tools,
) -> Mapping[str, PlannedProgram]:
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
    if not saving.is_network_folder(path):
        return None
    manifest = saving.read_manifest(path)
    template = saving.read_template(path)
    attachments = saving.read_attachments(path)
    options = options_from_file(manifest.options, str(path))
    planned = plan_program(saving.program_of(template, path), options, tools)
    _check_same(planned, manifest, path)
    module = NetworkModule(planned, options, template, tools, attachments)
    for part in manifest.parts:
        values = saving.read_values(path, part)
        module.take(part.structure.name, values, saving.engine_bytes(path, part))
    return module


def _check_same(planned: PlannedProgram, manifest: saving.NetworkManifest, path: Path) -> None:
    try:
        check_structures(planned.structures, [part.structure for part in manifest.parts])
        check_slots(planned.slots, {part.structure.name: part.slots for part in manifest.parts})
    except RefitError as exc:
        raise UnsupportedTargetError(
            f"The networks of {str(path)!r} cannot be made again here.",
            problems=exc.problems,
            hint=f"It was made with {manifest.versions}; here are {dict(planned.versions)}.",
        ) from exc


# MERGED verifier: The verifier ``engine-bytes``: a refitted network builds to the bytes of one
# made from scratch.
#
# The judge is TensorRT's builder, which is deterministic: equal bytes mean that every name,
# layout, dtype and value is right.


class EngineBytesVerifier:
    """Builds from scratch what a refit should have made."""

    @property
    def name(self) -> str:
        """``engine-bytes``."""
        return VERIFIER_NAME

    def prepare(self, request: VerifyRequest) -> Callable[[OpenedModule], VerificationResult]:
        """Build from scratch, before anything is written.

        Raises:
            NotRefittableError: The module has no networks, or there is no program with the new
                weights.
        """
        module = request.module
        if not isinstance(module, NetworkModule):
            raise NotRefittableError(
                "The verifier 'engine-bytes' is for modules of the backend 'tensorrt_network'.",
                hint="Use verify='outputs' with inputs, or verify='weights'.",
            )
        found = program_with(request.source, request.program, request.plan)
        if isinstance(found, str):
            raise NotRefittableError(
                f"Nothing can be built from scratch: {found}.",
                hint="Pass a program with the new weights, or use verify='weights'.",
            )
        built, torch_values = module.built_from(found(), request.tools)

        def judge(judged: OpenedModule) -> VerificationResult:
            measures = (
                *_engines(judged, built),
                *_torch_parts(judged, torch_values),
            )
            wrong = sum(not m.ok for m in measures)
            note = f"{len(built)} engines built from scratch, {wrong} parts differ"
            return VerificationResult(
                verifier=VERIFIER_NAME, ok=not wrong, measures=measures, note=note
            )

        return judge


def _engines(module: OpenedModule, built: dict[str, bytes]) -> Iterator[OutputMeasure]:
    for name, wanted in built.items():
        found = module.engine_bytes(name) if isinstance(module, NetworkModule) else b""
        ok = found == wanted
        note = "" if ok else f"is {_shown(found)}, from scratch {_shown(wanted)}"
        yield OutputMeasure(name=name, ok=ok, note=note)


def _torch_parts(
    module: OpenedModule, wanted: dict[str, dict[str, torch.Tensor]]
) -> Iterator[OutputMeasure]:
    for name, values in wanted.items():
        engine = module.engines[name]
        for slot, value in values.items():
            found = engine.read(slot).reshape(-1) if hasattr(engine, "read") else None
            ok = found is not None and same_bits(found, value)
            yield OutputMeasure(name=f"{name}/{slot}", ok=ok, note="" if ok else "bits differ")


def _shown(content: bytes) -> str:
    return f"{len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()[:12]}"
