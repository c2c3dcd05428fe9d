"""Whether every weight that a program uses reaches a slot, or the plan says why it need not.

A weight that reaches no slot is in the engine all the same: as a number that a converter made of
it, in a layer of a type that nobody looks into, or folded into code. A refit would leave it there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import NotRefittableError, Problem, UnmappedSlotError
from refitkit.model import SlotState
from refitkit.recipe.reads import sources_of_guards
from refitkit.recipe.weak_cache import once_for_each

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from refitkit.host import Host
    from refitkit.model import Leaf, PlanData
    from refitkit.protocols import Plan, SlotValue

_ON_GUARD = "a guard compares all that the engines have of it"
_WITHOUT_SLOT = "reaches no slot"
_HINT = (
    "A converter may have read it where no recording sees that, or it is in a layer of a type that "
    "no plugin knows. Install the plugin that maps it, or that offers the layer type, and plan "
    "again. If the engines do not depend on it, take it out of the program."
)


def stated(data: PlanData) -> dict[str, str]:
    """Why weights that the program uses and that reach no slot need not, by FQN.

    Whose values change nothing is not used: see ``Leaf.used``.
    """
    lacking = _lacking(data, _in_slots(data))
    guarded = _with_twins(data, sources_of_guards(data))
    return dict.fromkeys((name for name in lacking if name in guarded), _ON_GUARD)


def require_planned(
    host: Host, data: PlanData, served: Callable[[], Iterable[SlotValue]] | None
) -> None:
    """Check a new plan.

    Weights may be in slots whose origin is unknown: that shows when those are served
    (:func:`require_reached_by`).

    Args:
        host: All plugins.
        data: The plan.
        served: Returns the values that strategies have for the program's own weights; None where
            there is no module to ask them for.

    Raises:
        NotRefittableError: Weights reach no slot and nobody says why; lists them.
    """
    reached = _reached_by(data)
    lost = _unstated(data, reached)
    if not lost or any(row.state is SlotState.UNMAPPED for row in data.ledger):
        return
    if _has_mappers(host):
        if served is None:
            return
        reached.update(name for value in served() for name in value.sources)
    problems = [Problem(name, _WITHOUT_SLOT) for name in _unstated(data, reached)]
    if problems:
        raise NotRefittableError(
            "Weights that the program uses reach no slot of the engines: a refit could not change "
            "them.",
            problems=problems,
            hint=_HINT,
        )


def require_reached_by(
    plan: Plan,
    values: Mapping[tuple[str, str], SlotValue],
    unchanged: Collection[tuple[str, str]],
    given: Collection[str] | None,
) -> None:
    """Check that the new value of every weight goes into a slot.

    Args:
        plan: The plan.
        values: Values of all slots that get one.
        unchanged: Slots that hold already what the weights give.
        given: Names of the weights, where only those are refitted; None where all are.

    Raises:
        UnmappedSlotError: Weights reach no slot and the plan does not say why; lists them.
    """
    names, data = _unreached(plan), plan.data
    if not names or any(not value.sources and not value.pinned for value in values.values()):
        return  # a value of no source is made of the program as a whole
    reached = _reached_by(data)
    reached.update(name for value in values.values() for name in value.sources)
    reached.update(n for row in data.ledger if row.slot.key in unchanged for n in row.sources)
    lost = set(_lacking(data, reached)).intersection(names)
    problems = [
        Problem(name, _WITHOUT_SLOT)
        for name in names
        if name in lost and (given is None or name in given)
    ]
    if problems:
        raise UnmappedSlotError(
            "Weights that the program uses reach no slot of the engines: they would keep their old "
            "values.",
            problems=problems,
            hint=_HINT,
        )


def _has_mappers(host: Host) -> bool:
    """Whether plugins that are not built in offer strategies."""
    hook, kinds = "refitkit_mapping_strategies", {one.name: one.origin for one in host.plugins()}
    return any(kinds[offer.plugin] != "built-in" for offer in host.offers(hook).values())


@once_for_each
def _unreached(plan: Plan) -> list[str]:
    """Weights that no row follows from, and of which the plan does not say why."""
    return _unstated(plan.data, _reached_by(plan.data))


def _unstated(data: PlanData, reached: Collection[str]) -> list[str]:
    return [name for name in _lacking(data, reached) if name not in data.unreached]


def _lacking(data: PlanData, reached: Collection[str]) -> Iterator[str]:
    """Weights with elements that the graph uses and that are not among these.

    A leaf that shares the memory of weights is reached where those are.
    """
    known, leaves = _with_twins(data, reached), {leaf.fqn: leaf for leaf in data.leaves}
    for leaf in data.leaves:
        weight = leaf.persistent or leaf.derived
        if leaf.used and weight and 0 not in leaf.shape and leaf.fqn not in known:
            roots = set(_roots(leaf, leaves))
            if leaf.fqn in roots or not roots <= known:
                yield leaf.fqn


def _roots(leaf: Leaf, leaves: Mapping[str, Leaf]) -> Iterator[str]:
    """The leaves of memory of their own that a leaf's value follows from; it may be one itself."""
    if not leaf.derived:
        yield leaf.fqn
    for fqn in leaf.bases:
        yield from _roots(leaves[fqn], leaves)


def _reached_by(data: PlanData) -> set[str]:
    """Weights that rows of the ledger follow from, or guards compare."""
    return _in_slots(data) | set(sources_of_guards(data))


def _in_slots(data: PlanData) -> set[str]:
    served = {SlotState.RECIPE, SlotState.PINNED}
    return {name for row in data.ledger if row.state in served for name in row.sources}


def _with_twins(data: PlanData, names: Iterable[str]) -> set[str]:
    """These names and all other names of the same tensors."""
    found = set(names)
    for tie in data.ties:
        if found.intersection(tie):
            found.update(tie)
    return found
