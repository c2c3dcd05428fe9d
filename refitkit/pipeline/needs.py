"""Completeness: the plugins that a plan needs, and the weights that have to reach a slot.

Both sections prevent a refit that looks good and leaves old weights behind:

- **Needs.** A plan names the plugins whose layer types and strategies it was made and proved with.
  A refit without them is refused, because weights that only they reach would keep their old values.
- **Reach.** The engine contains every weight that the program uses. If a weight reaches no slot,
  it is in the engine in another form: as a number that a converter computed from it, in a layer of
  an unknown type, or folded into code. A refit could not change it, so it is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import NotRefittableError, PlanMismatchError, Problem, UnmappedSlotError
from refitkit.model import Need, SlotState
from refitkit.recipe.plan import STRATEGY
from refitkit.recipe.reads import sources_of_guards
from refitkit.recipe.weak_cache import cached_per_object

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.model import Leaf, PlanData, ReportRow
    from refitkit.pipeline.context import Context
    from refitkit.protocols import Plan, SlotValue
    from refitkit.recipe import RefitPlan


LAYER_TYPES = "refitkit_layer_types"
STRATEGIES = "refitkit_mapping_strategies"
TRANSFORMS = "refitkit_weight_transforms"
_HOOKS = {"layer type": LAYER_TYPES, "strategy": STRATEGIES}
_BUILT_IN = "built-in"


# -- plugins that a plan needs: recorded --------------------------------------------------------


def layer_type_needs(host: Host, names: Iterable[str]) -> tuple[Need, ...]:
    """Needs for the layer types of a plan, sorted by name. Built-in layer types need no entry.

    Args:
        host: All plugins.
        names: Names of layer types. Names that no plugin offers are skipped.
    """
    offers = host.offers(LAYER_TYPES)
    known = sorted(offers.keys() & set(names))
    needs = (_need(host, "layer type", name, offers[name].plugin) for name in known)
    return tuple(need for need in needs if not is_built_in(host, need.plugin))


def strategy_needs(host: Host, rows: Iterable[ReportRow]) -> tuple[Need, ...]:
    """Needs for the strategies that gave the values in a proof, sorted by name.

    A need lists the frozen and pinned slots of its strategy. ``require_proved_strategies`` refuses
    the plan's own values for them.

    Args:
        host: All plugins.
        rows: Rows of the report of a refit that was verified.
    """
    offers = host.offers(STRATEGIES)
    kept: dict[str, list[str]] = {}
    for row in rows:
        if row.strategy in offers:
            slots = kept.setdefault(row.strategy, [])
            # The plan's own value of a frozen or pinned slot does not follow new weights.
            if row.state in {"frozen", "pinned"} and row.strategy != STRATEGY:
                slots.append(f"{row.engine}/{row.slot}")
    return tuple(
        _need(host, "strategy", name, offers[name].plugin, slots)
        for name, slots in sorted(kept.items())
    )


def transform_needs(host: Host, plugins: Mapping[str, str]) -> tuple[Need, ...]:
    """Needs for the transforms that attached data to a plan, sorted by name.

    Args:
        host: All plugins.
        plugins: Names of the plugins, by the name of the transform.
    """
    return tuple(_need(host, "transform", name, plugin) for name, plugin in sorted(plugins.items()))


def with_needs(plan: RefitPlan, needs: Iterable[Need]) -> RefitPlan:
    """The plan with these needs added. They replace needs of the same kind and name."""
    needs = tuple(needs)
    if not needs:
        return plan
    found = {(need.kind, need.name): need for need in (*plan.data.needs, *needs)}
    return plan.noting(needs=tuple(found.values()))


def _need(host: Host, kind: str, name: str, owner: str, slots: Iterable[str] = ()) -> Need:
    plugin = host.candidate(owner)
    return Need.model_validate(
        {
            "kind": kind,
            "name": name,
            "plugin": owner,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "slots": tuple(slots),
        }
    )


def is_built_in(host: Host, plugin: str) -> bool:
    """Whether a plugin is one of refitkit's own."""
    return host.candidate(plugin).origin == _BUILT_IN


# -- plugins that a plan needs: required --------------------------------------------------------


def require_needs(context: Context, plan: RefitPlan) -> None:
    """Raise unless all plugins that a plan needs are in use.

    Raises:
        PlanMismatchError: A layer type or strategy is missing; lists all with their plugins.
    """
    problems = list(missing_needs(context, plan.data))
    if problems:
        raise PlanMismatchError(
            "The plan needs plugins that are not in use here: without them, weights would keep "
            "their old values.",
            problems=problems,
            hint="Install or pass these plugins, and do not switch them off (no_plugins, "
            "--no-plugin, REFITKIT_NO_PLUGIN). If one no longer exists, plan again: "
            "refitkit.plan(program, target=...).",
        )


def missing_needs(context: Context, data: PlanData) -> Iterator[Problem]:
    """A problem for each need of a plan that is missing or that the settings leave out."""
    for need in data.needs:
        subject, wanted = f"{need.kind} {need.name!r}", describe_need(need)
        if need.name not in _offered(context, need.kind):
            yield Problem(subject, "missing", wanted=wanted, hint=_install_hint(need))
        elif need.kind == "strategy" and _is_disabled(need, context.config):
            hint = f"add {need.name!r} to Config.strategies, or leave that empty"
            yield Problem(subject, "left out", wanted=wanted, hint=hint)


def _offered(context: Context, kind: str) -> Collection[str]:
    """Names of the objects of a kind that plugins offer."""
    if kind == "transform":  # the settings decide which ones a plugin offers
        found = context.host.named_items(TRANSFORMS, config=context.config)
        return [transform.name for _, transform in found]
    return context.host.offers(_HOOKS[kind])


def describe_need(need: Need) -> str:
    """The plugin of a need as text, with distribution and version if they are known."""
    package = f" ({need.distribution} {need.version})" if need.distribution else ""
    return f"the plugin {need.plugin!r}{package}"


def _install_hint(need: Need) -> str:
    if need.distribution:
        return f"pip install {need.distribution}=={need.version}, or switch {need.plugin!r} on"
    return f"pass it: Pipeline(plugins=[...]), or switch {need.plugin!r} on"


def _is_disabled(need: Need, config: Config) -> bool:
    """Whether the settings leave out a strategy that a plan may need."""
    # The plan's own recipes may be left out: another strategy then gives all values, or none does
    # and require_all_slots refuses.
    return need.name != STRATEGY and bool(config.strategies) and need.name not in config.strategies


def require_proved_strategies(data: PlanData, strategies: Mapping[tuple[str, str], str]) -> None:
    """Raise if a slot gets the plan's own value and got another strategy's value in the proof.

    Args:
        data: The plan.
        strategies: Name of the strategy that gives each slot's value now, by ``(engine, slot)``.

    Raises:
        PlanMismatchError: Slots get another value than in the proof; lists them.
    """
    if not any(need.slots for need in data.needs):
        return
    # Plans store slots as text.
    by_name = {"/".join(key): strategy for key, strategy in strategies.items()}
    problems = [
        Problem(slot, "keeps the plan's value", by_name[slot], f"a value of {need.name!r}")
        for need in data.needs
        for slot in need.slots
        if by_name.get(slot) == STRATEGY
    ]
    if problems:
        raise PlanMismatchError(
            "In the plan's proof, other strategies gave the values of some slots, which would now "
            "keep the plan's values.",
            problems=problems,
            hint="Name those strategies before 'recipe' in Config.strategies, as for the proof.",
        )


# -- every weight reaches a slot ------------------------------------------------------------------

_ON_GUARD = "a guard compares all that the engines have of it"
_NO_SLOT = "reaches no slot"
_HINT_NO_SLOT = (
    "A converter may have read the weight where no recording sees it, or it is in a layer of a "
    "type that no plugin knows. Install the plugin that maps it, or that offers the layer type, "
    "and plan again. If the engines do not depend on it, remove it from the program."
)


def explain_unreached(data: PlanData) -> dict[str, str]:
    """Reasons why used weights that reach no slot need none, by FQN.

    A guard is the only reason: a weight of another value then breaks the plan, and is not ignored.
    Weights whose values do not matter are not used (``Leaf.used``).
    """
    unreached = _not_reached(data, _in_slots(data))
    guarded = _with_ties(data, sources_of_guards(data))
    return dict.fromkeys((name for name in unreached if name in guarded), _ON_GUARD)


def require_complete_plan(
    host: Host, data: PlanData, values: Callable[[], Iterable[SlotValue]] | None
) -> None:
    """Raise unless every used weight can reach a slot, for a new plan.

    If the plan has slots of unknown origin, weights may be in those. Then nothing is raised here:
    ``require_all_weights_mapped`` checks the values of each refit.

    Args:
        host: All plugins.
        data: The plan.
        values: Returns the values that strategies have for the program's own weights. None if
            there is no module to map. Then strategies of plugins may still reach all weights, so
            nothing is raised if plugins offer strategies.

    Raises:
        NotRefittableError: Weights reach no slot without a reason; lists them.
    """
    reached = _reached_by(data)
    lost = _unexplained(data, reached)
    if not lost or any(row.state is SlotState.UNMAPPED for row in data.ledger):
        return
    if _has_plugin_strategies(host):
        if values is None:
            return
        reached.update(name for value in values() for name in value.sources)
    problems = [Problem(name, _NO_SLOT) for name in _unexplained(data, reached)]
    if problems:
        raise NotRefittableError(
            "Weights that the program uses reach no slot of the engines: a refit could not change "
            "them.",
            problems=problems,
            hint=_HINT_NO_SLOT,
        )


def require_all_weights_mapped(
    plan: Plan,
    values: Mapping[tuple[str, str], SlotValue],
    unchanged: Collection[tuple[str, str]],
    given: Collection[str] | None,
) -> None:
    """Raise unless the new value of every used weight reaches a slot in one refit.

    Args:
        plan: The plan.
        values: Values of all slots that get one.
        unchanged: Slots that already hold the value of their weights.
        given: FQNs of the weights of a partial refit; None if all weights are refitted.

    Raises:
        UnmappedSlotError: Weights reach no slot without a reason in the plan; lists them.
    """
    names, data = _unexplained_in(plan), plan.data
    # A value without sources is computed from the program as a whole, so it reaches all weights.
    if not names or any(not value.sources and not value.pinned for value in values.values()):
        return
    reached = _reached_by(data)
    reached.update(name for value in values.values() for name in value.sources)
    reached.update(n for row in data.ledger if row.slot.key in unchanged for n in row.sources)
    lost = set(_not_reached(data, reached)).intersection(names)
    problems = [
        Problem(name, _NO_SLOT)
        for name in names
        if name in lost and (given is None or name in given)
    ]
    if problems:
        raise UnmappedSlotError(
            "Weights that the program uses reach no slot of the engines: they would keep their old "
            "values.",
            problems=problems,
            hint=_HINT_NO_SLOT,
        )


def _has_plugin_strategies(host: Host) -> bool:
    """Whether plugins that are not built in offer strategies."""
    origins = {one.name: one.origin for one in host.plugins()}
    return any(origins[offer.plugin] != _BUILT_IN for offer in host.offers(STRATEGIES).values())


@cached_per_object
def _unexplained_in(plan: Plan) -> list[str]:
    """FQNs of used weights that no row of a plan follows from, without a reason in the plan."""
    return _unexplained(plan.data, _reached_by(plan.data))


def _unexplained(data: PlanData, reached: Collection[str]) -> list[str]:
    return [name for name in _not_reached(data, reached) if name not in data.unreached]


def _not_reached(data: PlanData, reached: Collection[str]) -> Iterator[str]:
    """FQNs of used weights with elements that are not among the reached ones.

    Args:
        data: The plan.
        reached: FQNs of weights that reach a slot or a guard.
    """
    known, leaves = _with_ties(data, reached), {leaf.fqn: leaf for leaf in data.leaves}
    for leaf in data.leaves:
        weight = leaf.persistent or leaf.derived
        # A leaf without elements has no values that could become stale.
        if leaf.used and weight and 0 not in leaf.shape and leaf.fqn not in known:
            # A leaf that shares the memory of weights changes with them, so they reach it too.
            roots = set(_roots(leaf, leaves))
            if leaf.fqn in roots or not roots <= known:
                yield leaf.fqn


def _roots(leaf: Leaf, leaves: Mapping[str, Leaf]) -> Iterator[str]:
    """FQNs of the leaves with their own memory that a leaf's value follows from, or its own FQN."""
    if not leaf.derived:
        yield leaf.fqn
    for fqn in leaf.bases:
        yield from _roots(leaves[fqn], leaves)


def _reached_by(data: PlanData) -> set[str]:
    """FQNs of weights that rows of the ledger follow from, or that guards compare."""
    return _in_slots(data) | set(sources_of_guards(data))


def _in_slots(data: PlanData) -> set[str]:
    mapped = {SlotState.RECIPE, SlotState.PINNED}
    return {name for row in data.ledger if row.state in mapped for name in row.sources}


def _with_ties(data: PlanData, names: Iterable[str]) -> set[str]:
    """These FQNs and all other FQNs of the same tensors."""
    found = set(names)
    for tie in data.ties:
        if found.intersection(tie):
            found.update(tie)
    return found
