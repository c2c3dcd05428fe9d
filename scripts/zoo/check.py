"""Checking one model: its plan against the reference's rebuild, and its engines' bytes.

The oracle is the reference itself: a program is freshly exported with the new weights and goes
through lowering, partitioning and the interpreter. Values are compared as raw bytes.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import refitkit
from refitkit.builtin.torch_tensorrt import LAYER_TYPES
from refitkit.builtin.torch_tensorrt.network.planning import PlannedProgram, plan_program
from refitkit.errors import CompileError, RefitError
from refitkit.model import SlotState
from refitkit.protocols import Tools
from scripts.zoo.result import FIRST_SEED, Result, raw, timed, told
from scripts.zoo.runner import NOT_BUILT

if TYPE_CHECKING:
    from refitkit.recipe import RefitPlan
    from scripts.zoo.entry import Entry

BACKEND = "tensorrt_network"
TOOLS = Tools(layer_types={one.name: one for one in LAYER_TYPES})
SHOWN = 12
BUILDS = 12
"""So often is a network built from scratch: the builder of TensorRT-RTX 1.6.1 puts several outputs
of one network in this order or that, by chance."""
Values = dict[tuple[str, str], torch.Tensor]


@dataclass(frozen=True)
class Round:
    """A set of weights.

    Attributes:
        name: Of the round.
        attempts: Seeds, and whether they make outliers; the first that makes no NaN counts.
    """

    name: str
    attempts: tuple[tuple[int, bool], ...]


ROUNDS = (
    Round("B", ((1, False), (5, False))),
    Round("C", ((2, True), (3, True), (4, False))),
)


@dataclass(frozen=True)
class Rebuilt:
    """The reference's values of one round, and the networks that they are in."""

    planned: PlannedProgram
    weights: dict[str, torch.Tensor]
    values: Values
    outliers: bool


def check(entry: Entry, dtype: str, *, engines: bool) -> Result:
    """Everything that is checked of one model in one dtype; in half precision, in one round."""
    result = Result(entry.name, dtype)
    rounds = ROUNDS if dtype == "float32" else ROUNDS[-1:]
    try:
        model = entry.model(dtype, FIRST_SEED)
    except Exception as exc:  # noqa: BLE001 - whatever it is, the table says so
        return result.fail(f"cannot be made: {told(exc)}", "upstream")
    try:
        with timed(result, "export"):
            program = entry.program(model, dtype)
    except Exception as exc:  # noqa: BLE001
        return result.fail(f"torch.export: {told(exc)}", "upstream")
    try:
        rebuilt = {one.name: _rebuilt(entry, dtype, one, result) for one in rounds}
    except RefitError as exc:
        return result.fail(told(exc), "upstream")
    with timed(result, "plan"):
        plan = refitkit.plan(program, backend=BACKEND, options=entry.settings, prove=False)
    _count(result, plan)
    for name, wanted in rebuilt.items():
        _compare(result, name, plan, wanted)
    _check_frozen(result, plan, [one.values for one in rebuilt.values()])
    if engines and result.status == "ok":
        with timed(result, "engines"):
            _check_bytes(result, entry, program, plan, next(iter(rebuilt.values())))
    for one in rebuilt.values():
        one.planned.session.close()
    return result


def _rebuilt(entry: Entry, dtype: str, one: Round, result: Result) -> Rebuilt:
    for seed, outliers in one.attempts:
        model = entry.model(dtype, seed, outliers=outliers)
        with timed(result, f"reference {one.name}"):
            planned = plan_program(entry.program(model, dtype), entry.settings, TOOLS)
            values = {
                (engine, slot): value
                for engine, slots in planned.values().items()
                for slot, value in slots.items()
            }
        if not any(value.is_floating_point() and value.isnan().any() for value in values.values()):
            break
        planned.session.close()
    structures = planned.structures
    result.slots = len(values)
    result.engines = sum(one.accelerated for one in structures)
    result.torch_parts = len(structures) - result.engines
    return Rebuilt(planned, dict(model.state_dict()), values, outliers)


def _count(result: Result, plan: RefitPlan) -> None:
    rows = plan.ledger
    result.states = dict(Counter(str(row.state) for row in rows))
    result.ops, result.guards = len(plan.data.calls), len(plan.data.guards)
    lost = [row for row in rows if row.state is SlotState.UNMAPPED]
    result.unmapped = [[row.slot.engine, row.slot.name, row.reason] for row in lost[:SHOWN]]
    if lost:
        result.fail(f"{len(lost)} slots are unmapped")


def _compare(result: Result, name: str, plan: RefitPlan, wanted: Rebuilt) -> None:
    """Slot values by the plan against the rebuild's; the source must stay what it is."""
    found: dict[str, Any] = {"outliers": wanted.outliers, "differ": 0, "slots": []}
    result.rounds[name] = found
    before = {fqn: value.clone() for fqn, value in wanted.weights.items()}
    try:
        with timed(result, f"materialize {name}"):
            given = plan.materialize(wanted.weights)
    except RefitError as exc:
        found["error"] = told(exc)
        result.fail(f"round {name}: {found['error']}")
        return
    values = {(e, s): value for e, slots in given.items() for s, value in slots.items()}
    frozen = {row.slot.key for row in plan.ledger if row.state is SlotState.FROZEN}
    differences = [
        ["/".join(key), why]
        for key in sorted(values.keys() | wanted.values.keys())
        if (why := _difference(values.get(key), wanted.values.get(key), frozen=key in frozen))
    ]
    found["differ"], found["slots"] = len(differences), differences[:SHOWN]
    if differences:
        result.fail(f"round {name}: {len(differences)} slots differ from the rebuild")
    if changed := [fqn for fqn, value in before.items() if raw(value) != raw(wanted.weights[fqn])]:
        result.fail(f"round {name}: the source was changed: {changed[:SHOWN]}")


def _difference(value: torch.Tensor | None, wanted: torch.Tensor | None, *, frozen: bool) -> str:
    if wanted is None:
        return "no such slot in the rebuild"
    if value is None:
        return "" if frozen else "no value"
    if value.dtype != wanted.dtype or value.numel() != wanted.numel():
        return f"{value.dtype} x {value.numel()}, not {wanted.dtype} x {wanted.numel()}"
    if raw(value) == raw(wanted):
        return ""
    a, b = value.reshape(-1).double(), wanted.reshape(-1).double()
    return f"{int((a != b).sum())} of {a.numel()} elements, by {float((a - b).abs().max()):.3g}"


def _check_frozen(result: Result, plan: RefitPlan, values: list[Values]) -> None:
    """What the plan calls a literal is the same for all weights."""
    frozen = [row.slot.key for row in plan.ledger if row.state is SlotState.FROZEN]
    moved = [k for k in frozen if len({raw(one[k]) if k in one else b"" for one in values}) > 1]
    if moved:
        result.fail(f"frozen, but not the same with other weights: {moved[:SHOWN]}")


def _check_bytes(
    result: Result,
    entry: Entry,
    program: torch.export.ExportedProgram,
    plan: RefitPlan,
    wanted: Rebuilt,
) -> None:
    """Engine bytes of a refitted module against those of the networks made from scratch."""
    planned = wanted.planned
    names = [one.name for one in planned.structures if one.accelerated]
    try:
        compiled = refitkit.compile(program, BACKEND, entry.settings, prove=False)
        scratch = {name: planned.build(name) for name in names}
    except CompileError:
        result.bytes = NOT_BUILT
        return
    opened: Any = compiled.opened
    before = {name: opened.engine_bytes(name) for name in names}
    report = refitkit.refit(compiled, wanted.weights, plan=plan, verify="none").report
    after = {name: opened.engine_bytes(name) for name in names}
    served = {row.strategy for row in report.ledger if row.state is not SlotState.FROZEN}
    builds = {name: [scratch[name]] for name in names}
    for name in names:
        while after[name] not in builds[name] and len(builds[name]) < BUILDS:
            moved = len(builds[name]) % 2 == 1
            builds[name].append(_built_elsewhere(planned, name) if moved else planned.build(name))
    result.bytes = _judged(after, builds)
    if result.bytes == "differ":
        result.fail(f"engine bytes differ: {[n for n in names if after[n] not in builds[n]]}")
    if served - {"recipe"}:
        result.fail(f"slots were served by {served}")
    if after == before:
        result.fail("the refit changed no engine")


def _built_elsewhere(planned: PlannedProgram, name: str) -> bytes:
    """The same network with the same values at other addresses."""
    with tempfile.TemporaryDirectory() as folder:
        values, engine = Path(folder) / "values", Path(folder) / "engine"
        planned.session.call("copy", engine=name, path=str(values))
        planned.session.call("build", engine=name, path=str(engine), weights=str(values))
        return engine.read_bytes()


def _judged(after: dict[str, bytes], builds: dict[str, list[bytes]]) -> str:
    """What comparing refitted engines with builds from scratch of the same networks says."""
    other = [name for name, content in after.items() if content not in builds[name]]
    if not other:
        tries = max(map(len, builds.values()), default=1)
        return "equal" if tries == 1 else f"equal to build {tries}"
    ways = min(len(set(builds[name])) for name in other)
    if ways == 1:
        return "differ"
    return f"undecided: {BUILDS} builds of one network gave {ways} engines"
