"""Proof by trial that a plan is right: with other weights, recipes give what an interpreter gives.

What was recorded is one run. A program with other weights is turned into engines again, and the
values that this gives for every slot are compared with what the plan computes from those weights,
bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import NotRefittableError, Problem
from refitkit.model import SlotState
from refitkit.pipeline.partition import partition
from refitkit.pipeline.prove import moved_weights
from refitkit.pipeline.tools import tools_for
from refitkit.program import KeptProgram
from refitkit.program.bits import same_bits
from refitkit.protocols import HoldsValues
from refitkit.recipe import TensorMap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch.export import ExportedProgram

    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.protocols import OpenedModule
    from refitkit.recipe import RefitPlan

_SEEDS = (0, 1, 2)
_ENOUGH = 2
"""Rounds that have to be judged; those in which the model itself makes NaN are not."""


def prove_plan(
    host: Host,
    config: Config,
    plan: RefitPlan,
    program: ExportedProgram,
    module: OpenedModule | None,
    options: Mapping[str, object],
) -> str:
    """Compare what a plan computes with what an interpreter gives, for other weights.

    Args:
        host: All plugins.
        config: Settings.
        plan: The plan.
        program: What it was made for.
        module: The module that it is for; None where it was made offline.
        options: The backend's options, where it was made offline.

    Returns:
        Why there is no proof; empty where there is one.

    Raises:
        NotRefittableError: The plan gives other values; lists the slots.
    """
    kept = KeptProgram.of(program)
    if kept is None:
        return "torch cannot write this program without a pickle"
    tools, judged, reason = tools_for(host, config, "plan", "prove"), 0, ""
    for seed in _SEEDS:
        weights = moved_weights(program, seed)
        other = kept.restore(TensorMap(weights), plan.pinned)
        parts = partition(host, other, module, plan.backend, options, config, tools)
        held = next(iter(parts.values()))
        if not isinstance(held, HoldsValues):
            return f"the backend {plan.backend!r} gives no values without an engine"
        wanted = held.values()
        reason = _unjudged(plan, weights, wanted)
        if not reason:
            _compare(plan, weights, wanted)
            judged += 1
        if judged == _ENOUGH:
            return ""
    return reason


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
    weights: Mapping[str, torch.Tensor],
    wanted: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    problems = list(_differences(plan, weights, wanted))
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
    weights: Mapping[str, torch.Tensor],
    wanted: Mapping[str, Mapping[str, torch.Tensor]],
) -> Iterator[Problem]:
    rows = [row for row in plan.ledger if row.state is not SlotState.UNMAPPED and row.value]
    values = plan.values_of(rows, TensorMap(weights))
    for row in rows:
        name, value = f"{row.slot.engine}/{row.slot.name}", values[row.slot.key]
        if isinstance(value, str):
            yield Problem(name, "no value", hint=value)
            continue
        right = wanted.get(row.slot.engine, {}).get(row.slot.name)
        if right is None:
            yield Problem(name, "no such weight with other weights")
        elif not same_bits(value.load().contiguous().reshape(-1), right.reshape(-1).contiguous()):
            yield Problem(name, "differs", wanted="the value that the backend gives")
