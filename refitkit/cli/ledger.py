"""How a plan is printed: what it belongs to, and its ledger."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from refitkit.cli.slot_recipe import calls_of, print_guards
from refitkit.cli.tables import facts, table
from refitkit.cli.text import count, shape

if TYPE_CHECKING:
    from rich.console import Console

    from refitkit.model import LedgerRow, Need, PlanData
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
    from refitkit.pipeline.needs import described

    return f"{need.kind} {need.name} of {described(need)}"


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
