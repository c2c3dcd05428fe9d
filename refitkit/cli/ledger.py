"""How a plan is printed: what it belongs to, and its ledger."""

from __future__ import annotations

from collections import Counter
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from refitkit.cli.tables import count, facts, shape, table
from refitkit.errors import ConfigError, Problem
from refitkit.model import CallRef, Number, PinnedRef, SourceRef, TorchName
from refitkit.recipe.ops import calls_below, is_reference, operands_of
from refitkit.recipe.store import Facts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from refitkit.model import Argument, LedgerRow, Need, OpCall, PlanData
    from refitkit.recipe import RefitPlan


_COLUMNS = ("slot", "state", "dtype", "shape", "from", "ops", "reason")


def print_plan(console: Console, plan: RefitPlan) -> None:
    """Print a plan, one row for every slot."""
    fingerprint = plan.data.fingerprint
    versions = ", ".join(f"{name} {version}" for name, version in fingerprint.versions.items())
    states = Counter(str(row.state) for row in plan.ledger)
    calls = len(plan.data.calls)
    console.print(
        facts(
            [
                ("backend", plan.backend),
                ("made with", f"{versions} on {fingerprint.platform}"),
                ("graph", fingerprint.graph),
                ("slots", ", ".join(f"{number} {state}" for state, number in states.items())),
                *([("ops", f"{calls}, shared by all slots")] if calls else []),
                *(("one tensor", " = ".join(tie)) for tie in plan.data.ties),
                *(("needs", _need(need)) for need in plan.data.needs),
                *(("without slot", f"{n}: {why}") for n, why in plan.data.unreached.items()),
            ]
        )
    )
    engines = dict.fromkeys(row.slot.engine for row in plan.ledger)
    for engine in engines:
        rows = [_cells(row, plan.data) for row in plan.ledger if row.slot.engine == engine]
        title = f"engine {engine}, {count(len(rows), 'slot')}"
        console.print(table(_COLUMNS, rows, title))
    print_guards(console, plan.data)


def _need(need: Need) -> str:
    from refitkit.pipeline.needs import describe_need

    return f"{need.kind} {need.name} of {describe_need(need)}"


def _cells(row: LedgerRow, data: PlanData) -> tuple[str, ...]:
    sources = _sources(row, data)
    same = sources == row.slot.name
    return (
        row.slot.name,
        str(row.state),
        row.slot.dtype,
        shape(row.slot.shape),
        "its own name" if same else sources,
        str(len(calls_of(data, row.value)) or ""),
        row.reason,
    )


def _sources(row: LedgerRow, data: PlanData) -> str:
    """Names of one tensor are alternatives; all others are needed together."""
    classes = {name: tie for tie in data.ties for name in tie}
    groups = dict.fromkeys(classes.get(name, (name,)) for name in row.sources)
    return ", ".join(" or ".join(n for n in group if n in row.sources) for group in groups)


# MERGED slot_recipe: One slot of a plan, as ``plan show --slot`` prints it: what it is made of,
# step by step.

_STEPS = ("value", "what it is", "dtype", "shape")
_GUARDS = ("made of", "dtype", "shape", "was", "because of")
_NEAR = 5


def find_row(data: PlanData, wanted: str) -> LedgerRow:
    """The row of one slot.

    Args:
        data: The plan.
        wanted: ``engine/name``, or the end of it, where no other slot ends so.

    Raises:
        ConfigError: There is no such slot, or several; ``problems`` has those that may be meant.
    """
    names = {f"{row.slot.engine}/{row.slot.name}": row for row in data.ledger}
    exact = [row for name, row in names.items() if wanted in {name, row.slot.name}]
    found = exact or [row for name, row in names.items() if name.endswith(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        several = [f"{row.slot.engine}/{row.slot.name}" for row in found]
        raise ConfigError(
            f"{len(found)} slots end in {wanted!r}.",
            problems=[Problem(name, "may be meant") for name in several],
            hint="Name one of them as a whole: --slot ENGINE/NAME.",
        )
    either = {row.slot.name: name for name, row in names.items()} | {name: name for name in names}
    near = dict.fromkeys(either[one] for one in get_close_matches(wanted, either, _NEAR, 0.5))
    raise ConfigError(
        f"The plan has no slot {wanted!r}.",
        problems=[Problem(name, "has a name like it") for name in near],
        hint="All slots: refitkit plan show FILE, without --slot.",
    )


def calls_of(data: PlanData, value: Any) -> list[int]:
    """The calls that a value needs, in the order in which they are made."""
    return sorted(calls_below([value], lambda number: operands_of(data.calls[number])))


def as_data(data: PlanData, row: LedgerRow) -> dict[str, Any]:
    """What ``--json`` prints of one slot: its row, what it is made of, and all guards."""
    calls = {number: data.calls[number] for number in calls_of(data, row.value)}
    leaves, kept = _ends(row, calls)
    return {
        "row": row.model_dump(mode="json"),
        "leaves": [leaf.model_dump(mode="json") for leaf in data.leaves if leaf.fqn in leaves],
        "pinned": {name: data.pinned[name].model_dump(mode="json") for name in kept},
        "calls": [{"number": n, **call.model_dump(mode="json")} for n, call in calls.items()],
        "guards": [guard.model_dump(mode="json") for guard in data.guards],
    }


def print_slot(console: Console, data: PlanData, row: LedgerRow) -> None:
    """Print one slot: what it is, its recipe in the order in which it is computed, the guards."""
    slot = row.slot
    known = [
        ("slot", slot.name),
        ("engine", slot.engine),
        ("holds", f"{slot.dtype}, {shape(slot.shape)}, {slot.count} elements, on {slot.device}"),
        ("state", row.state),
    ]
    console.print(facts([*known, ("reason", row.reason)] if row.reason else known))
    if row.value is not None:
        console.print(table(_STEPS, _steps(data, row), "recipe"))
    print_guards(console, data)


def print_guards(console: Console, data: PlanData) -> None:
    """Print the guards of a plan, if there are any."""
    known = Facts(data)
    rows = [
        (
            ", ".join(sorted(known.sources(one.value))),
            one.dtype,
            shape(one.shape),
            one.shown or "(not kept)",
            one.reason,
        )
        for one in data.guards
    ]
    if rows:
        console.print(table(_GUARDS, rows, "guards: what must be as it was"))


def _steps(data: PlanData, row: LedgerRow) -> Iterator[tuple[str, ...]]:
    """The recipe: leaves, kept tensors, calls, result."""
    calls = {number: data.calls[number] for number in calls_of(data, row.value)}
    leaves, kept = _ends(row, calls)
    twins = {name: tie for tie in data.ties for name in tie}
    for leaf in data.leaves:
        if leaf.fqn in leaves:
            same = "".join(f" = {n}" for n in twins.get(leaf.fqn, ()) if n != leaf.fqn)
            yield leaf.fqn, f"{leaf.kind.replace('-', ' ')}{same}", leaf.dtype, shape(leaf.shape)
    for name in kept:
        tensor = data.pinned[name]
        yield _named(PinnedRef(name=name), data), "in the plan", tensor.dtype, shape(tensor.shape)
    for number, call in calls.items():
        for output, result in enumerate(call.results):
            name = _named(CallRef(call=number, output=output), data)
            written = '"' if output else _written(call, data)
            yield name, written, result.dtype, shape(result.shape)
    yield row.slot.name, _named(row.value, data), row.slot.dtype, shape(row.slot.shape)


def _ends(row: LedgerRow, calls: dict[int, OpCall]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Leaves and kept tensors that a recipe starts from, and names that override a kept one."""
    values = [row.value, *(one for call in calls.values() for one in operands_of(call))]
    leaves = {one.fqn for one in values if isinstance(one, SourceRef)}
    if isinstance(row.value, PinnedRef):
        leaves |= set(row.sources)
    kept = dict.fromkeys(one.name for one in values if isinstance(one, PinnedRef))
    return frozenset(leaves), tuple(kept)


def _written(call: OpCall, data: PlanData) -> str:
    """``mul(w, %3)``."""
    given = [_text(argument, data) for argument in call.args]
    given += [f"{name}={_text(argument, data)}" for name, argument in call.kwargs.items()]
    return f"{call.op.removeprefix('aten.').removesuffix('.default')}({', '.join(given)})"


def _text(argument: Argument, data: PlanData) -> str:
    if isinstance(argument, tuple):
        return f"[{', '.join(_text(one, data) for one in argument)}]"
    if is_reference(argument):
        return _named(argument, data)
    if isinstance(argument, TorchName):
        return argument.name
    return argument.text if isinstance(argument, Number) else repr(argument)


def _named(value: Any, data: PlanData) -> str:
    """A leaf's FQN, ``kept 'name'``, ``%3`` for call 3 of the plan, ``%3.1`` for one of several."""
    if isinstance(value, SourceRef):
        return value.fqn
    if isinstance(value, PinnedRef):
        return f"kept {value.name!r}"
    several = len(data.calls[value.call].results) > 1
    return f"%{value.call}.{value.output}" if several else f"%{value.call}"
