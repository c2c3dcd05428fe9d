"""What a saved module holds beside its engines: its plan, its program, what is overridden of them.

From these, or from another handle, a handle is made on what a backend has opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from refitkit.files.archive import saying_why
from refitkit.pipeline.clock import StageClock
from refitkit.pipeline.compiled import CompiledModule
from refitkit.pipeline.held import WeightState
from refitkit.pipeline.overrides import overridden_as, overridden_in
from refitkit.program import KeptProgram
from refitkit.recipe import RefitPlan

if TYPE_CHECKING:
    from refitkit.host import Host
    from refitkit.pipeline.compiled import Verbs
    from refitkit.protocols import OpenedModule
    from refitkit.recipe.plan import Opener

PLAN_MEMBER = "plan.refitplan"
PROGRAM_MEMBER = "program.json"
OVERRIDDEN_MEMBER = "overridden.json"


def save_module(host: Host, compiled: CompiledModule, path: str | Path) -> None:
    """Write a module with its plan and program; see ``Pipeline.save``."""
    attachments = _attachments_of(compiled)
    path = Path(path)
    with StageClock(host, "save").stage("save"), saying_why(path):
        compiled.opened.save(path, attachments)


def _attachments_of(compiled: CompiledModule) -> dict[str, bytes]:
    attachments: dict[str, bytes] = {}
    if compiled.plan is not None:
        attachments[PLAN_MEMBER] = compiled.plan.to_bytes()
    if compiled.program is not None:
        attachments[PROGRAM_MEMBER] = compiled.program.to_bytes()
    if compiled.held.overridden:
        attachments[OVERRIDDEN_MEMBER] = overridden_as(compiled.held.overridden)
    return attachments


def handle_on(opened: OpenedModule, opener: Opener, verbs: Verbs) -> CompiledModule:
    """A handle on an opened module, with what was saved with it.

    Args:
        opened: The module.
        opener: What turns weights into sources, for its plan.
        verbs: The pipeline.

    Raises:
        PlanMismatchError: The plan is damaged, or what is overridden of it.
    """
    attached = opened.attachments
    if PLAN_MEMBER not in attached:
        return CompiledModule(opened, None, None, verbs)
    plan = RefitPlan.from_bytes(attached[PLAN_MEMBER], "the plan of this module", opener)
    data = plan.data
    kept = KeptProgram(attached[PROGRAM_MEMBER], data.leaves, data.ties) if PROGRAM_MEMBER in attached else None
    compiled = CompiledModule(opened, plan, kept, verbs)
    compiled.held = WeightState.first(overridden_in(attached.get(OVERRIDDEN_MEMBER, b"[]")))
    return compiled


def copy_of(compiled: CompiledModule, verbs: Verbs) -> CompiledModule:
    """A handle on a second module with the same weights, plan and program."""
    gate = compiled.gate
    opened = gate.refit(lambda: gate.call(compiled.opened.reopen))
    copy = CompiledModule(opened, compiled.plan, compiled.program, verbs)
    copy.held = WeightState.first(compiled.held.overridden)
    return copy
