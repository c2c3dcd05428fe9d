"""Turn a recording into recipes: a ledger row for each slot, and guards.

A recording knows the op and the operands of every value. This module follows each slot's value back
to the leaves (:mod:`refitkit.recipe.origins`), writes the calls (:mod:`refitkit.recipe.writer`),
and turns host reads into guards. It then computes each recipe with the recorded weights and drops
recipes that return other bits than the slot has.

Read :func:`write` first: it calls the rest of the module from top to bottom.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import PlanMismatchError
from refitkit.model import (
    CallRef,
    Fingerprint,
    Guard,
    LedgerRow,
    PinnedRef,
    PinnedTensor,
    PlanData,
    SlotState,
    SourceRef,
)
from refitkit.program.bits import same_bits
from refitkit.program.dtypes import dtype_name, dtype_of
from refitkit.recipe.ops import calls_below, operands_of
from refitkit.recipe.origins import Lineage, UnwritableError, unseen_literals
from refitkit.recipe.plan import RefitPlan
from refitkit.recipe.sources import TensorMap
from refitkit.recipe.writer import Draft, Writer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from refitkit.model import Leaf, OpCall, Slot, Value
    from refitkit.protocols import SlotValue
    from refitkit.recipe.origins import HostRead, Literal, Origin
    from refitkit.recipe.tape import Tape


_SEEN = "it depends on no parameter or buffer"
_UNSEEN = (
    "it was made outside of torch, and refitkit did not see of what: if a weight is in it, a refit "
    "leaves it as it is"
)
_UNSEEN_PART = (
    "its recipe has numbers that were made outside of torch, and refitkit did not see of what"
)
_CHANGED = (
    "its recipe returns another value than the slot holds: the value was changed without an op"
)


@dataclass(frozen=True)
class Recorded:
    """Recipes of all slots.

    Attributes:
        rows: One ledger row for each slot, in the order of the slots.
        calls: Calls that the recipes and guards refer to.
        guards: Values that must stay the same for the recipes to be valid.
        literals: Tensors that the plan has to store, by name. Leaves outside the state_dict are
            not among them.
    """

    rows: tuple[LedgerRow, ...]
    calls: tuple[OpCall, ...] = ()
    guards: tuple[Guard, ...] = ()
    literals: Mapping[str, torch.Tensor] = field(default_factory=dict)


def write(
    tape: Tape,
    slots: Iterable[tuple[Slot, Origin, torch.Tensor]],
    leaves: Sequence[Leaf],
    ties: Sequence[Sequence[str]],
    tensors: Mapping[str, torch.Tensor],
) -> Recorded:
    """Return recipes for slots.

    Args:
        tape: Recording that has ended.
        slots: Each slot with the origin of its value, and the value.
        leaves: All leaves of the program.
        ties: Groups of FQNs that name one tensor.
        tensors: Recorded values of the leaves, by FQN. Each recipe must return the slot's value
            when it is computed from them.
    """
    slots = tuple(slots)
    ledger = _LedgerWriter(
        {leaf.fqn: leaf for leaf in leaves}, ties, WeightMatcher(leaves, tensors)
    )
    # Guards come first: rows depend on whether all of them can be written, and on which weights
    # they check.
    guards, failure = ledger.guards(tape.host_reads)
    recorded = ledger.recorded(
        [ledger.row(slot, origin, value, failure) for slot, origin, value in slots], guards
    )
    values = {slot.key: value for slot, _, value in slots}
    return without_unused(_without_mismatches(recorded, leaves, tensors, values))


class _LedgerWriter:
    """Writes the ledger rows and the guards of one recording."""

    def __init__(
        self,
        leaves: Mapping[str, Leaf],
        ties: Sequence[Sequence[str]],
        weights: WeightMatcher,
    ) -> None:
        self._leaves, self._weights = leaves, weights
        self._lineage = Lineage()
        self._draft = Draft(leaves, ties)
        self._writer = Writer(leaves, self._lineage, self._draft)
        self._guarded: set[str] = set()

    def guards(self, reads: Iterable[HostRead]) -> tuple[list[Guard], str]:
        """Return guards for host reads, and the reason for failure if one cannot be guarded.

        The reason is empty on success. No recipe is valid after a failure, because a value that
        decided what the engines are cannot be checked.
        """
        guards: dict[Value, Guard] = {}
        for read in reads:
            try:
                if self._lineage.leaves_of(read.origin):
                    value = self._writer.value(read.origin)
                    guards.setdefault(value, _guard(value, read))
                    self._guarded.update(self._draft.sources(value))
            except UnwritableError as exc:
                return [], f"no guard can be written for a value that was {read.reason}: {exc}"
        return list(guards.values()), ""

    def row(self, slot: Slot, origin: Origin, value: torch.Tensor, failure: str) -> LedgerRow:
        """Return the ledger row of one slot.

        Args:
            slot: Slot.
            origin: Origin of the slot's value.
            value: Value of the slot.
            failure: Why no recipe is valid; empty if recipes are valid.
        """
        if failure:
            return LedgerRow(slot=slot, state=SlotState.UNMAPPED, reason=failure)
        try:
            if not self._lineage.leaves_of(origin):
                return self._frozen_row(slot, origin, value)
            computed = self._slot_value(self._writer.value(origin), slot)
        except UnwritableError as exc:
            return LedgerRow(slot=slot, state=SlotState.UNMAPPED, reason=str(exc))
        return self._computed_row(slot, origin, computed)

    def _slot_value(self, value: Value, slot: Slot) -> Value:
        """Return a value that fits a slot, without reshapes at its end: engines read flat memory.

        Raises:
            UnwritableError: The dtype or the number of elements is not the slot's.
        """
        metadata = self._draft.metadata(value)
        count = torch.Size(metadata.shape).numel()
        if (metadata.dtype, count) != (slot.dtype, slot.count):
            raise UnwritableError(
                f"the slot has {slot.count} elements of {slot.dtype}, but the recorded value has "
                f"{count} of {metadata.dtype}"
            )
        return self._draft.before_reshapes(value)

    def _computed_row(self, slot: Slot, origin: Origin, value: Value) -> LedgerRow:
        sources = self._draft.sources(value)
        if isinstance(value, SourceRef) and not self._leaves[value.fqn].persistent:
            return LedgerRow(
                slot=slot,
                state=SlotState.PINNED,
                value=PinnedRef(name=value.fqn),
                sources=sources,
                reason="no state_dict contains it, so the plan stores its value",
            )
        unseen = bool(self._unseen(origin))
        return LedgerRow(
            slot=slot,
            state=SlotState.RECIPE,
            value=value,
            sources=sources,
            reason=_UNSEEN_PART if unseen else "",
            unseen=unseen,
        )

    def _unseen(self, origin: Origin) -> list[Literal]:
        """Return the literals that a value is computed from and that may hold an unseen weight."""
        # If a weight is guarded, the recording saw how it was read, and the guard checks that.
        return [
            literal
            for literal in unseen_literals(origin)
            if self._weights.match(literal.value) not in self._guarded
        ]

    def _frozen_row(self, slot: Slot, origin: Origin, value: torch.Tensor) -> LedgerRow:
        """Return the row of a slot that depends on no leaf.

        Args:
            slot: Slot.
            origin: Origin of the value.
            value: Value of the slot.

        Raises:
            UnwritableError: The value was not seen and contains the values of a weight.
        """
        unseen = self._unseen(origin)
        for literal in unseen:
            if fqn := self._weights.match(literal.value):
                raise UnwritableError(
                    f"the slot contains the values of {fqn!r}, but no recorded op connects them"
                )
        kept = self._draft.pin(value if slot.shape is None else value.reshape(slot.shape))
        return LedgerRow(
            slot=slot,
            state=SlotState.FROZEN,
            value=kept,
            reason=_UNSEEN if unseen else _SEEN,
            unseen=bool(unseen),
        )

    def recorded(self, rows: Iterable[LedgerRow], guards: Iterable[Guard]) -> Recorded:
        """Return rows and guards with all calls and literals that were written."""
        draft = self._draft
        return Recorded(tuple(rows), tuple(draft.calls), tuple(guards), draft.literals)


def _guard(value: Value, read: HostRead) -> Guard:
    return Guard(
        value=value,
        sha256=read.sha256,
        dtype=read.metadata.dtype,
        shape=read.metadata.shape,
        shown=read.shown,
        reason=read.reason,
    )


# -- literals with the values of a weight -----------------------------------------------------


class WeightMatcher:
    """Finds the weight whose values a literal contains.

    Code can read a weight unseen: through a torch method that it looked up before the recording, or
    in a C library. The tensor that it creates from the values looks like a literal of a converter.
    """

    def __init__(self, leaves: Sequence[Leaf], tensors: Mapping[str, torch.Tensor]) -> None:
        """Index the floating-point weights by number of elements.

        Args:
            leaves: All leaves of the program.
            tensors: Values of the leaves, by FQN.
        """
        self._tensors = tensors
        self._by_count: dict[int, list[str]] = defaultdict(list)
        for leaf in leaves:
            if leaf.persistent and dtype_of(leaf.dtype).is_floating_point:
                self._by_count[prod(leaf.shape)].append(leaf.fqn)

    def match(self, literal: torch.Tensor) -> str:
        """Return the FQN of a weight with the values of a literal; empty if there is none.

        Ignores the order and the precision of the values. A literal with one distinct value, such
        as zeros, matches no weight.
        """
        names = self._by_count.get(literal.numel())
        if not names or not literal.is_floating_point():
            return ""
        # Sorting makes the comparison independent of transposes and other permutations.
        wanted = _sorted(literal, literal.dtype)
        if wanted[0] == wanted[-1]:
            return ""
        for fqn in names:
            if torch.equal(_sorted(self._tensors[fqn], literal.dtype), wanted):
                return fqn
        return ""


def _sorted(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values in ascending order, flat, as float64 on the CPU, rounded to a dtype."""
    ordered: torch.Tensor = value.detach().cpu().to(dtype).double().reshape(-1).sort().values
    return ordered


# -- trial of the recipes ---------------------------------------------------------------------
#
# A C library that knows the address of a tensor can change it without an op. The recording cannot
# see this, but the recipe then returns another value than the slot has.

_COMPUTED = {SlotState.RECIPE, SlotState.PINNED}


def _without_mismatches(
    recorded: Recorded,
    leaves: Sequence[Leaf],
    tensors: Mapping[str, torch.Tensor],
    values: Mapping[tuple[str, str], torch.Tensor],
) -> Recorded:
    """Return recipes in which slots are unmapped if their recipe does not return their value."""
    # A plan stores leaves with parts, for the elements that no part covers.
    stored = {leaf.fqn: tensors[leaf.fqn] for leaf in leaves if leaf.parts} | dict(
        recorded.literals
    )
    wrong = set(find_mismatches(recorded.rows, recorded.calls, leaves, tensors, stored, values))
    rows = (
        LedgerRow(slot=row.slot, state=SlotState.UNMAPPED, reason=_CHANGED)
        if row.slot.key in wrong
        else row
        for row in recorded.rows
    )
    return replace(recorded, rows=tuple(rows))


def find_mismatches(
    rows: Sequence[LedgerRow],
    calls: Sequence[OpCall],
    leaves: Sequence[Leaf],
    tensors: Mapping[str, torch.Tensor],
    literals: Mapping[str, torch.Tensor],
    values: Mapping[tuple[str, str], torch.Tensor],
) -> Iterator[tuple[str, str]]:
    """Yield keys of slots whose recipe returns other bits than recorded, or cannot be computed.

    Computes one value after another, so that not all values are in memory at once.

    Args:
        rows: Ledger rows of the slots.
        calls: Calls that the recipes refer to.
        leaves: All leaves of the program.
        tensors: Recorded values of the leaves, by FQN.
        literals: Tensors that the plan stores, besides leaves, by name.
        values: Recorded values of the slots, by slot key.
    """
    data = PlanData(
        backend="",
        leaves=tuple(leaves),
        ledger=tuple(rows),
        calls=tuple(calls),
        pinned={name: _index_entry(tensor) for name, tensor in literals.items()},
        fingerprint=Fingerprint(graph="", slots=""),
    )
    computed = [row for row in rows if row.state in _COMPUTED]
    values_by_key = RefitPlan(data, literals).values_of(computed, TensorMap(tensors))
    for key, value in values_by_key.items():
        if isinstance(value, str) or not _has_bits(value, values[key]):
            yield key


def _index_entry(tensor: torch.Tensor) -> PinnedTensor:
    """Return an index entry without a digest, as this plan is never stored."""
    return PinnedTensor(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), sha256="")


def _has_bits(value: SlotValue, wanted: torch.Tensor) -> bool:
    try:
        computed = value.load()
    except PlanMismatchError:
        return False
    # Most slots hold a leaf itself: equal addresses make a comparison of the bits unnecessary.
    dense = computed.is_contiguous() and wanted.is_contiguous()
    if dense and computed.dtype == wanted.dtype and computed.data_ptr() == wanted.data_ptr():
        return computed.numel() == wanted.numel()
    return same_bits(wanted.reshape(-1), computed.reshape(-1))


# -- calls and literals that nothing uses -----------------------------------------------------


def without_unused(recorded: Recorded) -> Recorded:
    """Return recipes without the calls and literals that no row and no guard uses.

    Calls are numbered anew, in their old order.
    """
    wanted = [row.value for row in recorded.rows if row.value]
    wanted += [guard.value for guard in recorded.guards]
    below = sorted(calls_below(wanted, lambda number: operands_of(recorded.calls[number])))
    numbers = {old: new for new, old in enumerate(below)}
    calls = tuple(_renumbered_call(recorded.calls[old], numbers) for old in below)
    stored = {v.name for call in calls for v in operands_of(call) if isinstance(v, PinnedRef)}
    stored |= {value.name for value in wanted if isinstance(value, PinnedRef)}
    return Recorded(
        rows=tuple(
            row.model_copy(update={"value": _renumbered(row.value, numbers)})
            for row in recorded.rows
        ),
        calls=calls,
        guards=tuple(
            guard.model_copy(update={"value": _renumbered(guard.value, numbers)})
            for guard in recorded.guards
        ),
        literals={name: value for name, value in recorded.literals.items() if name in stored},
    )


def _renumbered(argument: Any, numbers: Mapping[int, int]) -> Any:
    if isinstance(argument, tuple):
        return tuple(_renumbered(one, numbers) for one in argument)
    if isinstance(argument, CallRef):
        return CallRef(call=numbers[argument.call], output=argument.output)
    return argument


def _renumbered_call(call: OpCall, numbers: Mapping[int, int]) -> OpCall:
    args = _renumbered(call.args, numbers)
    kwargs = {name: _renumbered(one, numbers) for name, one in call.kwargs.items()}
    return call.model_copy(update={"args": args, "kwargs": kwargs})
