"""The backend ``tensorrt_network``, its partition hook and its verifier ``engine-bytes``.

:class:`NetworkBackend` compiles, ``partition`` plans, ``open_folder`` opens saved modules, and
:class:`EngineBytesVerifier` checks refits.
"""

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
    IMPORTS,
    key_of_options,
    options_from_file,
    plain_options,
)
from refitkit.builtin.torch_tensorrt.upstream import import_for_ops
from refitkit.errors import NotRefittableError, Problem, RefitError, UnsupportedTargetError
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
        """``tensorrt_network``."""
        return NETWORK

    def compile(
        self, program: ExportedProgram, options: Mapping[str, Any], tools: Tools
    ) -> NetworkModule:
        """Build a program and return the module.

        Args:
            program: The program; all tensors must be on the CPU.
            options: Options of ``torch_tensorrt.dynamo.compile``, and ``imports``.
            tools: Layer types and progress reports of the pipeline.

        Raises:
            ConfigError: An option does not exist, is reserved, or has another type.
            ToolchainError: torch_tensorrt is not installed.
            CompileError: The program cannot be lowered, partitioned, converted or built.
        """
        chosen = plain_options(options)
        planned = plan_program(program, chosen, tools, record=True)
        module = NetworkModule(planned, chosen, Template.of(program), tools)
        module.build_all()
        # so that the plan of this program reuses the recording instead of a second session
        module.set_compiled_from(program)
        return module

    def draft(
        self,
        parts: Mapping[str, Any],
        module: OpenedModule | None,
        tools: Tools,  # noqa: ARG002 - the protocol's
    ) -> PlanDraft:
        """The draft of a plan: every slot with its recorded recipe."""
        # ``partition`` returns the same session under the name of every part
        planned: PlannedProgram = next(iter(parts.values()))
        slots = planned.all_slots if module is None else slots_of(module)
        return draft_of(planned, slots, "cpu")

    def plan_key(
        self,
        program: ExportedProgram,  # noqa: ARG002 - the protocol's
        module: OpenedModule | None,
        options: Mapping[str, Any],
    ) -> PlanKey | None:
        """The plan's cache key, from the module's own options or else from ``options``."""
        return key_of_options(module.options if isinstance(module, NetworkModule) else options)

    def describe(self, path: Path) -> Mapping[str, Any] | None:
        """A description of a saved module; None for other files."""
        return saving.describe(path) if saving.is_network_folder(path) else None

    def attachments(self, path: Path) -> Mapping[str, bytes]:
        """The attachments of a saved module; empty for other files."""
        return saving.read_attachments(path) if saving.is_network_folder(path) else {}


def partition(
    program: ExportedProgram,
    module: OpenedModule | None,
    options: Mapping[str, Any],
    tools: Tools,
) -> Mapping[str, PlannedProgram]:
    """The parts of a program by name; each value is the session that has all of them.

    Args:
        program: The program; it is not changed.
        module: The module to plan for; None before a compilation.
        options: Options of the backend, used only without a network module.
        tools: Layer types and progress reports of the pipeline.

    Raises:
        PlanMismatchError: The program has other parts than the module.
    """
    if isinstance(module, NetworkModule):
        planned = module.planned if module.was_compiled_from(program) else None
        if planned is None or planned.recorded is None:
            # the module's session is only usable if it has this program's recipes
            planned = module.replan(program, tools, record=True)
    else:
        planned = plan_program(program, options, tools, record=True)
    return {structure.name: planned for structure in planned.structures}


def open_folder(path: Path, tools: Tools) -> NetworkModule | None:
    """Open a module that ``save`` wrote; None for any other path.

    A new session creates the networks again, and the engines get the saved values.

    Raises:
        UnsupportedTargetError: The folder is damaged or of another version, it needs modules of
            plugins that are not installed, or the installed versions create other networks.
    """
    if not saving.is_network_folder(path):
        return None
    manifest = saving.read_manifest(path)
    template = saving.read_template(path)
    attachments = saving.read_attachments(path)
    options = options_from_file(manifest.options, str(path), tools.may_import)
    # the template may have ops that only these modules register
    failures = import_for_ops(options.get(IMPORTS, []))
    try:
        program = saving.program_of(template, path)
    except UnsupportedTargetError as exc:
        problems = [Problem(name, "cannot be imported", why) for name, why in failures.items()]
        raise (
            exc
            if not problems
            else UnsupportedTargetError(
                exc.message, problems=[*exc.problems, *problems], hint=exc.hint
            )
        ) from exc
    planned = plan_program(program, options, tools)
    # saved values belong to slot names, and names depend on the versions of torch_tensorrt
    _check_same_networks(planned, manifest, path)
    module = NetworkModule(planned, options, template, tools, attachments)
    for part in manifest.parts:
        values = saving.read_values(path, part)
        module.load_part(part.structure.name, values, saving.engine_bytes(path, part))
    return module


def _check_same_networks(
    planned: PlannedProgram, manifest: saving.NetworkManifest, path: Path
) -> None:
    try:
        check_structures(planned.structures, [part.structure for part in manifest.parts])
        check_slots(planned.slots, {part.structure.name: part.slots for part in manifest.parts})
    except RefitError as exc:
        raise UnsupportedTargetError(
            f"The networks of {str(path)!r} cannot be created again here.",
            problems=exc.problems,
            hint=f"Saved with {manifest.versions}; installed are {dict(planned.versions)}.",
        ) from exc


# -- the verifier engine-bytes -------------------------------------------------------------------


class EngineBytesVerifier:
    """Compares a refitted module with engines that are built from scratch.

    TensorRT's builder is deterministic. Equal bytes mean that every name, layout, dtype and value
    is right.
    """

    @property
    def name(self) -> str:
        """``engine-bytes``."""
        return VERIFIER_NAME

    def prepare(self, request: VerifyRequest) -> Callable[[OpenedModule], VerificationResult]:
        """Build from scratch, before the refit writes anything.

        Returns:
            A function that compares the refitted module with the build.

        Raises:
            NotRefittableError: The module is of another backend, or there is no program with the
                new weights.
        """
        module = request.module
        if not isinstance(module, NetworkModule):
            raise NotRefittableError(
                "The verifier 'engine-bytes' needs a module of the backend 'tensorrt_network'.",
                hint="Use verify='outputs' with inputs, or verify='weights'.",
            )
        found = program_with(request.source, request.program, request.plan)
        if isinstance(found, str):
            raise NotRefittableError(
                f"The program with the new weights cannot be built from scratch: {found}.",
                hint="Pass a program with the new weights, or use verify='weights'.",
            )
        # now, not after the commit: calls of the module would wait for the builds
        built, torch_values = module.built_from(found(), request.tools)

        def compare(refitted: OpenedModule) -> VerificationResult:
            measures = (
                *_compare_engines(refitted, built),
                *_compare_torch_parts(refitted, torch_values),
            )
            differing = sum(not m.ok for m in measures)
            note = f"{len(built)} engines built from scratch, {differing} parts differ"
            return VerificationResult(
                verifier=VERIFIER_NAME, ok=not differing, measures=measures, note=note
            )

        return compare


def _compare_engines(module: OpenedModule, built: dict[str, bytes]) -> Iterator[OutputMeasure]:
    for name, wanted in built.items():
        found = module.engine_bytes(name) if isinstance(module, NetworkModule) else b""
        ok = found == wanted
        note = "" if ok else f"is {_digest_text(found)}, from scratch {_digest_text(wanted)}"
        yield OutputMeasure(name=name, ok=ok, note=note)


def _compare_torch_parts(
    module: OpenedModule, wanted: dict[str, dict[str, torch.Tensor]]
) -> Iterator[OutputMeasure]:
    for name, values in wanted.items():
        engine = module.engines[name]
        for slot, value in values.items():
            found = engine.read(slot).reshape(-1) if hasattr(engine, "read") else None
            ok = found is not None and same_bits(found, value)
            yield OutputMeasure(name=f"{name}/{slot}", ok=ok, note="" if ok else "bits differ")


def _digest_text(content: bytes) -> str:
    return f"{len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()[:12]}"
