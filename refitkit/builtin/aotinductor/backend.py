"""The backend object: what ``refitkit.protocols.Backend`` asks for."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

from refitkit.builtin.aotinductor import compiling, opening
from refitkit.builtin.aotinductor.engine import ENGINE
from refitkit.builtin.aotinductor.ledger import Ledger
from refitkit.builtin.aotinductor.module import AOTInductorModule
from refitkit.builtin.aotinductor.names import NAME
from refitkit.errors import UnsupportedTargetError
from refitkit.protocols import PlanDraft

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch.export import ExportedProgram

    from refitkit.protocols import OpenedModule, Tools


class AOTInductorBackend:
    """``aotinductor``: runs wherever torch runs."""

    @property
    def name(self) -> str:
        """Its name."""
        return NAME

    def compile(
        self,
        program: ExportedProgram,
        options: Mapping[str, Any],
        tools: Tools,  # noqa: ARG002 - the protocol's
    ) -> AOTInductorModule:
        """Compile a program; ``options`` are those of ``torch._inductor.config``."""
        return compiling.compile_program(program, options)

    def draft(
        self,
        parts: Mapping[str, Any],
        module: OpenedModule | None,
        tools: Tools,  # noqa: ARG002 - the protocol's
    ) -> PlanDraft:
        """Weights as they are, views of weights, and pinned values for what no state_dict holds."""
        if not isinstance(module, AOTInductorModule):
            raise UnsupportedTargetError(
                "AOTInductor names its weights while it compiles: no plan without an engine.",
                hint="refitkit.compile makes the plan in the same pass; for an engine that exists, "
                "pass it: refitkit.plan(program, target=...).",
            )
        ours = module.files.call is not None
        ledger = Ledger(parts[ENGINE], module.engines[ENGINE], ours=ours)
        if not ours:
            module.learn(parts[ENGINE])
        return PlanDraft(
            rows=ledger.rows,
            calls=ledger.calls,
            pinned=ledger.pinned,
            settings=dict(module.files.settings),
            versions=dict(module.files.versions),
            platform=f"{platform.system()} {platform.machine()} {module.files.device}",
        )

    def describe(self, path: Path) -> Mapping[str, Any] | None:
        """What a saved file holds, without loading its library."""
        return opening.describe_file(path)

    def attachments(self, path: Path) -> Mapping[str, bytes]:
        """What a saved file keeps beside its engine, without loading its library."""
        return opening.attachments_of(path)
