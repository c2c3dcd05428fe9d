"""Whether a plan can be what refitkit wrote: nothing in it contradicts anything else.

It is asked of every plan that is read, before anything of it is used. Values are not looked at, and
nothing is computed: calls are tried on tensors without data (:mod:`refitkit.recipe.vet_calls`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING

from refitkit.errors import Problem
from refitkit.model import CallRef, PinnedRef, SlotState, SourceRef
from refitkit.model.plan import fingerprint_of_slots
from refitkit.program.views import overlap_problems
from refitkit.recipe.vet_calls import problems_of_calls
from refitkit.recipe.vet_facts import Facts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from refitkit.model import LedgerRow, PlanData, Value

_VALUES: dict[SlotState, tuple[type[object], ...]] = {
    SlotState.RECIPE: (SourceRef, CallRef),
    SlotState.PINNED: (PinnedRef, SourceRef, CallRef),
    SlotState.FROZEN: (type(None), PinnedRef),
    SlotState.UNMAPPED: (type(None),),
}
_SHA256 = re.compile("[0-9a-f]{64}")
_CALLS_SINCE = "refitplan/2"


def problems_of(data: PlanData) -> Iterator[Problem]:
    """What no plan that refitkit wrote can have."""
    facts = Facts(data)
    bad_calls = list(problems_of_calls(data, facts))
    yield from _problems_of_names(data)
    yield from _problems_of_statements(data)
    yield from bad_calls
    if bad_calls:
        return  # what rows say cannot be judged
    for row in data.ledger:
        yield from _problems_of_row(row, facts)
    yield from _problems_of_guards(data, facts)


def _problems_of_names(data: PlanData) -> Iterator[Problem]:
    slots = [row.slot for row in data.ledger]
    if fingerprint_of_slots(slots) != data.fingerprint.slots:
        yield Problem("fingerprint.slots", "does not match the ledger")
    if data.format != _CALLS_SINCE and (data.calls or data.guards):
        yield Problem("format", "has no calls and no guards", data.format, _CALLS_SINCE)
    for what, names in (
        ("slot", [f"{slot.engine}/{slot.name}" for slot in slots]),
        ("leaf", [leaf.fqn for leaf in data.leaves]),
        ("tied name", [name for tie in data.ties for name in tie]),
    ):
        yield from (Problem(n, f"{what} listed twice") for n, c in Counter(names).items() if c > 1)
    for slot in slots:
        if slot.shape is not None and math.prod(slot.shape) != slot.count:
            yield Problem(slot.name, "count", str(slot.count), str(slot.shape))
    yield from _problems_of_leaves(data)


def _problems_of_leaves(data: PlanData) -> Iterator[Problem]:
    leaves = {leaf.fqn: (leaf.dtype, leaf.shape) for leaf in data.leaves}
    for name in sorted({name for tie in data.ties for name in tie} - leaves.keys()):
        yield Problem(name, "tied, and no leaf of the program")
    for tie in data.ties:
        if len({leaves.get(name) for name in tie}) > 1:
            yield Problem(" = ".join(tie), "tied, and of several shapes or dtypes")
    yield from overlap_problems(data.leaves)
    for name, kept in data.pinned.items():
        if leaves.get(name, facts := (kept.dtype, kept.shape)) != facts:
            yield Problem(name, "kept, and unlike the leaf", f"{kept.dtype} {kept.shape}")


def _problems_of_statements(data: PlanData) -> Iterator[Problem]:
    """What it says of weights without a slot, and of slots that a strategy served."""
    for name in sorted(data.unreached.keys() - {leaf.fqn for leaf in data.leaves}):
        yield Problem(name, "said to need no slot, and no leaf of the program")
    listed = {"/".join(row.slot.key) for row in data.ledger}
    for need in data.needs:
        for slot in sorted(set(need.slots) - listed):
            yield Problem(slot, f"served by {need.name!r}, and no slot")


def _problems_of_row(row: LedgerRow, facts: Facts) -> Iterator[Problem]:
    name, value = row.slot.name, row.value
    if not isinstance(value, _VALUES[row.state]):
        yield Problem(name, "value does not fit its state", repr(value), str(row.state))
    elif value is None:
        if row.sources:
            yield Problem(name, "sources of a slot that has no recipe", str(row.sources))
    elif (reason := facts.missing(value)) is not None:
        yield Problem(name, *reason)
    else:
        yield from _unlike(row, value, facts)
        yield from _problems_of_sources(row, value, facts)


def _unlike(row: LedgerRow, value: Value, facts: Facts) -> Iterator[Problem]:
    """A value may have another shape than its slot, never another dtype or count."""
    found = facts.tensor(value)
    if (found.dtype, math.prod(found.shape)) != (row.slot.dtype, row.slot.count):
        wanted = f"{row.slot.dtype}, {row.slot.count} elements"
        yield Problem(row.slot.name, "differs from its recipe", f"{found}", wanted)


def _problems_of_sources(row: LedgerRow, value: Value, facts: Facts) -> Iterator[Problem]:
    name = row.slot.name
    if isinstance(value, PinnedRef):
        yield from _problems_of_overrides(row, facts)
        return
    wanted = facts.sources(value)
    if set(row.sources) != wanted or len(set(row.sources)) != len(row.sources):
        yield Problem(
            name, "its sources are not what it follows from", _list(row.sources), _list(wanted)
        )
    elif not wanted:
        yield Problem(name, "follows from nothing", hint="such a value is kept in the plan")


def _problems_of_overrides(row: LedgerRow, facts: Facts) -> Iterator[Problem]:
    """A source that has one of these names overrides what the plan keeps."""
    for fqn in row.sources:
        if row.state is SlotState.FROZEN:
            yield Problem(row.slot.name, "sources of a value that never changes", fqn)
        elif (reason := facts.missing(SourceRef(fqn=fqn))) is not None:
            yield Problem(row.slot.name, *reason)
        else:
            yield from _unlike(row, SourceRef(fqn=fqn), facts)


def _problems_of_guards(data: PlanData, facts: Facts) -> Iterator[Problem]:
    for number, guard in enumerate(data.guards):
        name = f"guards.{number}"
        if (reason := facts.missing(guard.value)) is not None:
            yield Problem(name, *reason)
            continue
        found = facts.tensor(guard.value)
        if (found.dtype, found.shape) != (guard.dtype, guard.shape):
            yield Problem(
                name, "differs from its value", f"{found}", f"{guard.dtype} {guard.shape}"
            )
        if not facts.sources(guard.value):
            yield Problem(name, "follows from nothing")
        if not _SHA256.fullmatch(guard.sha256):
            yield Problem(name, "is no sha256", guard.sha256[:80])


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"
