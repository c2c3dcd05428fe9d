"""From a recording to recipes: what each slot needs, in as few calls as possible.

A recording knows for every value which op made it of which others. Here that is followed back to
the leaves (:mod:`refitkit.recipe.origins`) and written as calls (:mod:`refitkit.recipe.writer`).
Each slot gets a row, and what left the recording becomes guards.
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
from refitkit.recipe.origins import Lineage, Literal, UnwritableError
from refitkit.recipe.plan import RefitPlan
from refitkit.recipe.sources import TensorMap
from refitkit.recipe.writer import Draft, Writer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from refitkit.model import Leaf, OpCall, Slot, Value
    from refitkit.protocols import SlotValue
    from refitkit.recipe.origins import Escape, Origin
    from refitkit.recipe.tape import Tape


_CHANGED = "what was recorded of it gives another value: it was changed where no op is seen"


def write(
    tape: Tape,
    slots: Iterable[tuple[Slot, Origin, torch.Tensor]],
    leaves: Sequence[Leaf],
    ties: Sequence[Sequence[str]],
    tensors: Mapping[str, torch.Tensor],
) -> Recorded:
    """Recipes for slots.

    Args:
        tape: The recording.
        slots: Slots, where their values come from, and the values.
        leaves: All leaves of the program.
        ties: Classes of leaves that are one tensor.
        tensors: Values of the leaves, by FQN: recipes have to give the slots' values of them.
    """
    slots = tuple(slots)
    rows = _Rows({leaf.fqn: leaf for leaf in leaves}, ties, Lookalikes(leaves, tensors))
    guards, fault = rows.guards(tape.escapes)
    found = rows.recorded(
        [rows.row(slot, origin, value, fault) for slot, origin, value in slots], guards
    )
    values = {slot.key: value for slot, _, value in slots}
    return needed(_tried(found, leaves, tensors, values))


class _Rows:
    """Says of each slot how its value is had, and of what left the recording how it is guarded."""

    def __init__(
        self,
        leaves: Mapping[str, Leaf],
        ties: Sequence[Sequence[str]],
        lookalikes: Lookalikes,
    ) -> None:
        self._leaves, self._lookalikes = leaves, lookalikes
        self._lineage = Lineage()
        self._draft = Draft(leaves, ties)
        self._writer = Writer(leaves, self._lineage, self._draft)
        self._guarded: set[str] = set()

    def row(self, slot: Slot, origin: Origin, value: torch.Tensor, fault: str) -> LedgerRow:
        """One slot."""
        if fault:
            return LedgerRow(slot=slot, state=SlotState.UNMAPPED, reason=fault)
        try:
            if not self._lineage.follows(origin):
                return self._frozen(slot, value, seen=not isinstance(origin.node, Literal))
            found = self._fitting(self._writer.value(origin), slot)
        except UnwritableError as exc:
            return LedgerRow(slot=slot, state=SlotState.UNMAPPED, reason=str(exc))
        return self._served(slot, found)

    def _fitting(self, value: Value, slot: Slot) -> Value:
        """The value of a slot; a reshape at its end is left to whoever reads it."""
        facts = self._draft.facts(value)
        count = torch.Size(facts.shape).numel()
        if (facts.dtype, count) != (slot.dtype, slot.count):
            found = f"{count} of {facts.dtype}"
            raise UnwritableError(f"the engine has {slot.count} of {slot.dtype} there, not {found}")
        return self._draft.before_reshapes(value)

    def _served(self, slot: Slot, found: Value) -> LedgerRow:
        sources = self._draft.sources(found)
        if isinstance(found, SourceRef) and not self._leaves[found.fqn].persistent:
            return LedgerRow(
                slot=slot,
                state=SlotState.PINNED,
                value=PinnedRef(name=found.fqn),
                sources=sources,
                reason="no state_dict holds it; the plan keeps its value",
            )
        return LedgerRow(slot=slot, state=SlotState.RECIPE, value=found, sources=sources)

    def _frozen(self, slot: Slot, value: torch.Tensor, *, seen: bool) -> LedgerRow:
        """A literal, unless its numbers are a weight's and nobody saw them being made."""
        fqn = "" if seen else self._lookalikes.of(value)
        if fqn and fqn not in self._guarded:
            raise UnwritableError(f"it holds the values of {fqn!r}, and no op is seen between them")
        kept = self._draft.keep(value if slot.shape is None else value.reshape(slot.shape))
        reason = "nothing that it is made of comes from a parameter or buffer"
        return LedgerRow(slot=slot, state=SlotState.FROZEN, value=kept, reason=reason)

    def guards(self, escapes: Iterable[Escape]) -> tuple[list[Guard], str]:
        """Guards for what left the recording; and why recipes say nothing, if one is lacking."""
        found: dict[Value, Guard] = {}
        for escape in escapes:
            try:
                if self._lineage.follows(escape.origin):
                    value = self._writer.value(escape.origin)
                    found.setdefault(value, _guard(value, escape))
                    self._guarded.update(self._draft.sources(value))
            except UnwritableError as exc:
                return [], f"a value decided what the engines are ({escape.how}), and {exc}"
        return list(found.values()), ""

    def recorded(self, rows: Iterable[LedgerRow], guards: Iterable[Guard]) -> Recorded:
        """These, with all calls and literals that were written for any."""
        draft = self._draft
        return Recorded(tuple(rows), tuple(draft.calls), tuple(guards), draft.literals)


def _guard(value: Value, escape: Escape) -> Guard:
    return Guard(
        value=value,
        sha256=escape.sha256,
        dtype=escape.facts.dtype,
        shape=escape.facts.shape,
        shown=escape.shown,
        reason=escape.how,
    )


def _tried(
    found: Recorded,
    leaves: Sequence[Leaf],
    tensors: Mapping[str, torch.Tensor],
    values: Mapping[tuple[str, str], torch.Tensor],
) -> Recorded:
    """The same; without recipes that do not give the value that the slot had."""
    kept = {leaf.fqn: tensors[leaf.fqn] for leaf in leaves if leaf.parts} | dict(found.literals)
    wrong = set(unlike(found.rows, found.calls, leaves, tensors, kept, values))
    rows = (
        LedgerRow(slot=row.slot, state=SlotState.UNMAPPED, reason=_CHANGED)
        if row.slot.key in wrong
        else row
        for row in found.rows
    )
    return replace(found, rows=tuple(rows))


# MERGED recorded: Recipes of all slots, as a recording gives them: without what none of them
# needs.


@dataclass(frozen=True)
class Recorded:
    """Recipes of all slots.

    Attributes:
        rows: One for each slot that was asked for.
        calls: What they compute.
        guards: What must be as it was.
        literals: Tensors that the plan has to keep, beside leaves that no state_dict holds.
    """

    rows: tuple[LedgerRow, ...]
    calls: tuple[OpCall, ...] = ()
    guards: tuple[Guard, ...] = ()
    literals: Mapping[str, torch.Tensor] = field(default_factory=dict)


def needed(found: Recorded) -> Recorded:
    """All of it, without calls and literals that no row and no guard needs."""
    wanted = [row.value for row in found.rows if row.value]
    wanted += [guard.value for guard in found.guards]
    below = sorted(calls_below(wanted, lambda number: operands_of(found.calls[number])))
    numbers = {old: new for new, old in enumerate(below)}
    calls = tuple(_renumbered(found.calls[old], numbers) for old in below)
    kept = {v.name for call in calls for v in operands_of(call) if isinstance(v, PinnedRef)}
    kept |= {value.name for value in wanted if isinstance(value, PinnedRef)}
    return Recorded(
        rows=tuple(
            row.model_copy(update={"value": _renumber(row.value, numbers)}) for row in found.rows
        ),
        calls=calls,
        guards=tuple(
            guard.model_copy(update={"value": _renumber(guard.value, numbers)})
            for guard in found.guards
        ),
        literals={name: value for name, value in found.literals.items() if name in kept},
    )


def _renumber(argument: Any, numbers: Mapping[int, int]) -> Any:
    if isinstance(argument, tuple):
        return tuple(_renumber(one, numbers) for one in argument)
    if isinstance(argument, CallRef):
        return CallRef(call=numbers[argument.call], output=argument.output)
    return argument


def _renumbered(call: OpCall, numbers: Mapping[int, int]) -> OpCall:
    args = _renumber(call.args, numbers)
    kwargs = {name: _renumber(one, numbers) for name, one in call.kwargs.items()}
    return call.model_copy(update={"args": args, "kwargs": kwargs})


# MERGED trial: Whether recipes give, of the weights that were recorded, the values that were
# recorded.
#
# Not every way to change a tensor can be watched (:mod:`refitkit.recipe.host_reads`): a library
# in C that knows its address needs no op for it. What such a library did to a value shows here.

_COMPUTED = {SlotState.RECIPE, SlotState.PINNED}


def unlike(
    rows: Sequence[LedgerRow],
    calls: Sequence[OpCall],
    leaves: Sequence[Leaf],
    tensors: Mapping[str, torch.Tensor],
    literals: Mapping[str, torch.Tensor],
    values: Mapping[tuple[str, str], torch.Tensor],
) -> Iterator[tuple[str, str]]:
    """Keys of slots whose recipe gives other bits than were recorded, or cannot be computed.

    Values are computed one after another: they never lie in memory all at once.

    Args:
        rows: The slots.
        calls: What recipes compute.
        leaves: All leaves of the program.
        tensors: Their values, by FQN.
        literals: Tensors that the plan keeps, beside leaves.
        values: What was recorded, by slot.
    """
    data = PlanData(
        backend="",
        leaves=tuple(leaves),
        ledger=tuple(rows),
        calls=tuple(calls),
        pinned={name: _index_of(tensor) for name, tensor in literals.items()},
        fingerprint=Fingerprint(graph="", slots=""),
    )
    computed = [row for row in rows if row.state in _COMPUTED]
    found = RefitPlan(data, literals).values_of(computed, TensorMap(tensors))
    for key, value in found.items():
        if isinstance(value, str) or not _gives(value, values[key]):
            yield key


def _index_of(tensor: torch.Tensor) -> PinnedTensor:
    """An index entry that no file will hold: nobody asks for its digest."""
    return PinnedTensor(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), sha256="")


def _gives(value: SlotValue, wanted: torch.Tensor) -> bool:
    try:
        found = value.load()
    except PlanMismatchError:
        return False
    dense = found.is_contiguous() and wanted.is_contiguous()
    if dense and found.dtype == wanted.dtype and found.data_ptr() == wanted.data_ptr():
        return found.numel() == wanted.numel()
    return same_bits(wanted.reshape(-1), found.reshape(-1))


# MERGED lookalikes: Literals that hold the values of a weight: somebody read it where no
# recording sees that.
#
# A method of torch that was looked up before the recording began, or a library that takes tensors
# as they are, reads a weight unseen. What it makes of that looks like a literal of a converter.


class Lookalikes:
    """The weights of a program, to be compared with literals."""

    def __init__(self, leaves: Sequence[Leaf], tensors: Mapping[str, torch.Tensor]) -> None:
        """Look at no value yet.

        Args:
            leaves: All leaves of the program.
            tensors: Their values, by FQN.
        """
        self._tensors = tensors
        self._by_count: dict[int, list[str]] = defaultdict(list)
        for leaf in leaves:
            if leaf.persistent and dtype_of(leaf.dtype).is_floating_point:
                self._by_count[prod(leaf.shape)].append(leaf.fqn)

    def of(self, literal: torch.Tensor) -> str:
        """The FQN of a weight with these values, in any order and precision; empty if none has.

        A literal of a single value, such as zeros or ones, tells nothing.
        """
        names = self._by_count.get(literal.numel())
        if not names or not literal.is_floating_point():
            return ""
        wanted = _sorted(literal, literal.dtype)
        if wanted[0] == wanted[-1]:
            return ""
        for fqn in names:
            if torch.equal(_sorted(self._tensors[fqn], literal.dtype), wanted):
                return fqn
        return ""


def _sorted(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    found: torch.Tensor = value.detach().cpu().to(dtype).double().reshape(-1).sort().values
    return found
