"""Making a plan: facts of the program, and what the backend knows of its slots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.model import Fingerprint, PlanData, fingerprint_of_slots
from refitkit.pipeline.partition import partition
from refitkit.pipeline.tools import tools_for
from refitkit.program import facts_of
from refitkit.recipe import RefitPlan
from refitkit.recipe.store import index_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram

    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.protocols import Backend, OpenedModule
    from refitkit.recipe.plan import Opener


def make_plan(
    host: Host,
    program: ExportedProgram,
    module: OpenedModule | None,
    backend: Backend,
    options: Mapping[str, Any],
    config: Config,
    opener: Opener,
) -> RefitPlan:
    """A plan for a program and, where there is one, the module that was compiled from it.

    Raises:
        PlanMismatchError: The program is not the one that was compiled.
        NotRefittableError: Weights of the program are not weights of the engines.
    """
    facts = facts_of(program)
    tools = tools_for(host, config, "plan", "plan")
    parts = partition(host, program, module, backend.name, options, config, tools)
    draft = backend.draft(parts, module, tools)
    data = PlanData(
        backend=backend.name,
        leaves=facts.leaves,
        ties=facts.ties,
        ledger=draft.rows,
        calls=draft.calls,
        guards=draft.guards,
        pinned=index_of(draft.pinned),
        fingerprint=Fingerprint(
            graph=facts.graph,
            slots=fingerprint_of_slots(row.slot for row in draft.rows),
            settings=dict(draft.settings),
            versions=dict(draft.versions),
            platform=draft.platform,
        ),
    )
    plan = RefitPlan(data, draft.pinned, opener)
    if module is not None:
        slots = [slot for engine in module.engines.values() for slot in engine.slots.values()]
        plan.check_engines(backend.name, slots)
    return plan
