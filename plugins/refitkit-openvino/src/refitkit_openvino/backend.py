"""The backend object: it compiles programs, and says how their weights become slots."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch
from refitkit import CompileError, PlanMismatchError, UnsupportedTargetError
from refitkit.errors import raised_as
from refitkit.model import LedgerRow, PinnedRef, SlotState, SourceRef
from refitkit.program import facts_of
from refitkit.protocols import PlanDraft
from refitkit.recipe import Draft

from refitkit_openvino import NAME, files
from refitkit_openvino.compiling import convert
from refitkit_openvino.engine import ENGINE, misfits
from refitkit_openvino.graph import Options
from refitkit_openvino.module import OpenVINOModule

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from refitkit.model import Leaf, Slot
    from refitkit.protocols import OpenedModule, Tools
    from torch.export import ExportedProgram


class OpenVINOBackend:
    """Compiles programs with OpenVINO, for the CPU; see ``refitkit.protocols.Backend``."""

    name = NAME

    def compile(
        self,
        program: ExportedProgram,
        options: Mapping[str, Any],
        tools: Tools,  # noqa: ARG002 - the protocol's
    ) -> OpenVINOModule:
        """Return the compiled program, with copies of its weights.

        Raises:
            ConfigError: An option does not exist, or has a wrong value.
            CompileError: OpenVINO cannot convert or compile the program.
            NotRefittableError: A weight of the program is not an input of the model.
            ToolchainError: OpenVINO is not installed.
        """
        graph = convert(program, Options.of(options))
        tensors = _tensors_of(program)
        weights = {slot.name: _copy(tensors[slot.name]) for slot in graph.manifest.slots}
        problems = [p for slot in graph.manifest.slots for p in misfits(slot, weights[slot.name])]
        if problems:
            message = "OpenVINO cannot hold weights of the program."
            raise CompileError(message, problems=problems)
        with raised_as(CompileError, "OpenVINO cannot compile the program"):
            return OpenVINOModule.compiled(graph, weights, {})

    def draft(
        self,
        parts: Mapping[str, Any],
        module: OpenedModule | None,
        tools: Tools,  # noqa: ARG002 - the protocol's
    ) -> PlanDraft:
        """Return how each slot follows from the program: it is the weight of its name.

        Raises:
            UnsupportedTargetError: There is no module.
            PlanMismatchError: The module was compiled from another program.
        """
        if not isinstance(module, OpenVINOModule):
            raise UnsupportedTargetError(
                "The backend 'openvino' cannot plan without a module.",
                hint="refitkit.compile plans; or pass target= to refitkit.plan.",
            )
        program, manifest = parts[ENGINE], module.graph.manifest
        facts = facts_of(program)
        if facts.graph != manifest.fingerprint:
            raise PlanMismatchError(
                "The module was compiled from another program.",
                hint="Pass the program that was compiled, with any weights.",
            )
        leaves = {leaf.fqn: leaf for leaf in facts.leaves}
        draft, tensors = Draft(leaves, facts.ties), _tensors_of(program)
        rows = tuple(_row(slot, draft, leaves) for slot in manifest.slots)
        kept = {row.slot.name for row in rows if row.state is SlotState.PINNED}
        kept |= {leaf.fqn for leaf in facts.leaves if leaf.kept}
        return PlanDraft(
            rows=rows,
            calls=tuple(draft.calls),
            pinned={name: _copy(tensors[name]) for name in sorted(kept)},
            settings={name: str(value) for name, value in manifest.options},
            versions=manifest.versions,
            platform=f"{platform.system()} {platform.machine()} cpu",
        )

    def describe(self, path: Path) -> Mapping[str, Any] | None:
        """Return the description of a saved module; None if it is not this backend's."""
        return files.describe(path)

    def attachments(self, path: Path) -> Mapping[str, bytes]:
        """Return the attachments of a saved module; none if it is not this backend's."""
        return files.attachments_of(path)


def _row(slot: Slot, draft: Draft, leaves: Mapping[str, Leaf]) -> LedgerRow:
    """Return the row of a slot. Its calls, if it is a view of other weights, go into the draft."""
    value = draft.leaf(slot.name)
    sources = draft.sources(value)
    if not isinstance(value, SourceRef) or leaves[value.fqn].persistent:
        return LedgerRow(slot=slot, state=SlotState.RECIPE, value=value, sources=sources)
    return LedgerRow(
        slot=slot,
        state=SlotState.PINNED,
        value=PinnedRef(name=slot.name),
        sources=sources,
        reason="no state_dict contains it",
    )


def _tensors_of(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Return all weights of a program by FQN."""
    constants = {k: v for k, v in program.constants.items() if isinstance(v, torch.Tensor)}
    return {**program.state_dict, **constants}


def _copy(value: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy, because the program belongs to the user."""
    return torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
