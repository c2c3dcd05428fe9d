"""Print a plan: its fingerprint and its ledger, or the recipe of one slot.

``print_plan`` prints one row for each slot. ``find_row`` and ``print_slot`` are for ``plan show
--slot``: they print how one slot is computed, step by step.
"""

from __future__ import annotations

from collections import Counter
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from refitkit.cli.tables import count, facts, shape, table
from refitkit.errors import ConfigError, Problem
from refitkit.model import CallRef, Number, PinnedRef, SourceRef, TorchName
from refitkit.recipe.ops import calls_below, is_reference, operands_of
from refitkit.recipe.store import TensorMetadata

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from refitkit.model import Argument, LedgerRow, Need, OpCall, PlanData
    from refitkit.recipe import RefitPlan


_COLUMNS = ("slot", "state", "dtype", "shape", "from", "ops", "reason")


def print_plan(console: Console, plan: RefitPlan) -> None:
    """Print a plan, one row for each slot."""
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
                *(("tied names", " = ".join(tie)) for tie in plan.data.ties),
                *(("needs", _need(need)) for need in plan.data.needs),
                *([("unseen", _unseen(plan.data))] if plan.data.unseen else []),
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


def _unseen(data: PlanData) -> str:
    """Text on slots with numbers that were made outside of torch and that no proof has cleared."""
    return (
        f"{', '.join(data.unseen)}: made outside of torch, and refitkit did not see of what. A "
        "proof by trial clears these slots or names them: refitkit plan make --prove"
    )


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
    """Sources of a slot as text: ``or`` joins names of a tied tensor, and a comma joins others."""
    classes = {name: tie for tie in data.ties for name in tie}
    # each tied tensor once, with those of its names that the row lists
    groups = dict.fromkeys(classes.get(name, (name,)) for name in row.sources)
    return ", ".join(" or ".join(n for n in group if n in row.sources) for group in groups)


# -- one slot ----------------------------------------------------------------------------------

_STEPS = ("value", "source", "dtype", "shape")
_GUARDS = ("computed from", "dtype", "shape", "expected", "reason")
_NEAR = 5
"""Largest number of similar names that an error lists."""


def find_row(data: PlanData, wanted: str) -> LedgerRow:
    """The ledger row of one slot.

    Args:
        data: The plan.
        wanted: ``engine/name``, or a suffix of it that no other slot has.

    Raises:
        ConfigError: No slot or several slots match; ``problems`` lists candidates.
    """
    names = {f"{row.slot.engine}/{row.slot.name}": row for row in data.ledger}
    # An exact name wins, although it may also be the end of other names.
    exact = [row for name, row in names.items() if wanted in {name, row.slot.name}]
    found = exact or [row for name, row in names.items() if name.endswith(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        several = [f"{row.slot.engine}/{row.slot.name}" for row in found]
        raise ConfigError(
            f"{len(found)} slots end in {wanted!r}.",
            problems=[Problem(name, "possible match") for name in several],
            hint="Give the full name: --slot ENGINE/NAME.",
        )
    # full names on the right: they win over an equal short name
    either = {row.slot.name: name for name, row in names.items()} | {name: name for name in names}
    near = dict.fromkeys(either[one] for one in get_close_matches(wanted, either, _NEAR, 0.5))
    raise ConfigError(
        f"The plan has no slot {wanted!r}.",
        problems=[Problem(name, "similar name") for name in near],
        hint="refitkit plan show FILE, without --slot, lists all slots.",
    )


def calls_of(data: PlanData, value: Any) -> list[int]:
    """Numbers of the calls that compute a value, in the order of execution."""
    # Calls are numbered in the order of execution.
    return sorted(calls_below([value], lambda number: operands_of(data.calls[number])))


def as_data(data: PlanData, row: LedgerRow) -> dict[str, Any]:
    """One slot as data for ``--json``: its row, the inputs and calls of its recipe, all guards."""
    calls = {number: data.calls[number] for number in calls_of(data, row.value)}
    leaves, kept = _inputs_of(row, calls)
    return {
        "row": row.model_dump(mode="json"),
        "leaves": [leaf.model_dump(mode="json") for leaf in data.leaves if leaf.fqn in leaves],
        "pinned": {name: data.pinned[name].model_dump(mode="json") for name in kept},
        "calls": [{"number": n, **call.model_dump(mode="json")} for n, call in calls.items()],
        "guards": [guard.model_dump(mode="json") for guard in data.guards],
    }


def print_slot(console: Console, data: PlanData, row: LedgerRow) -> None:
    """Print one slot: its metadata, its recipe in the order of execution, and all guards."""
    slot = row.slot
    metadata = [
        ("slot", slot.name),
        ("engine", slot.engine),
        ("tensor", f"{slot.dtype}, {shape(slot.shape)}, {slot.count} elements, on {slot.device}"),
        ("state", row.state),
    ]
    console.print(facts([*metadata, ("reason", row.reason)] if row.reason else metadata))
    if row.value is not None:
        console.print(table(_STEPS, _steps(data, row), "recipe"))
    print_guards(console, data)


def print_guards(console: Console, data: PlanData) -> None:
    """Print the guards of a plan, if there are any."""
    known = TensorMetadata(data)
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
        console.print(table(_GUARDS, rows, "guards: values that must not change"))


def _steps(data: PlanData, row: LedgerRow) -> Iterator[tuple[str, ...]]:
    """Rows of the recipe: leaves, kept tensors, calls, and the slot at the end."""
    calls = {number: data.calls[number] for number in calls_of(data, row.value)}
    leaves, kept = _inputs_of(row, calls)
    twins = {name: tie for tie in data.ties for name in tie}
    for leaf in data.leaves:
        if leaf.fqn in leaves:
            same = "".join(f" = {n}" for n in twins.get(leaf.fqn, ()) if n != leaf.fqn)
            yield leaf.fqn, f"{leaf.kind.replace('-', ' ')}{same}", leaf.dtype, shape(leaf.shape)
    for name in kept:
        tensor, label = data.pinned[name], _label(PinnedRef(name=name), data)
        yield label, "in the plan", tensor.dtype, shape(tensor.shape)
    for number, call in calls.items():
        for output, result in enumerate(call.results):
            label = _label(CallRef(call=number, output=output), data)
            # A ditto mark: further outputs of a call follow its first one.
            expression = '"' if output else _expression(call, data)
            yield label, expression, result.dtype, shape(result.shape)
    yield row.slot.name, _label(row.value, data), row.slot.dtype, shape(row.slot.shape)


def _inputs_of(row: LedgerRow, calls: dict[int, OpCall]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Inputs of a slot's recipe: FQNs of leaves, and names of tensors that the plan keeps."""
    values = [row.value, *(one for call in calls.values() for one in operands_of(call))]
    leaves = {one.fqn for one in values if isinstance(one, SourceRef)}
    # An entry of the weights with one of these names overrides the kept tensor.
    if isinstance(row.value, PinnedRef):
        leaves |= set(row.sources)
    kept = dict.fromkeys(one.name for one in values if isinstance(one, PinnedRef))
    return frozenset(leaves), tuple(kept)


def _expression(call: OpCall, data: PlanData) -> str:
    """A call as text, such as ``mul(w, %3)``."""
    arguments = [_text(argument, data) for argument in call.args]
    arguments += [f"{name}={_text(argument, data)}" for name, argument in call.kwargs.items()]
    return f"{call.op.removeprefix('aten.').removesuffix('.default')}({', '.join(arguments)})"


def _text(argument: Argument, data: PlanData) -> str:
    if isinstance(argument, tuple):
        return f"[{', '.join(_text(one, data) for one in argument)}]"
    if is_reference(argument):
        return _label(argument, data)
    if isinstance(argument, TorchName):
        return argument.name
    return argument.text if isinstance(argument, Number) else repr(argument)


def _label(value: Any, data: PlanData) -> str:
    """The label of a value.

    It is the FQN of a leaf, ``kept 'name'``, ``%3`` for call 3 of the plan, or ``%3.1`` for output
    1 of a call with several outputs.
    """
    if isinstance(value, SourceRef):
        return value.fqn
    if isinstance(value, PinnedRef):
        return f"kept {value.name!r}"
    several = len(data.calls[value.call].results) > 1
    return f"%{value.call}.{value.output}" if several else f"%{value.call}"
