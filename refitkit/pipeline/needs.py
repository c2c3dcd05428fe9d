"""What a plan needs of plugins: recorded when it is made and proved, required where it is used.

A weight that only a plugin's layer type or strategy reaches keeps its old value where the plugin is
missing. So the plan names the plugin, and whoever refits without it is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import PlanMismatchError, Problem
from refitkit.model import Need
from refitkit.recipe.plan import STRATEGY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from refitkit.config import Config
    from refitkit.host import Host, PluginOffer
    from refitkit.model import PlanData, ReportRow
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


def require_needs(host: Host, config: Config, plan: RefitPlan) -> None:
    """Check that all that a plan needs is there.

    Raises:
        PlanMismatchError: A layer type or a strategy is missing; names each, and its plugin.
    """
    problems = list(missing_needs(host, config, plan.data))
    if problems:
        raise PlanMismatchError(
            "The plan needs plugins that are not in use here: without them, weights would keep "
            "their old values.",
            problems=problems,
            hint="Install or pass these plugins, and switch none of them off (no_plugins, "
            "--no-plugin, REFITKIT_NO_PLUGIN). Where one is gone for good, plan again: "
            "refitkit.plan(program, target=...).",
        )


def missing_needs(host: Host, config: Config, data: PlanData) -> Iterator[Problem]:
    """What a plan needs and is not there, or not in use."""
    for need in data.needs:
        hook = STRATEGIES if need.kind == "strategy" else LAYER_TYPES
        if need.name not in host.offers(hook):
            yield Problem(
                f"{need.kind} {need.name!r}", "missing", wanted=described(need), hint=_to_do(need)
            )
        elif need.kind == "strategy" and _left_out(need, config):
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
