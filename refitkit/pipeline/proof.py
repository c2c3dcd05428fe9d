"""Proof by trial: whether a compiled module, or a plan, is right for other weights too.

Compilers fold what they think constant, and new versions find new things to fold. A folded weight
is a slot that changes nothing, or only half of what it should. Two proofs find that out:

- ``prove`` refits a new module to weights that differ everywhere, compares its outputs with the
  program's as any refit does, and gives the module its own weights back.
- ``prove_plan`` turns the program with other weights into engines again, and compares the value of
  every slot with the value that the plan computes, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from refitkit.errors import NotRefittableError, Problem, RefitError, VerificationError
from refitkit.model import SlotState
from refitkit.pipeline.history import WeightState
from refitkit.pipeline.mapping import MappingSummary, map_slots, partition
from refitkit.pipeline.needs import strategy_needs, with_needs
from refitkit.pipeline.refit import RefitRequest, RefitTask, run
from refitkit.pipeline.stage import live_reader
from refitkit.pipeline.targets import open_weights
from refitkit.pipeline.verify import VerifyOptions, verify_live
from refitkit.program import KeptProgram, facts_of
from refitkit.program.bits import same_bits
from refitkit.program.dtypes import dtype_of
from refitkit.program.views import derived_value
from refitkit.protocols import HoldsValues, Offline, Rebuilds, SlotValue
from refitkit.recipe import TensorMap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.export import ExportedProgram

    from refitkit.model import Leaf, LedgerRow, Need, RefitReport, ReportRow, SlotKey
    from refitkit.pipeline.context import Context
    from refitkit.pipeline.module import CompiledModule
    from refitkit.protocols import OpenedModule
    from refitkit.recipe import RefitPlan

KEPT = "kept its old value"
_CLEARED = (
    "its numbers were made outside of torch, and a proof by trial with other weights found it right"
)

# The second seed is used only if weights of the first one show nothing.
_SEEDS = (0, 1)
# One more than _ENOUGH_ROUNDS, because one round may show nothing.
_PLAN_SEEDS = (0, 1, 2)
_ENOUGH_ROUNDS = 2
"""Rounds of ``prove_plan`` that must be compared. Rounds in which the model makes NaN are not."""


@dataclass(frozen=True)
class Proof:
    """The result of a proof by trial.

    Attributes:
        missing: Why there is no proof; empty if there is one.
        needs: The plugins that served the slots in the proof.
    """

    missing: str = ""
    needs: tuple[Need, ...] = ()

    def noted_in(self, plan: RefitPlan) -> RefitPlan:
        """The plan with the needs of this proof, and without marks of values that it cleared."""
        plan = with_needs(plan, self.needs)
        # a value that is made of a weight that no proof moves is not proved
        if self.missing or not all(map(_is_moved, plan.data.leaves)):
            return plan
        if not plan.data.unseen:
            return plan
        rows = (_cleared(row) if row.unseen else row for row in plan.ledger)
        return plan.noting(ledger=tuple(rows))


def _is_moved(leaf: Leaf) -> bool:
    """Whether a proof changes the values of a leaf, or need not: no state_dict has it."""
    dtype = dtype_of(leaf.dtype)
    return not (leaf.used and leaf.persistent) or (dtype.is_floating_point and dtype.itemsize > 1)


def _cleared(row: LedgerRow) -> LedgerRow:
    return row.model_copy(update={"unseen": False, "reason": _CLEARED})


# -- of a module ----------------------------------------------------------------------------------


def prove(context: Context, compiled: CompiledModule, program: ExportedProgram) -> Proof:
    """Refit a new module to other weights and back.

    Args:
        context: Plugins and settings.
        compiled: The module, with the program's weights.
        program: The program that was compiled.

    Raises:
        NotRefittableError: With other weights the outputs are wrong; lists the outputs, and the
            slots that kept their old value.
    """
    options = _verify_options(compiled, program)
    if options is None:
        return Proof("the program has no example inputs")
    try:
        # with its own weights first: if those give wrong outputs, other weights prove nothing
        with context.operating("verify", compiled.name, trial=True) as trial:
            trial.result = verify_live(context, compiled, program, None, options)
    except VerificationError as exc:
        return Proof(f"the module is not the program with its own weights either: {exc.problems}")
    # Where a variance is 0 a folded scale may be infinite, and with moved weights it is finite.
    # So giving the module its own weights back may make slots NaN again.
    lax = context.with_settings(check_finite=False)
    try:
        return _trials(lax, compiled, program, options)
    finally:
        # no verifier: the module was verified with these weights above
        _refit(lax, compiled, program, VerifyOptions(verify="none"))
        # as compiled again: version 0, no history, no spare memory
        compiled.free_spare()
        compiled.state = WeightState()


def _verify_options(compiled: CompiledModule, program: ExportedProgram) -> VerifyOptions | None:
    """Options for a proof by outputs, or without calls; None if neither is possible."""
    if isinstance(compiled.opened, Offline):
        return VerifyOptions(verify=compiled.opened.verifier)
    if program.example_inputs is None:
        return None
    args, kwargs = program.example_inputs
    return VerifyOptions(inputs=(tuple(args), dict(kwargs or {})), verify="outputs")


def _refit(
    context: Context, compiled: CompiledModule, weights: object, options: VerifyOptions
) -> RefitReport:
    """Refit all slots, with rollback, so that a failed verification keeps the module."""
    request = RefitRequest(weights=weights, inputs=options.inputs, verify=options.verify)
    with context.operating("refit", compiled.name, trial=True) as trial:
        report = run(context, [RefitTask(context, compiled, request)])[0].committed
        trial.result = report
    return report


def _trials(
    context: Context, compiled: CompiledModule, program: ExportedProgram, options: VerifyOptions
) -> Proof:
    reason = ""
    for seed in _SEEDS:
        weights = moved_weights(program, seed)
        source = open_weights(context, weights)
        if compiled.plan and compiled.plan.broken_guards(source):
            reason = "other weights change values that decided what slots hold"
            continue
        try:
            report = _refit(context, compiled, weights, options)
        except VerificationError as exc:
            if not _endless(exc):
                raise _failed(context, compiled, weights, exc) from exc
            reason = "other weights make the program itself answer NaN or infinity"
        else:
            return Proof(needs=strategy_needs(context.host, report.ledger))
    return Proof(reason)


def _failed(
    context: Context,
    compiled: CompiledModule,
    weights: Mapping[str, torch.Tensor],
    exc: VerificationError,
) -> NotRefittableError:
    """The error of a failed proof, with the slots that caused it as far as that shows."""
    slots = list(_wrong_slots(context, compiled, weights))
    unseen = compiled.plan.data.unseen if compiled.plan else []
    slots.sort(key=lambda problem: problem.subject not in unseen)  # the most likely causes first
    if any(problem.kind == KEPT for problem in slots):
        why = "some slots kept their old value"
    elif slots:
        why = "some slots did not get the value that the program gives them"
    else:
        why = "the compiler made some weights part of its code, as all slots took new values"
    return NotRefittableError(
        f"With other weights than those of its compilation the module answers wrongly: {why}.",
        problems=[*slots, *exc.problems],
        hint="Options that fold constants do this, and so do converters that make numbers of "
        "weights: install the plugin that maps those. To compile it without a proof and verify "
        "every refit: prove=False.",
    )


def _endless(exc: VerificationError) -> bool:
    """Whether all failures are NaN, so that the verdict proves nothing about the module."""
    measures = exc.report.verification.measures if exc.report else ()
    wrong = [m for m in measures if not m.ok]
    return bool(wrong) and all("NaN" in m.note for m in wrong)


def moved_weights(program: ExportedProgram, seed: int) -> dict[str, torch.Tensor]:
    """The program's weights, with every float moved by up to a quarter and none to another sign.

    So variances stay positive, and zeros and ones, which compilers like to fold, become other
    numbers. All names of one tensor get one value, and views of a weight follow it. Integers, 8-bit
    floats and elements that are not finite stay, because they may be indices and masks.

    Args:
        program: The program; it is not changed.
        seed: Seed of the random numbers.

    Returns:
        New tensors by FQN, of the same shapes, dtypes and devices.
    """
    made: dict[tuple[object, ...], torch.Tensor] = {}
    moved: dict[str, torch.Tensor] = {}
    for name, value in program.state_dict.items():
        # tied names must stay tied, or the weights would be refused
        place = value.data_ptr(), value.storage_offset(), value.dtype
        key = (*place, *value.shape, *value.stride())
        # empty tensors all have the address 0, and need not be tied
        if key not in made or not value.numel():
            made[key] = _moved(value.detach(), seed)
        moved[name] = made[key]
    leaves = {leaf.fqn: leaf for leaf in facts_of(program).leaves}
    views = [leaf for leaf in leaves.values() if leaf.view and leaf.persistent]
    for leaf in views:
        moved[leaf.fqn] = derived_value(leaf, leaves, moved.__getitem__, moved.__getitem__)
    return moved


def _moved(value: torch.Tensor, seed: int) -> torch.Tensor:
    if not value.is_floating_point() or value.dtype.itemsize == 1:
        return value.clone()
    # on the CPU, so that a seed gives the same weights on every device
    random = torch.Generator(device="cpu").manual_seed(seed * 7919 + value.numel())
    draw = torch.rand(value.shape, generator=random, dtype=torch.float32).to(value.device)
    wide = value.float()
    new = wide * (0.75 + 0.5 * draw) + torch.where(wide == 0, 0.02 + 0.02 * draw, 0.0)
    return torch.where(torch.isfinite(wide), new, wide).to(value.dtype)


_SUSPECT = "may hold a weight"
_UNREADABLE = "the engine cannot be read, so it does not show which slots kept their old value"


def _wrong_slots(
    context: Context, compiled: CompiledModule, weights: Mapping[str, torch.Tensor]
) -> Iterator[Problem]:
    """The slots with a wrong value after a refit to other weights. The module keeps those weights.

    If the backend can make the slots' values from a program, each slot is compared with that value.
    Otherwise a slot is wrong if it holds its old bits and does not follow from integers alone,
    which a proof does not change.
    """
    # the failed refit was rolled back, so these are the values from before it
    before = _live_copies(compiled)
    try:
        _refit(context, compiled, weights, VerifyOptions(verify="none"))
        right = _rebuilt(context, compiled, weights)
    except RefitError:
        return  # the error of the proof says more
    after = _live_copies(compiled)
    moved = frozenset(name for name, value in weights.items() if value.is_floating_point())
    for row in compiled.plan.ledger if compiled.plan else ():
        key = row.slot.key
        if key in before and key in after:
            wanted = right.get(key)
            yield from _judged(row, before[key], after[key], wanted, moved)
    known = {name for name, _ in before.keys() & after.keys()}
    for name, engine in compiled.engines.items():
        if engine.slots and name not in known:
            yield Problem(name, _UNREADABLE)
            for row in compiled.plan.ledger if compiled.plan else ():
                if row.unseen and row.slot.engine == name:
                    yield Problem(_name(row), _SUSPECT, str(row.state), hint=row.reason)


def _judged(
    row: LedgerRow,
    before: torch.Tensor,
    after: torch.Tensor,
    wanted: torch.Tensor | None,
    moved: frozenset[str],
) -> Iterator[Problem]:
    name, kept = _name(row), same_bits(before, after)
    if wanted is not None:
        if not same_bits(after, wanted):
            kind = KEPT if kept else "got another value than the program gives it"
            yield Problem(name, kind, str(row.state), hint=row.reason)
    elif kept and (not row.sources or not moved.isdisjoint(row.sources)):
        yield Problem(name, KEPT, str(row.state), hint=row.reason)


def _live_copies(compiled: CompiledModule) -> dict[SlotKey, torch.Tensor]:
    """Flat copies of the values of all slots that can be read or are remembered."""
    found: dict[SlotKey, torch.Tensor] = {}
    for name, engine in compiled.engines.items():
        read = live_reader(engine)
        for slot in engine.slots if read is not None else ():
            value = read(slot) if read is not None else None
            if value is not None:
                found[name, slot] = value.detach().cpu().reshape(-1).clone()
    return found


def _rebuilt(
    context: Context, compiled: CompiledModule, weights: Mapping[str, torch.Tensor]
) -> dict[SlotKey, torch.Tensor]:
    """Flat values that slots should hold, if the backend can make them from a program."""
    opened, kept, plan = compiled.opened, compiled.program, compiled.plan
    if not isinstance(opened, Rebuilds) or kept is None or plan is None:
        return {}
    tools = context.tools("compile", "prove")
    made = opened.rebuilt(kept.restore(TensorMap(weights), plan.pinned), tools)
    return {
        (engine, slot): value.detach().cpu().reshape(-1)
        for engine, slots in made.items()
        for slot, value in slots.items()
    }


# -- of a plan ------------------------------------------------------------------------------------


def prove_plan(
    context: Context,
    plan: RefitPlan,
    program: ExportedProgram,
    module: OpenedModule | None,
    options: Mapping[str, object],
) -> Proof:
    """Compare the values that a plan computes with the backend's own, for other weights.

    Args:
        context: Plugins and settings.
        plan: The plan.
        program: The program that it was made for.
        module: The module that it is for; None if it was made offline.
        options: Options of the backend, if it was made offline.

    Raises:
        NotRefittableError: The plan, or a strategy, gives other values; lists the slots, and says
            which of them keep their old value.
    """
    kept = KeptProgram.of(program)
    if kept is None:
        return Proof("torch cannot write this program without a pickle")
    tools, judged, reason = context.tools("plan", "prove"), 0, ""
    # the old values show whether a wrong slot kept its old value or got another one
    own = TensorMap(program.state_dict)
    needs: tuple[Need, ...] = ()
    for seed in _PLAN_SEEDS:
        weights = moved_weights(program, seed)
        other = kept.restore(TensorMap(weights), plan.pinned)
        _, parts = partition(context, other, module, plan.backend, options, tools)
        # the first part has the values of all engines; see ``HoldsValues``
        held = next(iter(parts.values()))
        if not isinstance(held, HoldsValues):
            return Proof(f"the backend {plan.backend!r} gives no values without an engine")
        wanted = held.values()
        reason = _unjudged(plan, weights, wanted)
        if not reason:
            values = _plan_values(context, plan, module, kept, TensorMap(weights))
            _compare(plan, values, wanted, own)
            needs = strategy_needs(context.host, _report_rows(plan, values))
            judged += 1
        if judged == _ENOUGH_ROUNDS:
            return Proof(needs=needs)
    return Proof(reason)


def _plan_values(
    context: Context,
    plan: RefitPlan,
    module: OpenedModule | None,
    kept: KeptProgram,
    source: TensorMap,
) -> dict[SlotKey, SlotValue | str]:
    """Values of all slots that a refit would write; without a module, those of the plan."""
    rows = [row for row in plan.ledger if row.state is not SlotState.UNMAPPED and row.value]
    if module is None:
        return plan.values_of(rows, source)
    mapping = map_slots(context, plan, module, source, kept)
    found: dict[SlotKey, SlotValue | str] = dict(mapping.values)
    for row in mapping.rows_without_value():
        if row.state is not SlotState.UNMAPPED:
            found[row.slot.key] = "; ".join(mapping.reasons.get(row.slot.key, [row.reason]))
    return found


def _report_rows(
    plan: RefitPlan, values: Mapping[SlotKey, SlotValue | str]
) -> tuple[ReportRow, ...]:
    slots = {k: (v.strategy, v.sources) for k, v in values.items() if isinstance(v, SlotValue)}
    return MappingSummary(plan.ledger, slots, {}, frozenset()).rows


def _unjudged(
    plan: RefitPlan,
    weights: Mapping[str, torch.Tensor],
    wanted: Mapping[str, Mapping[str, torch.Tensor]],
) -> str:
    """Why a round proves nothing about the plan; empty if the round can be compared."""
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
        name, value = _name(row), values[row.slot.key]
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
            yield Problem(name, kind, text, "the value that the backend gives", row.reason)


def _name(row: LedgerRow) -> str:
    return "/".join(row.slot.key)


def _is_old(plan: RefitPlan, row: LedgerRow, found: torch.Tensor, own: TensorMap) -> bool:
    """Whether a value is the slot's value with the program's own weights."""
    before = plan.value_of(row, own) if row.value else ""
    return isinstance(before, SlotValue) and same_bits(_flat(before.load()), found)


def _flat(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().reshape(-1)
