"""What a plan needs of plugins: recorded when it is made and proved, required where it is used.

A weight that only a plugin's layer type or strategy reaches keeps its old value where the plugin is
missing. So the plan names the plugin, and whoever refits without it is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import NotRefittableError, PlanMismatchError, Problem, UnmappedSlotError
from refitkit.model import Need, SlotState
from refitkit.recipe.plan import STRATEGY
from refitkit.recipe.reads import sources_of_guards
from refitkit.recipe.weak_cache import once_for_each

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from refitkit.config import Config
    from refitkit.host import Host, PluginOffer
    from refitkit.model import Leaf, PlanData, ReportRow
    from refitkit.pipeline.context import Context
    from refitkit.protocols import Plan, SlotValue
    from refitkit.recipe import RefitPlan


LAYER_TYPES = "refitkit_layer_types"
STRATEGIES = "refitkit_mapping_strategies"
_BUILT_IN = "built-in"


def of_layer_types(host: Host, names: Iterable[str]) -> tuple[Need, ...]:
    """Layer types of these names that plugins offer; built-in ones are always there."""
    offers = host.offers(LAYER_TYPES)
    known = sorted(offers.keys() & set(names))
    needs = (_need(host, "layer type", name, offers[name]) for name in known)
    return tuple(need for need in needs if not _is_built_in(host, need.plugin))


def of_strategies(host: Host, rows: Iterable[ReportRow]) -> tuple[Need, ...]:
    """The strategies that served the slots of a proof.

    Args:
        host: All plugins.
        rows: The report of a refit that was found right.
    """
    offers = host.offers(STRATEGIES)
    kept: dict[str, list[str]] = {}
    for row in rows:
        if row.strategy in offers:
            slots = kept.setdefault(row.strategy, [])
            if row.state in {"frozen", "pinned"} and row.strategy != STRATEGY:
                slots.append(f"{row.engine}/{row.slot}")
    return tuple(
        _need(host, "strategy", name, offers[name], slots) for name, slots in sorted(kept.items())
    )


def needing(plan: RefitPlan, needs: Iterable[Need]) -> RefitPlan:
    """The plan with these needs in addition; an entry of the same kind and name is replaced."""
    needs = tuple(needs)
    if not needs:
        return plan
    found = {(need.kind, need.name): need for need in (*plan.data.needs, *needs)}
    return plan.noting(needs=tuple(found.values()))


def require_needs(context: Context, plan: RefitPlan) -> None:
    """Check that all that a plan needs is there.

    Raises:
        PlanMismatchError: A layer type or a strategy is missing; names each, and its plugin.
    """
    problems = list(missing_needs(context, plan.data))
    if problems:
        raise PlanMismatchError(
            "The plan needs plugins that are not in use here: without them, weights would keep "
            "their old values.",
            problems=problems,
            hint="Install or pass these plugins, and switch none of them off (no_plugins, "
            "--no-plugin, REFITKIT_NO_PLUGIN). Where one is gone for good, plan again: "
            "refitkit.plan(program, target=...).",
        )


def missing_needs(context: Context, data: PlanData) -> Iterator[Problem]:
    """What a plan needs and is not there, or not in use."""
    for need in data.needs:
        hook = STRATEGIES if need.kind == "strategy" else LAYER_TYPES
        if need.name not in context.host.offers(hook):
            yield Problem(
                f"{need.kind} {need.name!r}", "missing", wanted=described(need), hint=_to_do(need)
            )
        elif need.kind == "strategy" and _left_out(need, context.config):
            hint = f"add {need.name!r} to Config.strategies, or leave that empty"
            yield Problem(f"strategy {need.name!r}", "left out", wanted=described(need), hint=hint)


def require_served(data: PlanData, strategies: Mapping[tuple[str, str], str]) -> None:
    """Check that no slot gets the plan's own value that another strategy served in the proof.

    Args:
        data: The plan.
        strategies: Name of the strategy that serves each slot now, by ``(engine, slot)``.

    Raises:
        PlanMismatchError: There are; lists them.
    """
    if not any(need.slots for need in data.needs):
        return
    by_name = {"/".join(key): strategy for key, strategy in strategies.items()}
    problems = [
        Problem(slot, "keeps the plan's value", by_name[slot], f"a value of {need.name!r}")
        for need in data.needs
        for slot in need.slots
        if by_name.get(slot) == STRATEGY
    ]
    if problems:
        raise PlanMismatchError(
            "In the plan's proof other strategies served some slots, which would now keep their "
            "values.",
            problems=problems,
            hint="Name those strategies before 'recipe' in Config.strategies, as for the proof.",
        )


def described(need: Need) -> str:
    """Whose it is, as text."""
    brought = f" ({need.distribution} {need.version})" if need.distribution else ""
    return f"the plugin {need.plugin!r}{brought}"


def _need(host: Host, kind: str, name: str, offer: PluginOffer, slots: Iterable[str] = ()) -> Need:
    taken = host.candidate(offer.plugin)
    return Need.model_validate(
        {
            "kind": kind,
            "name": name,
            "plugin": offer.plugin,
            "distribution": taken.distribution,
            "version": taken.version,
            "slots": tuple(slots),
        }
    )


def _is_built_in(host: Host, plugin: str) -> bool:
    return host.candidate(plugin).origin == _BUILT_IN


def _left_out(need: Need, config: Config) -> bool:
    """Whether settings leave a strategy out; the plan's own recipes may be left out by anybody."""
    return need.name != STRATEGY and bool(config.strategies) and need.name not in config.strategies


def _to_do(need: Need) -> str:
    if need.distribution:
        return f"pip install {need.distribution}=={need.version}, or switch {need.plugin!r} on"
    return f"pass it: Pipeline(plugins=[...]), or switch {need.plugin!r} on"


# MERGED reach: Whether every weight that a program uses reaches a slot, or the plan says why it need not.
#
# A weight that reaches no slot is in the engine all the same: as a number that a converter made of
# it, in a layer of a type that nobody looks into, or folded into code. A refit would leave it there.

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
