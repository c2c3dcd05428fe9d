"""The stage ``map``: a value for every slot, from the first strategy that has one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from refitkit.errors import (
    ConfigError,
    PlanMismatchError,
    PluginError,
    Problem,
    SourceError,
    UnmappedSlotError,
    raised_as,
)
from refitkit.model import LedgerRow, ReportRow, SlotKey, SlotState, StateRow
from refitkit.pipeline.needs import require_reached_by, require_served
from refitkit.program.bits import same_bits
from refitkit.program.views import derived_value
from refitkit.protocols import LeavesOut, Mapped, MapRequest, SupportsPartial
from refitkit.recipe import RefitPlan, unusable_reason
from refitkit.recipe.plan import STRATEGY
from refitkit.recipe.reads import kept_leaves, reads_of, state_slots
from refitkit.recipe.weak_cache import once_for_each

if TYPE_CHECKING:
    from collections import abc
    from collections.abc import Callable, Collection, Iterable, Mapping

    import torch
    from torch.export import ExportedProgram

    from refitkit.host import PluginOffer
    from refitkit.model import Leaf
    from refitkit.pipeline.context import Context
    from refitkit.protocols import (
        BindableProgram,
        MappingStrategy,
        OpenedModule,
        Plan,
        SlotValue,
        Tools,
        WeightSource,
    )


_UNCHANGED = "unchanged: it holds already what its weights give"
_KEPT = "kept: calls of the module write it, and the weights do not contain it"
_ON_UNSERVED = (
    "Leave them as they are with partial=True, install a plugin that maps them, or leave "
    "Config.strategies empty: then all strategies are tried."
)
_ON_HALF_GIVEN = "Pass those too, or leave out all that such slots follow from."
_ON_BROKEN_GUARDS = (
    "The plan's recipes hold only while these values are what they were when it was made. Pass "
    "the weights as a program, torch.export.export(model, inputs): the strategy 'rebuild' reads "
    "slots off it. Or plan again from that program: refitkit.plan(program, target=...)."
)


@dataclass
class SlotMapping:
    """What the strategies gave.

    Attributes:
        plan: The plan that was followed.
        values: Values by ``(engine, slot)``.
        reasons: For each slot, what strategies said that did not serve it.
        unchanged: Slots that hold already what the source has for them; nobody is asked for them.
        kept: State that stays as it is live, with the values that would reset it.
        reset: State whose value is not one of the weights.
    """

    plan: Plan
    values: dict[tuple[str, str], SlotValue] = field(default_factory=dict)
    reasons: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    unchanged: frozenset[tuple[str, str]] = frozenset()
    kept: dict[tuple[str, str], SlotValue] = field(default_factory=dict)
    reset: frozenset[tuple[str, str]] = frozenset()

    def unserved(self) -> list[LedgerRow]:
        """Rows without a value that need one.

        Of a frozen slot nobody needs a value that the plan does not keep, until a strategy says
        that it no longer holds.
        """
        ledger = self.plan.data.ledger
        if len(self.values) == len(ledger):  # there is one for each, as mostly at last
            return []
        return [row for row in ledger if self._is_unserved(row)]

    def _is_unserved(self, row: LedgerRow) -> bool:
        key = row.slot.key
        held = row.state is SlotState.FROZEN and row.value is None and key not in self.reasons
        served = key in self.values or key in self.unchanged or key in self.kept
        return not served and not held

    def keep_state(self, module: OpenedModule, source: WeightSource) -> None:
        """Leave state as it is live where the source does not contain it, as load_state_dict does.

        A program brings the state that it was exported with, which no state_dict holds: that is a
        value to reset to, too. An engine that takes all its weights at once cannot keep state.
        """
        names, engines = source.names(), module.engines
        for key in state_slots(self.plan):
            value = self.values.get(key)
            if value is None or _is_contained(value, names, source):
                continue
            if isinstance(engines[key[0]], SupportsPartial):
                self.kept[key] = self.values.pop(key)
            else:
                self.reset |= {key}

    def reset_state(self) -> None:
        """Give the state that would be kept the values that reset it."""
        self.reset |= self.kept.keys()
        self.values.update(self.kept)
        self.kept = {}

    def keep_pinned(self) -> None:
        """Drop values that come from the plan and not from the source.

        A partial refit changes what the source has; everything else stays as it is live.
        """
        self.values = {key: value for key, value in self.values.items() if not _of_plan(value)}

    def broken_guards(self, source: WeightSource) -> list[Problem]:
        """What makes the plan's recipes say nothing of this source."""
        plan = self.plan
        if isinstance(plan, RefitPlan) and plan.data.guards:
            return list(plan.broken_guards(source))
        return []

    def require_complete(self, given: abc.Collection[str] | None = None) -> None:
        """Check that every weight goes into a slot, and every slot gets the value that was proved.

        Args:
            given: Names of the weights, where only those are refitted; None where all are.

        Raises:
            UnmappedSlotError: Weights reach no slot; lists them.
            PlanMismatchError: Slots would get another strategy's value than in the plan's proof.
        """
        require_reached_by(self.plan, self.values, self.unchanged, given)
        require_served(self.plan.data, {key: value.strategy for key, value in self.values.items()})

    def summary(self) -> MappingSummary:
        """How slots were served, without what they were served with."""
        values = self.values.items()
        return MappingSummary(
            self.plan.data.ledger,
            {key: (value.strategy, tuple(value.sources)) for key, value in values},
            self.reasons,
            self.unchanged,
            tuple((key, self._outcome(key)) for key in state_slots(self.plan)),
        )

    def _outcome(self, key: SlotKey) -> Literal["kept", "set", "reset"]:
        """What the refit does to one slot of the state."""
        if key in self.reset:
            return "reset"
        return "set" if key in self.values else "kept"


@dataclass(frozen=True)
class MappingSummary:
    """How slots were served.

    Attributes:
        ledger: All rows of the plan.
        slots: The strategy and the sources of the slots that have a value.
        reasons: As of :class:`SlotMapping`.
        unchanged: Likewise.
        state: What was done to each slot that calls of the module write.
    """

    ledger: tuple[LedgerRow, ...]
    slots: abc.Mapping[SlotKey, tuple[str, tuple[str, ...]]]
    reasons: abc.Mapping[SlotKey, list[str]]
    unchanged: frozenset[SlotKey]
    state: tuple[tuple[SlotKey, Literal["kept", "set", "reset"]], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the slots that have a value."""
        return sum(row.slot.nbytes for row in self.ledger if row.slot.key in self.slots)

    def rows(self) -> tuple[ReportRow, ...]:
        """One row of the report for every slot."""
        kept = {key for key, outcome in self.state if outcome == "kept"}
        return tuple(self._row(row, kept) for row in self.ledger)

    def state_rows(self) -> tuple[StateRow, ...]:
        """One row of the report for every slot that calls of the module write."""
        return tuple(StateRow(engine=e, slot=s, outcome=outcome) for (e, s), outcome in self.state)

    def _row(self, row: LedgerRow, kept: Collection[SlotKey]) -> ReportRow:
        key = row.slot.key
        strategy, sources = self.slots.get(key, ("", ()))
        said = "; ".join(self.reasons[key]) if key in self.reasons else ""
        if key in kept:
            said = _KEPT
        elif key in self.unchanged:
            said = _UNCHANGED
        return _report_row(*key, row.state, strategy, sources, said or row.reason)


@lru_cache(maxsize=1 << 14)  # refits of one module say the same of most slots
def _report_row(
    engine: str, slot: str, state: SlotState, strategy: str, sources: tuple[str, ...], reason: str
) -> ReportRow:
    return ReportRow(
        engine=engine, slot=slot, state=state, strategy=strategy, sources=sources, reason=reason
    )


def map_slots(
    context: Context,
    plan: Plan,
    module: OpenedModule,
    source: WeightSource,
    program: BindableProgram | None,
    *,
    unchanged: frozenset[tuple[str, str]] = frozenset(),
) -> SlotMapping:
    """Ask the strategies, in order, for what is still without a value and not unchanged.

    State that the source does not contain is kept.

    Raises:
        PluginError: A strategy failed, or strategies of several plugins that nothing puts in order
            have a value for the same slot; names them and lists the slots.
    """
    mapping = SlotMapping(plan, unchanged=unchanged)
    tools = context.tools("refit", "map")

    def ask(strategy: MappingStrategy, wanted: tuple[LedgerRow, ...]) -> Mapped:
        request = MapRequest(plan, module, source, wanted, program, tools)
        doing = f"Values of slots cannot be had from {strategy.name!r}"
        with raised_as(PluginError, f"The strategy {strategy.name!r} failed", doing=doing):
            answer = strategy.map(request)
        what = f"The strategy {strategy.name!r} gave what is no answer"
        with raised_as(PluginError, what, doing=doing):
            _check_answer(strategy, answer, wanted)
        return answer

    for rank in _in_order(context):
        _ask_rank(mapping, rank, ask)
    if state_slots(plan):
        with raised_as(SourceError, f"{source.description} cannot be read"):
            mapping.keep_state(module, source)
    return mapping


def _ask_rank(
    mapping: SlotMapping,
    rank: list[PluginOffer],
    ask: Callable[[MappingStrategy, tuple[LedgerRow, ...]], Mapped],
) -> None:
    """Ask strategies that nothing puts in order.

    Those of one plugin are asked for what the ones before left; those of another plugin for all, so
    that it shows if both have a value.
    """
    taken: dict[tuple[str, str], tuple[LedgerRow, PluginOffer]] = {}
    clashes: list[Problem] = []
    for offer in rank:
        strategy: MappingStrategy = offer.item
        of_others = [row for row, first in taken.values() if first.plugin != offer.plugin]
        wanted = (*mapping.unserved(), *of_others)
        if not wanted:
            continue
        answer = ask(strategy, wanted)
        clashes += [_clash(*taken[key], offer) for key in answer.values if key in taken]
        if offer is not rank[-1]:
            taken |= {row.slot.key: (row, offer) for row in wanted if row.slot.key in answer.values}
        mapping.values.update(answer.values)
        for key, reason in answer.declined.items():
            mapping.reasons.setdefault(key, []).append(f"{strategy.name}: {reason}")
    if clashes:
        names = ", ".join(repr(offer.item.name) for offer in rank)
        raise PluginError(
            "Strategies of several plugins have a value for the same slots, and the same priority.",
            problems=clashes,
            hint=f"Say in Config.strategies in which order {names} are to be tried, with all "
            "others that are wanted; or switch one of the plugins off: --no-plugin NAME.",
        )


def _clash(row: LedgerRow, first: PluginOffer, second: PluginOffer) -> Problem:
    offers = " and ".join(f"{one.item.name!r} of {one.plugin!r}" for one in (first, second))
    return Problem(f"{row.slot.engine}/{row.slot.name}", "claimed twice", offers)


def require_all(mapping: SlotMapping, source: WeightSource) -> None:
    """Stop where slots are without a value; called once the checks found nothing.

    Raises:
        UnmappedSlotError: Lists all of them, with what each strategy said, after the guards of the
            plan that are broken.
    """
    unserved = mapping.unserved()
    if unserved:
        broken = mapping.broken_guards(source)
        raise UnmappedSlotError(
            f"No strategy has a value for some slots, with {source.description}.",
            problems=[*broken, *(_without_value(mapping, row) for row in unserved)],
            hint=_ON_BROKEN_GUARDS if broken else _ON_UNSERVED,
        )


def require_reached(
    mapping: SlotMapping, source: WeightSource, overridden: frozenset[str] = frozenset()
) -> None:
    """Stop a refit in part that would leave out some of the given weights without a word.

    Args:
        mapping: What the strategies gave.
        source: The given weights.
        overridden: What earlier refits gave other values for than the plan keeps: what would be
            computed with the plan's value has to be given again.

    Raises:
        UnmappedSlotError: There are slots that follow from given weights and get no value; lists
            them, and what would have to be given with those. Or there are weights that no written
            slot comes from, and slots of which nobody knows whether they come from these weights;
            lists both.
    """
    given = set(source.names())
    left = [row for row in mapping.unserved() if not given.isdisjoint(row.sources)]
    problems = [_half_given(mapping, row, source) for row in left]
    for row in mapping.plan.data.ledger if overridden else ():
        value = mapping.values.get(row.slot.key)
        lacking = [name for name in row.sources if name in overridden - given]
        if value is not None and value.strategy == STRATEGY and lacking:
            problems.append(_more_wanted(row, value.sources, lacking))
    if problems:
        broken = mapping.broken_guards(source)
        raise UnmappedSlotError(
            f"Some slots follow from more than {source.description} has.",
            problems=[*broken, *problems],
            hint=_ON_BROKEN_GUARDS if broken else _ON_HALF_GIVEN,
        )
    unknown = [row for row in mapping.unserved() if row.state is SlotState.UNMAPPED]
    if unknown:
        _require_known(mapping, source, unknown)


def _require_known(mapping: SlotMapping, source: WeightSource, unknown: list[LedgerRow]) -> None:
    reached = {name for value in mapping.values.values() for name in value.sources}
    unchanged = [row for row in mapping.plan.data.ledger if row.slot.key in mapping.unchanged]
    reached.update(name for row in unchanged for name in row.sources)
    reads = reads_of(mapping.plan)
    reached = reads.names_of(reached)
    whole = any(not value.sources for value in mapping.values.values())
    lost = [] if whole else [name for name in source.names() if name in reads.used - reached]
    if lost or not (mapping.values or unchanged):
        problems = [Problem(name, "no written slot comes from it") for name in lost]
        problems += [
            Problem(f"{row.slot.engine}/{row.slot.name}", "may come from it") for row in unknown
        ]
        raise UnmappedSlotError(
            f"Nobody knows which slots some of {source.description} belongs to.",
            problems=problems,
            hint="Pass all weights, without partial=True.",
        )


def _without_value(mapping: SlotMapping, row: LedgerRow) -> Problem:
    said = "; ".join(mapping.reasons.get(row.slot.key, [row.reason]))
    return Problem(f"{row.slot.engine}/{row.slot.name}", str(row.state), hint=said)


def _half_given(mapping: SlotMapping, row: LedgerRow, source: WeightSource) -> Problem:
    lacking = mapping.plan.lacking(row, source) if isinstance(mapping.plan, RefitPlan) else ()
    if not lacking:
        return _without_value(mapping, row)
    names = source.names()
    return _more_wanted(row, [name for name in row.sources if name in names], lacking)


def _more_wanted(row: LedgerRow, given: Iterable[str], lacking: Iterable[str]) -> Problem:
    return Problem(
        f"{row.slot.engine}/{row.slot.name}",
        "follows from more weights",
        ", ".join(given),
        f"{', '.join(lacking)} with it",
    )


def _is_contained(value: SlotValue, names: Collection[str], source: WeightSource) -> bool:
    """Whether a value is one of the weights: a state_dict of the source would hold it."""
    if not value.sources:
        return not _of_plan(value)
    return any(name not in names or source.info(name).persistent for name in value.sources)


def _of_plan(value: SlotValue) -> bool:
    """Whether a value is one that the plan keeps, or is computed from such values alone."""
    return value.pinned or (value.strategy == STRATEGY and not value.sources)


def _in_order(context: Context) -> list[list[PluginOffer]]:
    """Strategies in the order in which they are tried; nothing orders those in one list."""
    offered, wanted = context.host.offers("refitkit_mapping_strategies"), context.config.strategies
    if not wanted:
        ranks: dict[int, list[PluginOffer]] = {}
        for offer in offered.values():
            ranks.setdefault(offer.item.priority, []).append(offer)
        return [ranks[priority] for priority in sorted(ranks)]
    unknown = [Problem(n, "no such strategy") for n in wanted if n not in offered]
    if unknown:
        hint = f"There are: {', '.join(sorted(offered))}."
        raise ConfigError(
            "Config.strategies names what no plugin offers.", problems=unknown, hint=hint
        )
    return [[offered[name]] for name in wanted]


def _check_answer(strategy: MappingStrategy, answer: object, wanted: tuple[LedgerRow, ...]) -> None:
    if not isinstance(answer, Mapped):
        raise PluginError(
            f"The strategy {strategy.name!r} gave a {type(answer).__name__}.",
            hint="Mapped(values, declined): SlotValues by (engine, slot), and reasons likewise.",
        )
    keys = {row.slot.key: row.slot for row in wanted}
    odd = {key: value for key, value in answer.values.items() if value.slot is not keys.get(key)}
    kinds = {type(text) for value in answer.values.values() for text in value.sources}
    kinds |= {type(value.strategy) for value in answer.values.values()}
    if not all(issubclass(kind, str) for kind in kinds):
        raise PluginError(
            f"The strategy {strategy.name!r} gave values whose strategy or sources are no names.",
            hint="SlotValue(slot, strategy, sources, load): a text, and a tuple of texts.",
        )
    foreign = {key for key in odd if key not in keys}
    mixed = {key for key, value in odd.items() if value.slot.key != key}
    if foreign or mixed:
        names = ", ".join("/".join(key) for key in sorted(foreign | mixed))
        what = "nobody asked for" if foreign else "under the names of other slots"
        raise PluginError(f"The strategy {strategy.name!r} gave values {what}: {names}.")


# MERGED overrides: Values that plans keep and that sources have overridden: a refit in part has to know of them.
#
# Of what no state_dict holds (a mask, a constant) the plan keeps a value, for sources that have none.
# A slot that follows from such a value and from weights would get the plan's value in a refit in part
# that gives the weights only, while what is live came from another one.


def overrides(plan: RefitPlan, source: WeightSource) -> frozenset[str]:
    """What a source has other values of than the plan, among what slots mix with weights.

    Raises:
        SourceError: An entry cannot be read.
    """
    names, leaves = source.names(), {leaf.fqn: leaf for leaf in plan.data.leaves}
    return frozenset(
        name
        for name in _mixed(plan)
        if name in names
        and name in plan.data.pinned
        and not same_bits(
            _own_elements(leaves, name, plan.pinned(name)),
            _own_elements(leaves, name, source.get(name)),
        )
    )


def _own_elements(leaves: Mapping[str, Leaf], name: str, value: torch.Tensor) -> torch.Tensor:
    """A value without what follows from weights that are parts of it."""
    leaf = leaves.get(name)
    if leaf is None or not leaf.parts:
        return value
    zeros = {part.fqn: value.new_zeros(leaves[part.fqn].shape) for part in leaf.parts}
    return derived_value(leaf, leaves, zeros.__getitem__, lambda _: value)


def left(before: frozenset[str], plan: RefitPlan, source: WeightSource) -> frozenset[str]:
    """What is overridden after a refit in part: what it gives is as it gives it."""
    return before.difference(source.names()) | overrides(plan, source)


def differing(plan: RefitPlan, source: WeightSource, wrappers: Collection[str]) -> tuple[str, ...]:
    """Tensors that a source leaves out and that are not what the plan keeps.

    A value that is the plan's in another dtype is the plan's. State that calls write is no value
    to compare, and neither is what follows from weights.

    Args:
        plan: The plan.
        source: The weights, as they were given.
        wrappers: Parts of names that wrappers of a module put there.
    """
    if not isinstance(source, LeavesOut):
        return ()
    leaves = {
        name
        for name, leaf in kept_leaves(plan).items()
        if leaf.used and not (leaf.mutated or leaf.parts)
    }
    found: dict[str, None] = {}
    for given, value in source.left_out.items():
        unwrapped = ".".join(part for part in given.split(".") if part not in wrappers)
        name = given if given in leaves else unwrapped
        if name in leaves and name in plan.data.pinned and not _is_planned(plan, name, value):
            found[name] = None
    return tuple(found)


def _is_planned(plan: RefitPlan, name: str, value: torch.Tensor) -> bool:
    return not unusable_reason(value) and same_bits(plan.pinned(name).to(value.dtype), value)


def overridden_as(names: frozenset[str]) -> bytes:
    """Names as a saved module holds them: its values are not those of its plan either."""
    return json.dumps(sorted(names)).encode()


def overridden_in(content: bytes) -> frozenset[str]:
    """Names that a saved module holds.

    Raises:
        PlanMismatchError: They are no JSON list of names.
    """
    try:
        names = json.loads(content)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PlanMismatchError("What this module has overridden of its plan cannot be read.")
    return frozenset(names)


@once_for_each
def _mixed(plan: RefitPlan) -> frozenset[str]:
    kept = {leaf.fqn for leaf in plan.data.leaves if not leaf.persistent}
    found: set[str] = set()
    for row in plan.data.ledger if kept else ():
        mine = kept.intersection(row.sources)
        if 0 < len(mine) < len(row.sources):
            found |= mine
    return frozenset(found)


# MERGED partition: The stage ``partition``: a program cut into parts that match the engines.


def partition(
    context: Context,
    program: ExportedProgram,
    module: OpenedModule | None,
    backend: str,
    options: Mapping[str, Any],
    tools: Tools,
) -> Mapping[str, Any]:
    """One part for each engine.

    Raises:
        PlanMismatchError: The parts are not those of the module's engines.
        PluginError: No plugin can cut programs for this backend.
    """
    parts: Mapping[str, Any] | None = context.host.call(
        "refitkit_partition",
        program=program,
        module=module,
        backend=backend,
        options=options,
        config=context.config,
        tools=tools,
    )
    if parts is None:
        raise PluginError(f"No plugin cuts programs into parts for the backend {backend!r}.")
    engines = module.engines.keys() if module else parts.keys()
    problems = [Problem(name, "no part for this engine") for name in engines - parts.keys()]
    problems += [Problem(name, "no engine for this part") for name in parts.keys() - engines]
    if problems:
        raise PlanMismatchError(
            "The program is cut into other parts than those that were compiled.", problems=problems
        )
    return parts
