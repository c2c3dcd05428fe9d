"""Making a plan: facts of the program, and what the backend knows of its slots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.errors import NotRefittableError
from refitkit.model import Fingerprint, PlanData, fingerprint_of_slots
from refitkit.pipeline.mapping import map_slots
from refitkit.pipeline.needs import of_layer_types
from refitkit.pipeline.partition import partition
from refitkit.pipeline.reach import require_planned, stated
from refitkit.pipeline.tools import tools_for
from refitkit.program import facts_of
from refitkit.program.facts import tensors_of
from refitkit.program.views import lost_views
from refitkit.recipe import RefitPlan, TensorMap
from refitkit.recipe.store import index_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch.export import ExportedProgram

    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.program import ProgramFacts
    from refitkit.protocols import Backend, OpenedModule, SlotValue
    from refitkit.recipe.plan import Opener


def require_followable(program: ExportedProgram) -> ProgramFacts:
    """Facts of a program, if recipes can follow all memory that its leaves share.

    Raises:
        NotRefittableError: Some cannot be followed; lists them with the leaves that they share
            memory with.
    """
    facts = facts_of(program)
    if facts.conflicts:
        raise NotRefittableError(
            "Tensors of the program share memory with its weights, and no recipe can follow them. "
            "A refit would leave them stale.",
            problems=facts.conflicts,
            hint="Give such a tensor memory of its own (.clone()) if it shall not follow, or "
            "compute it from the weight in forward().",
        )
    lost = tuple(lost_views(program, facts.leaves, facts.ties, tensors_of(program)))
    if lost:
        raise NotRefittableError(
            "The program was read from a file, and some of its constants have the bits of weights. "
            "The file does not say whether the model has views of the weights there, which follow "
            "new weights, or copies, which do not.",
            problems=lost,
            hint="Compile or plan in the process that exports the model: there refitkit sees which "
            "tensors share memory.",
        )
    return facts


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
        NotRefittableError: Weights of the program are not weights of the engines, or tensors of
            the program share memory in a way that no recipe can follow; names them.
    """
    facts = require_followable(program)
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
        needs=of_layer_types(host, draft.layer_types),
    )
    data = data.model_copy(update={"unreached": stated(data)})
    plan = RefitPlan(data, draft.pinned, opener)
    if module is None:
        require_planned(host, data, None)
    else:
        slots = [slot for engine in module.engines.values() for slot in engine.slots.values()]
        plan.check_engines(backend.name, slots)

        def served() -> Iterable[SlotValue]:
            own = TensorMap(program.state_dict)
            return map_slots(host, plan, module, own, None, config).values.values()

        require_planned(host, data, served)
    return plan
