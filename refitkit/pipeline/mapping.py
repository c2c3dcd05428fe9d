"""Mapping: one value for every slot, from the first strategy that has one.

The module hides which strategy gives which slot its value, and when a mapping is complete enough to
commit. Read it in this order:

- ``map_slots`` runs the strategies and returns a ``SlotMapping``.
- ``require_all_slots`` and ``require_partial_slots`` refuse a mapping that leaves slots stale.
- ``overridden_by`` and its neighbours track tensors that the plan keeps and a source overrides.
- ``partition`` cuts a program into one part for each engine, before a plan exists.

Mapping computes no tensors: a ``SlotValue`` computes its tensor when an engine stages it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch

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
from refitkit.offered import owned, received, shown
from refitkit.pipeline.needs import (
    is_built_in,
    require_all_weights_mapped,
    require_proved_strategies,
)
from refitkit.program.bits import same_bits
from refitkit.program.dtypes import dtype_name
from refitkit.program.views import derived_value
from refitkit.protocols import (
    LeavesOut,
    Mapped,
    MapRequest,
    SlotValue,
    SteadyValues,
    SupportsPartial,
)
from refitkit.recipe import RefitPlan, unusable_reason
from refitkit.recipe.foreign import info_of
from refitkit.recipe.plan import STRATEGY, is_entry
from refitkit.recipe.reads import kept_leaves, reads_of, state_slots
from refitkit.recipe.weak_cache import cached_per_object

if TYPE_CHECKING:
    from collections import abc
    from collections.abc import Callable, Collection, Iterable

    from torch.export import ExportedProgram

    from refitkit.host import PluginOffer
    from refitkit.model import Leaf
    from refitkit.pipeline.context import Context
    from refitkit.protocols import (
        BindableProgram,
        MappingStrategy,
        OpenedModule,
        Plan,
        Tools,
        WeightSource,
    )


_HOOK = "refitkit_mapping_strategies"
_UNCHANGED = "unchanged: the slot already holds the value of its weights"
_KEPT = "kept: calls of the module write it, and the weights do not contain it"
_HINT_NO_VALUE = (
    "Pass partial=True to leave these slots as they are, install a plugin that maps them, or leave "
    "Config.strategies empty, so that all strategies are tried."
)
_HINT_PARTIAL = "Pass these weights too, or leave out all weights of these slots."
_HINT_GUARDS = (
    "The plan's recipes are valid only while these values are the same as when it was made. Pass "
    "the weights as a program, torch.export.export(model, inputs): the strategy 'rebuild' reads "
    "slots off it. Or plan again from that program: refitkit.plan(program, target=...)."
)


# -- running the strategies ---------------------------------------------------------------------


def map_slots(
    context: Context,
    plan: Plan,
    module: OpenedModule,
    source: WeightSource,
    program: BindableProgram | None,
    *,
    unchanged: frozenset[tuple[str, str]] = frozenset(),
) -> SlotMapping:
    """Values for slots, from the strategies in their order.

    Each strategy is asked for the slots that have no value yet and are not unchanged. State that
    the source does not contain is kept; see ``SlotMapping.keep_state``.

    Args:
        context: Plugins and settings.
        plan: The plan, which matches the module.
        module: The opened target.
        source: The new weights.
        program: The kept program without weights; None if there is none.
        unchanged: Slots that need no value, by ``(engine, slot)``.

    Raises:
        ConfigError: ``Config.strategies`` has a name that no plugin offers.
        PluginError: A strategy failed, or strategies of several plugins with one priority have a
            value for the same slot; names the strategies and lists the slots.
        SourceError: The source's metadata cannot be read.
    """
    mapping = SlotMapping(plan, unchanged=unchanged)
    tools = context.tools("refit", "map")

    def ask(offer: PluginOffer, wanted: tuple[LedgerRow, ...]) -> Mapped:
        strategy: MappingStrategy = offer.item
        request = MapRequest(plan, module, source, wanted, program, tools)
        doing = f"The strategy {strategy.name!r} cannot map slots"
        who = owned(_HOOK, strategy.name, offer.plugin)
        with raised_as(PluginError, f"{who} failed", doing=doing):
            answer = strategy.map(request)
        with raised_as(PluginError, f"{who} returned an invalid result", doing=doing):
            _check_answer(who, received(answer, Mapped, who), wanted)
            if is_built_in(context.host, offer.plugin):
                return answer
            return Mapped(_watched(who, answer.values), answer.declined)

    for rank in _ranked_strategies(context):
        _ask_rank(mapping, rank, ask)
    # After all strategies, because any of them may give a value that would reset the state.
    if state_slots(plan):
        with raised_as(SourceError, f"{source.description} cannot be read"):
            mapping.keep_state(module, source)
    return mapping


def _ranked_strategies(context: Context) -> list[list[PluginOffer]]:
    """Strategies by rank, in the order in which they are asked. A rank has one priority."""
    offered, wanted = context.host.offers(_HOOK), context.config.strategies
    if not wanted:
        ranks: dict[int, list[PluginOffer]] = {}
        for offer in offered.values():
            ranks.setdefault(offer.item.priority, []).append(offer)
        return [ranks[priority] for priority in sorted(ranks)]
    unknown = [Problem(n, "no such strategy") for n in wanted if n not in offered]
    if unknown:
        raise ConfigError(
            "Config.strategies names strategies that no plugin offers.",
            problems=unknown,
            hint=f"Plugins offer: {', '.join(sorted(offered))}.",
        )
    return [[offered[name]] for name in wanted]


def _ask_rank(
    mapping: SlotMapping,
    rank: list[PluginOffer],
    ask: Callable[[PluginOffer, tuple[LedgerRow, ...]], Mapped],
) -> None:
    """Ask the strategies of one priority.

    Raises:
        PluginError: Two plugins have a value for one slot; lists the slots.
    """
    taken: dict[tuple[str, str], tuple[LedgerRow, PluginOffer]] = {}
    clashes: list[Problem] = []
    for offer in rank:
        strategy: MappingStrategy = offer.item
        # One plugin orders its own strategies by listing them. Nothing orders two plugins: each is
        # asked for the other's slots too, so that a clash is reported and no value wins by chance.
        of_others = [row for row, first in taken.values() if first.plugin != offer.plugin]
        wanted = (*mapping.rows_without_value(), *of_others)
        if not wanted:
            continue
        mapping.asked.add((offer.plugin, strategy.name))
        answer = ask(offer, wanted)
        clashes += [_clash(*taken[key], offer) for key in answer.values if key in taken]
        if offer is not rank[-1]:  # nothing can clash with the last one
            taken |= {row.slot.key: (row, offer) for row in wanted if row.slot.key in answer.values}
        mapping.values.update(answer.values)
        for key, reason in answer.declined.items():
            mapping.reasons.setdefault(key, []).append(f"{strategy.name}: {reason}")
    if clashes:
        names = ", ".join(repr(offer.item.name) for offer in rank)
        raise PluginError(
            "Strategies of several plugins have a value for the same slots, and the same priority.",
            problems=clashes,
            hint=f"List {names} in Config.strategies in the wanted order, with all other "
            "strategies that you need; or switch one of the plugins off: --no-plugin NAME.",
        )


def _clash(row: LedgerRow, first: PluginOffer, second: PluginOffer) -> Problem:
    offers = " and ".join(f"{one.item.name!r} of {one.plugin!r}" for one in (first, second))
    return Problem(f"{row.slot.engine}/{row.slot.name}", "claimed twice", offers)


def _check_answer(who: str, answer: Mapped, wanted: tuple[LedgerRow, ...]) -> None:
    """Raise PluginError if a result has wrong types or slots."""
    for value in answer.values.values():
        received(value, SlotValue, who)
        if not callable(value.load):
            raise PluginError(f"{who} gave a value whose load is {shown(value.load)}, no function.")
    if not isinstance(answer.declined, Mapping):
        raise PluginError(f"{who} declined slots by {shown(answer.declined)}, not by a dict.")
    keys = {row.slot.key: row.slot for row in wanted}
    odd = {key: value for key, value in answer.values.items() if value.slot is not keys.get(key)}
    # Reports use these names after the commit, where a wrong type could not be refused any more.
    kinds = {type(text) for value in answer.values.values() for text in value.sources}
    kinds |= {type(value.strategy) for value in answer.values.values()}
    if not all(issubclass(kind, str) for kind in kinds):
        raise PluginError(
            f"{who} returned values whose strategy or sources are not strings.",
            hint="SlotValue(slot, strategy, sources, load): a string, and a tuple of strings.",
        )
    for value in answer.values.values():
        _check_formula(who, value.formula)
    foreign = {key for key in odd if key not in keys}
    mixed = {key for key, value in odd.items() if value.slot.key != key}
    if foreign or mixed:
        names = ", ".join("/".join(key) for key in sorted(foreign | mixed))
        what = "for slots that were not requested" if foreign else "under keys of other slots"
        raise PluginError(f"{who} returned values {what}: {names}.")


def _check_formula(who: str, formula: Any) -> None:
    """Raise PluginError if a formula cannot be compared."""
    try:
        hash(formula)
    except TypeError as exc:
        hint = "Use a tuple of numbers and strings."
        raise PluginError(f"{who} gave a formula that is not hashable: {exc}.", hint=hint) from exc


def _watched(who: str, values: Mapping[SlotKey, SlotValue]) -> dict[SlotKey, SlotValue]:
    """Values of a plugin that say whose fault it is if they cannot be loaded, or do not fit."""
    return {key: value._replace(load=partial(_loaded, who, value)) for key, value in values.items()}


def _loaded(who: str, value: SlotValue) -> torch.Tensor:
    """The tensor of a plugin's value."""
    slot = value.slot
    where = f"for the slot {slot.engine}/{slot.name}"
    with raised_as(PluginError, f"{who} failed {where}", doing="New values cannot be staged"):
        found = received(value.load(), torch.Tensor, f"{who} {where}")
    kind = dtype_name(found.dtype)
    if kind != slot.dtype or found.numel() != slot.count:
        raise PluginError(
            f"{who} gave a tensor of {found.numel()} elements of {kind} {where}, which has "
            f"{slot.count} of {slot.dtype}."
        )
    return found


# -- the result ---------------------------------------------------------------------------------


@dataclass
class SlotMapping:
    """The values that the strategies returned.

    Attributes:
        plan: The plan that was followed.
        values: Values by ``(engine, slot)``.
        reasons: For each slot, the reasons of the strategies that declined it.
        unchanged: Slots that already hold the source's value; no strategy is asked for them.
        kept: State that keeps its live value, with the values that would reset it.
        reset: State whose new value is none of the weights.
        asked: Plugin and name of each strategy that was asked.
    """

    plan: Plan
    values: dict[tuple[str, str], SlotValue] = field(default_factory=dict)
    reasons: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    unchanged: frozenset[tuple[str, str]] = frozenset()
    kept: dict[tuple[str, str], SlotValue] = field(default_factory=dict)
    reset: frozenset[tuple[str, str]] = frozenset()
    asked: set[tuple[str, str]] = field(default_factory=set)

    def rows_without_value(self) -> list[LedgerRow]:
        """Rows of the plan that need a value and have none, in the ledger's order.

        A frozen slot without a value in the plan needs none, unless a strategy gave a reason why
        its literal is no longer valid.
        """
        ledger = self.plan.data.ledger
        # The usual case once all strategies ran, and the ledger may have thousands of rows.
        if len(self.values) == len(ledger):
            return []
        return [row for row in ledger if self._needs_value(row)]

    def _needs_value(self, row: LedgerRow) -> bool:
        key = row.slot.key
        frozen = row.state is SlotState.FROZEN and row.value is None and key not in self.reasons
        settled = key in self.values or key in self.unchanged or key in self.kept
        return not settled and not frozen

    def keep_state(self, module: OpenedModule, source: WeightSource) -> None:
        """Keep the live value of state that the source does not contain, as load_state_dict does.

        A program contains the state that it was exported with, but a state_dict may not hold it.
        That value stays in ``kept``, for ``reset_state``. An engine without ``SupportsPartial``
        takes all its weights at once, so its state is always reset.

        Args:
            module: The opened target.
            source: The new weights; only metadata is read.
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
        """Write the values of ``kept`` after all, so that the refit resets this state."""
        self.reset |= self.kept.keys()
        self.values.update(self.kept)
        self.kept = {}

    def settle(self, keys: frozenset[SlotKey]) -> None:
        """Write these slots no more: they already hold their values."""
        self.values = {key: value for key, value in self.values.items() if key not in keys}
        self.unchanged |= keys

    def drop_plan_values(self) -> None:
        """Drop values that come from the plan and not from the source.

        A partial refit writes only slots that the source has weights for.
        """
        self.values = {key: value for key, value in self.values.items() if not _is_from_plan(value)}

    def broken_guards(self, source: WeightSource) -> list[Problem]:
        """Guards that do not hold for a source, so that the plan's recipes are not valid for it."""
        plan = self.plan
        if isinstance(plan, RefitPlan) and plan.data.guards:
            return list(plan.broken_guards(source))
        return []

    def require_complete(self, given: abc.Collection[str] | None = None) -> None:
        """Raise unless every weight reaches a slot, from the strategy that the plan's proof used.

        Args:
            given: FQNs of the weights of a partial refit; None if all weights are refitted.

        Raises:
            UnmappedSlotError: Weights reach no slot; lists them.
            PlanMismatchError: Slots would get the value of another strategy than in the proof;
                lists them.
        """
        require_all_weights_mapped(self.plan, self.values, self.unchanged, given)
        strategies = {key: value.strategy for key, value in self.values.items()}
        require_proved_strategies(self.plan.data, strategies)

    @cached_property
    def by_engine(self) -> dict[str, SteadyValues]:
        """All values by engine, asked for once all are there."""
        return grouped(self.values)

    @cached_property
    def _entries(self) -> dict[str, frozenset[str]]:
        """Names of source entries that are values of slots as they are, by engine."""
        found: defaultdict[str, set[str]] = defaultdict(set)
        for (engine, _), value in self.values.items():
            if is_entry(value):
                found[engine].add(value.sources[0])  # an entry has exactly one source
        return {engine: frozenset(names) for engine, names in found.items()}

    def entries_of(self, engines: abc.Set[str]) -> frozenset[str]:
        """Names of source entries that are values of these engines' slots, as first mapped."""
        return frozenset[str]().union(*(self._entries.get(name, ()) for name in engines))

    @cached_property
    def summary(self) -> MappingSummary:
        """The facts for the report, asked for once all values are there. They hold no tensors."""
        values = self.values.items()
        return MappingSummary(
            self.plan.data.ledger,
            {key: (value.strategy, tuple(value.sources)) for key, value in values},
            self.reasons,
            self.unchanged,
            tuple((key, self._outcome(key)) for key in state_slots(self.plan)),
        )

    def _outcome(self, key: SlotKey) -> Literal["kept", "set", "reset"]:
        """The effect of the refit on one slot of the state."""
        if key in self.reset:
            return "reset"
        return "set" if key in self.values else "kept"


def grouped(values: Mapping[SlotKey, SlotValue]) -> dict[str, SteadyValues]:
    """Values by engine."""
    found: dict[str, list[SlotValue]] = {}
    for (engine, _), value in values.items():
        found.setdefault(engine, []).append(value)
    return {engine: SteadyValues(some) for engine, some in found.items()}


def _is_contained(value: SlotValue, names: Collection[str], source: WeightSource) -> bool:
    """Whether a value is one of the weights: a state_dict of the source would hold it."""
    if not value.sources:
        return not _is_from_plan(value)
    return any(name not in names or info_of(source, name).persistent for name in value.sources)


def _is_from_plan(value: SlotValue) -> bool:
    """Whether a value is one that the plan keeps, or is computed from kept values alone."""
    return value.pinned or (value.strategy == STRATEGY and not value.sources)


@dataclass(frozen=True)
class MappingSummary:
    """The strategy of each slot, without the values.

    Attributes:
        ledger: All rows of the plan.
        slots: Strategy and source FQNs of the slots that have a value.
        reasons: ``SlotMapping.reasons``.
        unchanged: ``SlotMapping.unchanged``.
        state: Outcome for each slot that calls of the module write.
    """

    ledger: tuple[LedgerRow, ...]
    slots: abc.Mapping[SlotKey, tuple[str, tuple[str, ...]]]
    reasons: abc.Mapping[SlotKey, list[str]]
    unchanged: frozenset[SlotKey]
    state: tuple[tuple[SlotKey, Literal["kept", "set", "reset"]], ...] = ()

    # works in a frozen dataclass: it writes to ``__dict__``, not through ``__setattr__``
    @cached_property
    def nbytes(self) -> int:
        """Bytes of the slots that have a value."""
        return sum(row.slot.nbytes for row in self.ledger if row.slot.key in self.slots)

    @cached_property
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
        reason = "; ".join(self.reasons[key]) if key in self.reasons else ""
        if key in kept:
            reason = _KEPT
        elif key in self.unchanged:
            reason = _UNCHANGED
        return _report_row(*key, row.state, strategy, sources, reason or row.reason)


@lru_cache(maxsize=1 << 14)  # most rows are equal in all refits of one module
def _report_row(
    engine: str, slot: str, state: SlotState, strategy: str, sources: tuple[str, ...], reason: str
) -> ReportRow:
    return ReportRow(
        engine=engine, slot=slot, state=state, strategy=strategy, sources=sources, reason=reason
    )


# -- refusing incomplete mappings ---------------------------------------------------------------


def require_all_slots(mapping: SlotMapping, source: WeightSource) -> None:
    """Raise unless all slots that need a value have one. Called after all checks passed.

    Args:
        mapping: The values.
        source: The new weights.

    Raises:
        UnmappedSlotError: Slots have no value; lists the broken guards of the plan, then the slots
            with the reasons of each strategy.
    """
    lacking = mapping.rows_without_value()
    if lacking:
        broken = mapping.broken_guards(source)
        raise UnmappedSlotError(
            f"No strategy has a value for some slots, with {source.description}.",
            problems=[*broken, *(_without_value(mapping, row) for row in lacking)],
            hint=_HINT_GUARDS if broken else _HINT_NO_VALUE,
        )


def require_partial_slots(
    mapping: SlotMapping, source: WeightSource, overridden: frozenset[str] = frozenset()
) -> None:
    """Raise if a partial refit would silently leave out some of the given weights.

    Args:
        mapping: The values.
        source: The given weights.
        overridden: FQNs of tensors that the plan keeps and earlier refits overrode. A slot that
            combines one of them with weights needs it again: the plan's value is not live.

    Raises:
        UnmappedSlotError: Slots follow from given weights and get no value; lists these slots and
            the weights that they need too. Or no written slot follows from some given weights,
            and slots of unknown origin may; lists both.
    """
    given = set(source.names())
    lacking = [row for row in mapping.rows_without_value() if not given.isdisjoint(row.sources)]
    problems = [_incomplete(mapping, row, source) for row in lacking]
    for row in mapping.plan.data.ledger if overridden else ():
        value = mapping.values.get(row.slot.key)
        missing = [name for name in row.sources if name in overridden - given]
        # Other strategies do not combine weights with the plan's values.
        if value is not None and value.strategy == STRATEGY and missing:
            problems.append(_needs_more(row, value.sources, missing))
    if problems:
        broken = mapping.broken_guards(source)
        raise UnmappedSlotError(
            f"Some slots follow from more weights than {source.description} has.",
            problems=[*broken, *problems],
            hint=_HINT_GUARDS if broken else _HINT_PARTIAL,
        )
    unknown = [row for row in mapping.rows_without_value() if row.state is SlotState.UNMAPPED]
    if unknown:
        _require_known_slots(mapping, source, unknown)


def _require_known_slots(
    mapping: SlotMapping, source: WeightSource, unknown: list[LedgerRow]
) -> None:
    """Raise if given weights may belong to slots of unknown origin."""
    reached = {name for value in mapping.values.values() for name in value.sources}
    unchanged = [row for row in mapping.plan.data.ledger if row.slot.key in mapping.unchanged]
    reached.update(name for row in unchanged for name in row.sources)
    reads = reads_of(mapping.plan)
    reached = reads.names_of(reached)  # a tied weight may be given under another name
    # A value without sources is computed from the program as a whole, so it reaches all weights.
    whole = any(not value.sources for value in mapping.values.values())
    lost = [] if whole else [name for name in source.names() if name in reads.used - reached]
    if lost or not (mapping.values or unchanged):
        problems = [Problem(name, "no written slot follows from it") for name in lost]
        problems += [
            Problem(f"{row.slot.engine}/{row.slot.name}", "may follow from it") for row in unknown
        ]
        raise UnmappedSlotError(
            f"Some weights of {source.description} may belong to slots of unknown origin.",
            problems=problems,
            hint="Pass all weights, without partial=True.",
        )


def _without_value(mapping: SlotMapping, row: LedgerRow) -> Problem:
    reasons = "; ".join(mapping.reasons.get(row.slot.key, [row.reason]))
    return Problem(f"{row.slot.engine}/{row.slot.name}", str(row.state), hint=reasons)


def _incomplete(mapping: SlotMapping, row: LedgerRow, source: WeightSource) -> Problem:
    """A problem for a slot without a value although some of its weights are given."""
    lacking = mapping.plan.lacking(row, source) if isinstance(mapping.plan, RefitPlan) else ()
    if not lacking:
        return _without_value(mapping, row)
    names = source.names()
    return _needs_more(row, [name for name in row.sources if name in names], lacking)


def _needs_more(row: LedgerRow, given: Iterable[str], lacking: Iterable[str]) -> Problem:
    return Problem(
        f"{row.slot.engine}/{row.slot.name}",
        "follows from more weights",
        ", ".join(given),
        f"{', '.join(lacking)} with it",
    )


# -- overridden values of the plan ---------------------------------------------------------------
#
# The plan keeps values of tensors that no state_dict holds (a mask, a constant), for sources that
# lack them. A slot may combine such a tensor with weights. If a full refit gave the tensor another
# value, a later partial refit with weights alone would combine them with the plan's value, which is
# not the live one. So the module's state names the tensors that were overridden.


def overridden_by(plan: RefitPlan, source: WeightSource) -> frozenset[str]:
    """FQNs of kept tensors that slots combine with weights and that differ in a source.

    Args:
        plan: The plan.
        source: The new weights; the kept tensors among them are read.

    Raises:
        SourceError: An entry cannot be read.
    """
    names, leaves = source.names(), {leaf.fqn: leaf for leaf in plan.data.leaves}
    return frozenset(
        name
        for name in combined_with_weights(plan)
        if name in names
        and name in plan.data.pinned
        and not same_bits(
            _own_elements(leaves, name, plan.pinned(name)),
            _own_elements(leaves, name, source.get(name)),
        )
    )


def _own_elements(leaves: Mapping[str, Leaf], name: str, value: torch.Tensor) -> torch.Tensor:
    """A value with zeros where its elements are views of weights, which change anyway."""
    leaf = leaves.get(name)
    if leaf is None or not leaf.parts:
        return value
    zeros = {part.fqn: value.new_zeros(leaves[part.fqn].shape) for part in leaf.parts}
    return derived_value(leaf, leaves, zeros.__getitem__, lambda _: value)


@cached_per_object
def combined_with_weights(plan: RefitPlan) -> frozenset[str]:
    """FQNs of tensors that no state_dict holds and that a slot combines with weights."""
    kept = {leaf.fqn for leaf in plan.data.leaves if not leaf.persistent}
    found: set[str] = set()
    for row in plan.data.ledger if kept else ():
        mine = kept.intersection(row.sources)
        if 0 < len(mine) < len(row.sources):
            found |= mine
    return frozenset(found)


def still_overridden(
    before: frozenset[str], plan: RefitPlan, source: WeightSource
) -> frozenset[str]:
    """FQNs of tensors that are overridden after a partial refit.

    Args:
        before: FQNs that were overridden before the refit.
        plan: The plan.
        source: The given weights, which replace earlier overrides of the same names.

    Raises:
        SourceError: An entry cannot be read.
    """
    return before.difference(source.names()) | overridden_by(plan, source)


def find_left_out(
    plan: RefitPlan, source: WeightSource, wrappers: Collection[str]
) -> tuple[str, ...]:
    """FQNs of kept tensors whose value in the user's model differs from the plan's value.

    Such a source has these tensors and does not offer them, because no state_dict holds them
    (``LeavesOut``). The same value in another dtype does not differ. State that calls write and
    views of weights are not compared.

    Args:
        plan: The plan.
        source: The weights, before any transform.
        wrappers: Parts of names that wrappers of a module add (``Config.rules.wrappers``).
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
        # Wrappers such as DataParallel add parts to names. The exported program lacks these parts.
        unwrapped = ".".join(part for part in given.split(".") if part not in wrappers)
        name = given if given in leaves else unwrapped
        if name in leaves and name in plan.data.pinned and not _is_planned(plan, name, value):
            found[name] = None
    return tuple(found)


def _is_planned(plan: RefitPlan, name: str, value: torch.Tensor) -> bool:
    # model.half() casts constants along with the weights. Such a constant did not change.
    return not unusable_reason(value) and same_bits(plan.pinned(name).to(value.dtype), value)


def encode_overridden(names: frozenset[str]) -> bytes:
    """Overridden FQNs as a saved module stores them: a sorted JSON list in UTF-8."""
    return json.dumps(sorted(names)).encode()


def decode_overridden(content: bytes) -> frozenset[str]:
    """Overridden FQNs of a saved module.

    Args:
        content: The result of ``encode_overridden``.

    Raises:
        PlanMismatchError: The content is not a JSON list of names.
    """
    try:
        names = json.loads(content)
    except (ValueError, RecursionError):  # deeply nested JSON exceeds the recursion limit
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PlanMismatchError("The module's list of overridden tensors cannot be read.")
    return frozenset(names)


# -- partition: before there is a plan -----------------------------------------------------------


def partition(
    context: Context,
    program: ExportedProgram,
    module: OpenedModule | None,
    backend: str,
    options: Mapping[str, Any],
    tools: Tools,
) -> tuple[str, Mapping[str, Any]]:
    """The plugin that cuts a program, and parts by engine name, as ``Backend.draft`` expects them.

    Args:
        context: Plugins and settings.
        program: The program.
        module: The opened target; None when planning offline.
        backend: Name of the backend.
        options: Options of the backend.
        tools: Objects that the pipeline lends to plugins.

    Raises:
        PlanMismatchError: The parts do not match the module's engines; lists the differences.
        PluginError: No plugin can cut programs for this backend.
    """
    parts: Mapping[str, Any] | None
    plugin, parts = context.host.first(
        "refitkit_partition",
        Mapping,
        program=program,
        module=module,
        backend=backend,
        options=options,
        config=context.config,
        tools=tools,
    )
    if parts is None:
        raise PluginError(f"No plugin cuts programs into parts for the backend {backend!r}.")
    # When planning offline, the parts decide which engines there will be.
    engines = module.engines.keys() if module else parts.keys()
    problems = [Problem(name, "no part for this engine") for name in engines - parts.keys()]
    problems += [Problem(name, "no engine for this part") for name in parts.keys() - engines]
    if problems:
        raise PlanMismatchError(
            "The program is cut into other parts than those that were compiled.", problems=problems
        )
    return f"the plugin {plugin!r} (refitkit_partition)", parts
