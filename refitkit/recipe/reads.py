"""Which entries of a source a plan reads, and which of them may disagree with one another.

This module hides how names relate to tensors: which leaves slots and guards depend on, which names
are tied to one tensor, and which leaves are views of others. ``Reads`` answers questions about one
plan and any source. The functions below it answer single questions: state slots, leaves that the
plan keeps, tied names, and entries that contradict their tie or view. Plans never change, so
results are cached for each plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refitkit.errors import Problem
from refitkit.model import CallRef, PinnedRef, SlotState, SourceRef
from refitkit.program.bits import same_bits
from refitkit.program.dtypes import are_alike, dtype_of
from refitkit.program.views import derived_value
from refitkit.protocols import KnowsTies
from refitkit.recipe.foreign import info_of
from refitkit.recipe.weak_cache import cached_per_object

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from refitkit.model import Leaf, LedgerRow, OpCall, PlanData, SlotKey
    from refitkit.protocols import Plan, WeightSource


class Reads:
    """The names that a plan reads from any source. Get it from ``reads_of``.

    Attributes:
        data: Data of the plan.
        leaves: Leaves of the program, by FQN.
        wanted: Dtype and shape by FQN, of each leaf whose dtype this torch has.
        of_slots: Names that slots are filled from, under all tied names. Includes all used leaves
            if ``wholly`` is True.
        needed: ``of_slots``, and all names of the leaves that guards depend on.
        known: ``needed``, and the names of all leaves.
        sources: Names that rows of the ledger list as sources.
        guarded: Names that guards depend on, as recipes spell them.
        wholly: Whether some slots are unmapped, so that they may depend on any used leaf.
        used: All names of the leaves that can change an output of the program.
        ties: Classes of tied names that contain a needed name.
        views: Whether the state_dict has entries that are views of other entries.
        demands: All names of each tensor that a source must have, by the tensor's first name.
    """

    def __init__(self, data: PlanData) -> None:
        """Index every row and leaf once.

        Args:
            data: Data of the plan.
        """
        self.data = data
        self.leaves = {leaf.fqn: leaf for leaf in data.leaves}
        # a plan may name dtypes that this version of torch lacks
        self.wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            leaf.fqn: (getattr(torch, leaf.dtype), leaf.shape)
            for leaf in data.leaves
            if hasattr(torch, leaf.dtype)
        }
        self._tie_by_name = {name: tie for tie in data.ties for name in tie}
        filled = {SlotState.RECIPE, SlotState.PINNED}
        self.of_slots = {n for row in data.ledger if row.state in filled for n in row.sources}
        self.guarded = sources_of_guards(data)
        self.needed = self.of_slots | self.names_of(self.guarded)
        self.wholly = any(row.state is SlotState.UNMAPPED for row in data.ledger)
        used = [leaf.fqn for leaf in data.leaves if leaf.used]
        self.used = self.names_of(used)
        self._used_if_unmapped = used if self.wholly else []
        if self.wholly:  # an unmapped slot may depend on any used leaf
            self.of_slots |= set(self._used_if_unmapped)
            self.needed |= self.of_slots
        self.known = self.leaves.keys() | self.needed
        self.sources = {name for row in data.ledger for name in row.sources}
        self.ties = [tie for tie in data.ties if self.needed & set(tie)]
        self.views = any(leaf.view is not None and leaf.persistent for leaf in data.leaves)
        self.demands = {first: self.names_of([first]) for first in self._required_names()}
        self._untied_demands = {first for first, names in self.demands.items() if len(names) == 1}
        self._tied_demands = [names for names in self.demands.values() if len(names) > 1]

    def names_of(self, names: Iterable[str]) -> set[str]:
        """All names of the tensors that have these names."""
        return {tied for name in names for tied in self._tie_by_name.get(name, (name,))}

    def lacking(self, names: Collection[str]) -> dict[str, list[str]]:
        """Tensors that a source lacks, each with the names of the slots that need it.

        Tensors are listed by their first name. Those that slots need come first, then those that
        guards need, then those that unmapped slots may need. Slots are in the ledger's order.

        Args:
            names: All names of the source.
        """
        # the usual case, in set operations: the loop over the ledger is for errors
        if self._untied_demands.issubset(names) and all(
            map(set(names).intersection, self._tied_demands)
        ):
            return {}
        given = set(names)
        # one of several tied names is enough
        missing = {first for first, tied in self.demands.items() if not given & tied}
        slots: dict[str, list[str]] = {first: [] for first in self.demands if first in missing}
        for row in self.data.ledger:
            if row.state is SlotState.RECIPE:
                for first in dict.fromkeys(map(self._first_name, row.sources)):
                    if first in missing:
                        slots[first].append(row.slot.name)
        return slots

    def fitting(self, source: WeightSource) -> tuple[int, int]:
        """Numbers of tensors that a source has in the program's dtype, and in a similar dtype.

        A similar dtype is one that a cast makes fit: floats for floats, integers for integers. The
        shape must be the program's. One of several tied names is enough. Reads headers only.
        """
        given, fit, similar = source.names(), 0, 0
        for names in self.demands.values():
            infos = [(name, info_of(source, name)) for name in names if name in given]
            dtypes = [
                (info.dtype, self.leaves[name].dtype)
                for name, info in infos
                if name in self.leaves
                and not info.unusable
                and info.shape == self.leaves[name].shape
            ]
            fit += any(found == wanted for found, wanted in dtypes)
            similar += any(are_alike(dtype_of(found), dtype_of(wanted)) for found, wanted in dtypes)
        return fit, similar

    def _required_names(self) -> Iterator[str]:
        """First names of the tensors that a source must have under one of their names."""
        recipes = (row for row in self.data.ledger if row.state is SlotState.RECIPE)
        of_recipes = (name for row in recipes for name in row.sources)
        names = [*of_recipes, *self.guarded, *self._used_if_unmapped]
        for first in dict.fromkeys(map(self._first_name, names)):
            leaf = self.leaves.get(first)
            # no state_dict holds the others, and the plan keeps their values
            if leaf is None or leaf.persistent:
                yield first

    def _first_name(self, name: str) -> str:
        """The first name of the tensor that has this name."""
        return self._tie_by_name.get(name, (name,))[0]


@cached_per_object
def reads_of(plan: Plan) -> Reads:
    """The names that a plan reads."""
    return Reads(plan.data)


def sources_of_guards(data: PlanData) -> tuple[str, ...]:
    """FQNs that the values of guards depend on, each once, as the recipe spells them."""
    names: dict[str, None] = {}
    # an explicit stack: chains of calls can exceed Python's recursion limit
    visited: set[int] = set()
    pending: list[object] = [guard.value for guard in data.guards]
    while pending:
        value = pending.pop()
        if isinstance(value, SourceRef):
            names[value.fqn] = None
        elif isinstance(value, CallRef) and value.call not in visited:
            visited.add(value.call)
            pending.extend(_arguments(data.calls[value.call]))
    return tuple(names)


def _arguments(call: OpCall) -> Iterator[object]:
    for argument in (*call.args, *call.kwargs.values()):
        yield from argument if isinstance(argument, tuple) else (argument,)


@cached_per_object
def state_slots(plan: Plan) -> tuple[SlotKey, ...]:
    """Keys of all slots that calls of a module write, such as KV caches and counters.

    Keys are in the ledger's order. A slot counts if the engine reports it as mutable, or if the
    program writes the leaf that the slot holds. Both are checked, because the engine of a target
    that refitkit did not compile may not report it.
    """
    written = frozenset(leaf.fqn for leaf in plan.data.leaves if leaf.mutated)
    return tuple(row.slot.key for row in plan.data.ledger if _is_state(row, written))


def _is_state(row: LedgerRow, written: frozenset[str]) -> bool:
    match row.value:
        case SourceRef(fqn=name) | PinnedRef(name=name):
            return row.slot.mutable or name in written
    return row.slot.mutable


@cached_per_object
def kept_leaves(plan: Plan) -> Mapping[str, Leaf]:
    """Leaves whose values the plan keeps, by FQN.

    No state_dict holds them: not under a tied name, and not as a view of a weight.
    """
    # a buffer that is tied to a weight comes with the weight
    weights = {leaf.fqn for leaf in plan.data.leaves if leaf.persistent}
    tied = {name for tie in plan.data.ties if not weights.isdisjoint(tie) for name in tie}
    return {leaf.fqn: leaf for leaf in plan.data.leaves if leaf.kept and leaf.fqn not in tied}


# -- ties and views ---------------------------------------------------------------------------


def twins_of(
    sources: Iterable[WeightSource], more: Iterable[Iterable[str]] = ()
) -> dict[str, tuple[str, ...]]:
    """All names of a tensor, by each of them. Names that are not tied are left out.

    Args:
        sources: Sources of one model. A tie that one of them reports counts for all.
        more: Further classes of tied names.
    """
    classes: dict[str, tuple[str, ...]] = {}
    reported = (tie for source in sources if isinstance(source, KnowsTies) for tie in source.ties())
    for tie in (*more, *reported):
        # classes of two sources can overlap: a shared name joins them
        names = dict.fromkeys(tied for name in tie for tied in classes.get(name, (name,)))
        classes |= dict.fromkeys(names, tuple(names))
    return classes


def name_in(names: Collection[str], name: str, twins: Mapping[str, tuple[str, ...]]) -> str | None:
    """The name under which ``names`` has a tensor: its own, or a tied one. None if it has none.

    Args:
        names: Names of a source.
        name: Name of the tensor.
        twins: Result of ``twins_of``.
    """
    if name in names:
        return name
    return next((twin for twin in twins.get(name, ()) if twin in names), None)


def broken_ties(
    ties: Iterable[Iterable[str]], names: Collection[str], source: WeightSource
) -> Iterator[Problem]:
    """A problem for each tied name whose value in a source differs from its tensor's first one.

    Args:
        ties: Classes of names that are one tensor.
        names: Usable entries of the source. Other entries are not read.
        source: The source.
    """
    for tie in ties:
        present = [name for name in tie if name in names]
        if len(present) < 2:  # noqa: PLR2004 - one name cannot contradict itself
            continue
        first = source.get(present[0])
        for other in present[1:]:
            if not _is_same_tensor(first, source.get(other)):
                yield Problem(
                    other,
                    "tie broken",
                    f"values other than those of {present[0]!r}",
                    "the same: the model has one weight for both names",
                )


def broken_views(
    leaves: Mapping[str, Leaf], names: Collection[str], source: WeightSource
) -> Iterator[Problem]:
    """A problem for each view whose entry in a source contradicts the entry that it is a view of.

    A view without the entry that it is a view of is a problem, too.

    Args:
        leaves: All leaves of the program, by FQN.
        names: Usable entries of the source. Other entries are not read.
        source: The source.
    """
    for leaf in leaves.values():
        if leaf.view is None or not leaf.persistent or leaf.fqn not in names:
            continue
        base = leaf.view.fqn
        if base not in names:
            wanted = f"together with {base!r}, which it is a view of"
            yield Problem(leaf.fqn, "given alone", wanted=wanted)
        elif not same_bits(
            derived_value(leaf, leaves, source.get, source.get), source.get(leaf.fqn)
        ):
            wanted = f"the values of {base!r}, which it is a view of"
            yield Problem(leaf.fqn, "view broken", "other values", wanted)


def _is_same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two entries hold one weight: the same memory, or equal bits."""
    # the usual case, and it saves a comparison of all elements
    if a.device == b.device and a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return same_bits(a, b)
