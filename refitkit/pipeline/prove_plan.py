"""Proof by trial that a plan is right: with other weights, recipes give what an interpreter gives.

What was recorded is one run. A program with other weights is turned into engines again, and the
values that this gives for every slot are compared with what the plan computes from those weights,
bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import NotRefittableError, Problem
from refitkit.model import SlotState
from refitkit.pipeline.blamed_slots import KEPT
from refitkit.pipeline.mapping import MappingSummary, map_slots
from refitkit.pipeline.needs import of_strategies
from refitkit.pipeline.partition import partition
from refitkit.pipeline.prove import Proof, moved_weights
from refitkit.pipeline.tools import tools_for
from refitkit.program import KeptProgram
from refitkit.program.bits import same_bits
from refitkit.protocols import HoldsValues, SlotValue
from refitkit.recipe import TensorMap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch.export import ExportedProgram

    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.model import LedgerRow, Need, ReportRow, SlotKey
    from refitkit.protocols import OpenedModule
    from refitkit.recipe import RefitPlan

_PLAN_SEEDS = (0, 1, 2)
_ENOUGH_ROUNDS = 2
"""Rounds that have to be judged; those in which the model itself makes NaN are not."""


def prove_plan(
    host: Host,
    config: Config,
    plan: RefitPlan,
    program: ExportedProgram,
    module: OpenedModule | None,
    options: Mapping[str, object],
) -> Proof:
    """Compare what a plan computes with what an interpreter gives, for other weights.

    Args:
        host: All plugins.
        config: Settings.
        plan: The plan.
        program: What it was made for.
        module: The module that it is for; None where it was made offline.
        options: The backend's options, where it was made offline.

    Raises:
        NotRefittableError: The plan, or a strategy, gives other values; lists the slots, and says
            which keep their old value.
    """
    kept = KeptProgram.of(program)
    if kept is None:
        return Proof("torch cannot write this program without a pickle")
    tools, judged, reason = tools_for(host, config, "plan", "prove"), 0, ""
    own = TensorMap(program.state_dict)
    needs: tuple[Need, ...] = ()
    for seed in _PLAN_SEEDS:
        weights = moved_weights(program, seed)
        other = kept.restore(TensorMap(weights), plan.pinned)
        parts = partition(host, other, module, plan.backend, options, config, tools)
        held = next(iter(parts.values()))
        if not isinstance(held, HoldsValues):
            return Proof(f"the backend {plan.backend!r} gives no values without an engine")
        wanted = held.values()
        reason = _unjudged(plan, weights, wanted)
        if not reason:
            values = _values(host, config, plan, module, kept, TensorMap(weights))
            _compare(plan, values, wanted, own)
            needs = of_strategies(host, _report(plan, values))
            judged += 1
        if judged == _ENOUGH_ROUNDS:
            return Proof(needs=needs)
    return Proof(reason)


def _values(
    host: Host,
    config: Config,
    plan: RefitPlan,
    module: OpenedModule | None,
    kept: KeptProgram,
    source: TensorMap,
) -> dict[SlotKey, SlotValue | str]:
    """Values of all slots that a refit would give one; without a module, what the plan gives."""
    rows = [row for row in plan.ledger if row.state is not SlotState.UNMAPPED and row.value]
    if module is None:
        return plan.values_of(rows, source)
    mapping = map_slots(host, plan, module, source, kept, config)
    found: dict[SlotKey, SlotValue | str] = dict(mapping.values)
    for row in mapping.unserved():
        if row.state is not SlotState.UNMAPPED:
            found[row.slot.key] = "; ".join(mapping.reasons.get(row.slot.key, [row.reason]))
    return found


def _report(plan: RefitPlan, values: Mapping[SlotKey, SlotValue | str]) -> tuple[ReportRow, ...]:
    slots = {k: (v.strategy, v.sources) for k, v in values.items() if isinstance(v, SlotValue)}
    return MappingSummary(plan.ledger, slots, {}, frozenset()).rows()


def _unjudged(
    plan: RefitPlan,
    weights: Mapping[str, torch.Tensor],
    wanted: Mapping[str, Mapping[str, torch.Tensor]],
) -> str:
    """Why a round says nothing of the plan; empty where it does."""
    broken = plan.broken_guards(TensorMap(weights))
    if broken:
        return f"other weights change what the engines are: {broken[0].wanted}"
    tensors = (value for slots in wanted.values() for value in slots.values())
    if any(value.is_floating_point() and bool(value.isnan().any()) for value in tensors):
        return "other weights make weights of the engines NaN"
    return ""


def _compare(
    plan: RefitPlan,
    values: Mapping[SlotKey, SlotValue | str],
    wanted: Mapping[str, Mapping[str, torch.Tensor]],
    own: TensorMap,
) -> None:
    problems = list(_differences(plan, values, wanted, own))
    if problems:
        raise NotRefittableError(
            "The plan is wrong: with other weights, slots would get other values than the backend "
            "gives them.",
            problems=problems,
            hint="Please report this, with the model. The strategy 'rebuild' serves such a module: "
            "Config(strategies=('rebuild',)).",
        )


def _differences(
    plan: RefitPlan,
    values: Mapping[SlotKey, SlotValue | str],
    wanted: Mapping[str, Mapping[str, torch.Tensor]],
    own: TensorMap,
) -> Iterator[Problem]:
    for row in plan.ledger:
        if row.slot.key not in values:
            continue
        name, value = f"{row.slot.engine}/{row.slot.name}", values[row.slot.key]
        if isinstance(value, str):
            yield Problem(name, "no value", hint=value)
            continue
        right = wanted.get(row.slot.engine, {}).get(row.slot.name)
        if right is None:
            yield Problem(name, "no such weight with other weights")
            continue
        found = _flat(value.load())
        if not same_bits(found, _flat(right)):
            kind = KEPT if _is_old(plan, row, found, own) else "differs"
            text = str(row.state) if kind == KEPT else ""
            yield Problem(name, kind, text, "the value that the backend gives")


def _is_old(plan: RefitPlan, row: LedgerRow, found: torch.Tensor, own: TensorMap) -> bool:
    """Whether a value is what the slot has with the program's own weights."""
    before = plan.value_of(row, own) if row.value else ""
    return isinstance(before, SlotValue) and same_bits(_flat(before.load()), found)


def _flat(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().reshape(-1)
