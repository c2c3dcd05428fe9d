"""From a recording to recipes: what each slot needs, in as few calls as possible.

A recording knows for every value which op made it of which others. Here that is followed back to
the leaves and written as calls without anything that belongs to the run itself: which device,
which layout in memory, which object. What follows from no leaf is computed now and kept as a
tensor. Calls that are the same are one call.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from refitkit.model import (
    CallRef,
    Guard,
    LedgerRow,
    OpCall,
    PinnedRef,
    SlotState,
    SourceRef,
    Tensor,
)
from refitkit.program.bits import digest
from refitkit.program.dtypes import dtype_name, dtype_of
from refitkit.recipe import ops
from refitkit.recipe.calls import call, operands_of
from refitkit.recipe.origins import Call, Leaf, Literal, Origin, Unknown
from refitkit.recipe.trial import unlike

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from refitkit.model import Leaf as LeafFacts
    from refitkit.model import Slot, Value
    from refitkit.recipe.origins import Escape
    from refitkit.recipe.tape import Tape

_CHANGED = "what was recorded of it gives another value: it was changed where no op is seen"
LITERAL = "literal:"
"""How names of tensors start that a plan keeps and that are no leaves."""
_aten = torch.ops.aten
_SAME = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.lift_fresh.default,
    _aten.lift_fresh_copy.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.lift.default,
}
"""Ops that give what they are given."""
_RESHAPES = {
    _aten.view.default,
    _aten._unsafe_view.default,  # noqa: SLF001 - the op's name
    _aten.reshape.default,
    _aten._reshape_alias.default,  # noqa: SLF001 - the op's name
}
_CASTS = {_aten._to_copy.default}  # noqa: SLF001 - the op's name
_LAID_OUT = {
    _aten.as_strided.default,
    _aten.as_strided_scatter.default,
    _aten.view.dtype,
    _aten.view_as_complex.default,
    _aten.view_as_real.default,
}
"""Ops whose result depends on how their first argument lies in memory."""
_ANY_LAYOUT = {_aten.view_as_real.default}
"""Those that only need it to be free of signs and conjugations that torch has put off."""
_ORDERED = "in order"
"""What stands for the op of a call that puts elements one after another."""
_LAZY = frozenset({"aten._conj.default", "aten._neg_view.default"})
_UNSET = ("aten.empty", "aten.new_empty")
"""How names of ops begin that leave memory as it is."""
_References = (SourceRef, PinnedRef, CallRef)
_OF_THE_RUN = frozenset({"device", "pin_memory", "non_blocking", "layout", "memory_format", "copy"})
"""Arguments that say nothing of values."""
_RESHAPE = "aten.reshape.default"
_SHAPES_ONLY = frozenset(
    f"aten.{name}"
    for name in (
        "empty_like.default",
        "full_like.default",
        "new_empty.default",
        "new_empty_strided.default",
        "new_full.default",
        "new_ones.default",
        "new_zeros.default",
        "ones_like.default",
        "zeros_like.default",
    )
)
"""Ops whose result does not depend on the values of their operand."""


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


class _UnwritableError(Exception):
    """A value whose way is not known, or cannot stand in a plan; says why."""


def write(
    tape: Tape,
    slots: Iterable[tuple[Slot, Origin, torch.Tensor]],
    leaves: Sequence[LeafFacts],
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
    writer = _Writer({leaf.fqn: leaf for leaf in leaves}, ties)
    guards, fault = writer.guards(tape.escapes)
    rows = [writer.row(slot, origin, value, fault) for slot, origin, value in slots]
    values = {slot.key: value for slot, _, value in slots}
    return writer.recorded(writer.tried(rows, tensors, values), guards)


class _Writer:
    def __init__(self, leaves: Mapping[str, LeafFacts], ties: Sequence[Sequence[str]]) -> None:
        self._leaves = leaves
        self._twins = {name: tuple(tie) for tie in ties for name in tie}
        self._calls: list[OpCall] = []
        self._numbers: dict[str, int] = {}
        self._lazy: set[int] = set()
        self._written: dict[tuple[int, int], Value] = {}
        self._follows: dict[int, frozenset[str]] = {}
        self._computed: dict[int, tuple[torch.Tensor, ...]] = {}
        self._sources: dict[int, tuple[str, ...]] = {}
        self._literals: dict[str, torch.Tensor] = {}
        self._alive: list[Any] = []

    # -- rows -------------------------------------------------------------------------------

    def row(self, slot: Slot, origin: Origin, value: torch.Tensor, fault: str) -> LedgerRow:
        """One slot."""
        if fault:
            return LedgerRow(slot=slot, state=SlotState.UNMAPPED, reason=fault)
        try:
            if not self.follows(origin):
                return self._frozen(slot, value)
            found = self._shaped(origin, slot)
        except _UnwritableError as exc:
            return LedgerRow(slot=slot, state=SlotState.UNMAPPED, reason=str(exc))
        return self._served(slot, found)

    def _served(self, slot: Slot, found: Value) -> LedgerRow:
        sources = self.sources(found)
        if isinstance(found, SourceRef) and not self._leaves[found.fqn].persistent:
            return LedgerRow(
                slot=slot,
                state=SlotState.PINNED,
                value=PinnedRef(name=found.fqn),
                sources=sources,
                reason="no state_dict holds it; the plan keeps its value",
            )
        return LedgerRow(slot=slot, state=SlotState.RECIPE, value=found, sources=sources)

    def _frozen(self, slot: Slot, value: torch.Tensor) -> LedgerRow:
        name = self._keep(value if slot.shape is None else value.reshape(slot.shape))
        reason = "nothing that it is made of comes from a parameter or buffer"
        return LedgerRow(
            slot=slot, state=SlotState.FROZEN, value=PinnedRef(name=name), reason=reason
        )

    def guards(self, escapes: Iterable[Escape]) -> tuple[list[Guard], str]:
        """Guards for what left the recording; and why recipes say nothing, if one is lacking."""
        found: dict[Value, Guard] = {}
        for escape in escapes:
            try:
                if self.follows(escape.origin):
                    value = self.value(escape.origin)
                    found.setdefault(value, _guard(value, escape))
            except _UnwritableError as exc:
                return [], f"a value decided what the engines are ({escape.how}), and {exc}"
        return list(found.values()), ""

    # -- what a value follows from ----------------------------------------------------------

    def follows(self, origin: Origin) -> frozenset[str]:
        """The leaves that a value follows from.

        Raises:
            _UnwritableError: Nobody knows.
        """
        for below in _bottom_up(origin, lambda one: id(one.node) in self._follows):
            with suppress(_UnwritableError):
                self._followed(below)
        return self._followed(origin)

    def _followed(self, origin: Origin) -> frozenset[str]:
        node = origin.node
        if isinstance(node, Unknown):
            raise _UnwritableError(f"{node.reason}, so nobody knows what it follows from")
        if isinstance(node, Leaf):
            return frozenset({node.fqn})
        if isinstance(node, Literal) or _name(node) in _SHAPES_ONLY:
            return frozenset()
        found = self._follows.get(id(node))
        if found is None:
            read = node.args[1:2] if node.op is _aten.copy_.default else node.inputs
            found = frozenset[str]().union(*map(self._followed, read))
            self._follows[id(node)] = found
            self._alive.append(node)
        return found

    def sources(self, value: Value) -> tuple[str, ...]:
        """The same for what was written, with all names of leaves that are one tensor."""
        if isinstance(value, SourceRef):
            return self._twins.get(value.fqn, (value.fqn,))
        if isinstance(value, PinnedRef):
            return ()
        for number in range(value.call + 1):  # so none of them asks for what is not there yet
            if number not in self._sources:
                parts = map(self.sources, operands_of(self._calls[number]))
                names = {name for part in parts for name in part}
                self._sources[number] = tuple(name for name in self._leaves if name in names)
        return self._sources[value.call]

    # -- values -----------------------------------------------------------------------------

    def value(self, origin: Origin) -> Value:
        """What is written for a value; calls that it needs are written, too.

        Raises:
            _UnwritableError: It cannot stand in a plan.
        """
        for below in _bottom_up(origin, lambda one: (id(one.node), one.output) in self._written):
            with suppress(_UnwritableError):  # whether it is needed, its users say
                if self.follows(below):
                    self._one(below)
        return self._one(origin)

    def _one(self, origin: Origin) -> Value:
        node, output = origin.node, origin.output
        key = id(node), output
        if key not in self._written:
            try:
                self._written[key] = self._value(origin)
            except RecursionError:
                reason = "too many ops follow one another in what it is made of"
                raise _UnwritableError(reason) from None
            self._alive.append(node)
        return self._written[key]

    def _value(self, origin: Origin) -> Value:
        if not self.follows(origin):
            return PinnedRef(name=self._keep(self._computed_of(origin)))
        if isinstance(origin.node, Leaf):
            return SourceRef(fqn=origin.node.fqn)
        if not isinstance(origin.node, Call):
            raise TypeError(type(origin.node))
        return self._of_call(origin.node, origin.output)

    def _of_call(self, node: Call, output: int) -> Value:
        op, shape = node.op, node.results[0].shape
        if op in _SAME or op is _ORDERED:
            same = self._one(node.args[0])
            return self._contiguous(same) if op is _ORDERED else same
        if op in _RESHAPES:
            return self._reshaped(self._one(node.args[0]), shape)
        if op in _CASTS:
            return self._cast(self._one(node.args[0]), node.results[0].dtype, node.device)
        if op is _aten.copy_.default:
            source = self._cast(self._one(node.args[1]), node.results[0].dtype, node.device)
            return self._expanded(source, shape, node.device)
        if op is _aten.expand.default:
            return self._expanded(self._one(node.args[0]), shape, node.device)
        return self._emitted(node, output)

    def _emitted(self, node: Call, output: int) -> Value:
        name = _name(node)
        if not ops.is_allowed(name):
            raise _UnwritableError(f"it needs the op {name}, which no plan may hold")
        args = tuple(self._argument(one) for one in node.args)
        if node.op in _LAID_OUT:
            args = (self._laid_out(node, args[0]), *args[1:])
        elif torch.Tag.pointwise in node.op.tags:
            args = self._promoted(node, args)
        elif not self._is_exact(node):
            args = tuple(map(self._in_order, node.args, args))
        kwargs = {
            key: self._argument(one)
            for key, one in node.kwargs.items()
            if one is not None and key not in _OF_THE_RUN
        }
        made = OpCall(op=name, args=args, kwargs=kwargs, results=node.results, device=node.device)
        return self._emit(made, output)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Origin):
            return self._one(value)
        if isinstance(value, list | tuple):
            return tuple(self._argument(one) for one in value)
        try:
            return ops.encode(value)
        except TypeError as exc:
            raise _UnwritableError(f"an argument of its recipe cannot be written: {exc}") from exc

    def _emit(self, call: OpCall, output: int = 0) -> CallRef:
        key = call.model_dump_json()
        if key not in self._numbers:
            number = self._numbers[key] = len(self._calls)
            self._calls.append(call)
            below = (one.call for one in operands_of(call) if isinstance(one, CallRef))
            if call.op in _LAZY or not self._lazy.isdisjoint(below):
                self._lazy.add(number)
        return CallRef(call=self._numbers[key], output=output)

    def _reshaped(self, value: Value, shape: tuple[int, ...]) -> Value:
        facts = self.facts(value)
        if facts.shape == shape:
            return value
        if isinstance(value, CallRef) and self._calls[value.call].op == _RESHAPE:
            return self._reshaped(operands_of(self._calls[value.call])[0], shape)
        result = Tensor(dtype=facts.dtype, shape=shape)
        return self._emit(OpCall(op=_RESHAPE, args=(value, shape), results=(result,)))

    def _cast(self, value: Value, dtype: str, device: str) -> Value:
        facts = self.facts(value)
        if facts.dtype == dtype:
            return value
        return self._emit(
            OpCall(
                op="aten._to_copy.default",
                args=(value,),
                kwargs={"dtype": ops.encode(dtype_of(dtype))},
                results=(Tensor(dtype=dtype, shape=facts.shape),),
                device=device,
            )
        )

    def _expanded(self, value: Value, shape: tuple[int, ...], device: str) -> Value:
        facts = self.facts(value)
        if facts.shape == shape:
            return value
        result = Tensor(dtype=facts.dtype, shape=shape)
        op = "aten.expand.default"
        return self._emit(OpCall(op=op, args=(value, shape), results=(result,), device=device))

    def _laid_out(self, node: Call, value: Value) -> Value:
        """The first argument of a call as it lies in memory when nothing was permuted."""
        lazy = isinstance(value, CallRef) and value.call in self._lazy
        steps = ["resolve_conj", "resolve_neg"] if lazy else []
        if node.op not in _ANY_LAYOUT:
            if not node.args[0].contiguous:
                raise _UnwritableError(f"it needs {_name(node)} of memory that is not contiguous")
            steps.append("contiguous")
        for step in steps:
            op, facts = f"aten.{step}.default", (self.facts(value),)
            value = self._emit(OpCall(op=op, args=(value,), results=facts, device=node.device))
        return value

    def _is_exact(self, node: Call) -> bool:
        """Whether no order in which elements lie in memory can change a bit of the result."""
        bare = OpCall(op=_name(node), results=node.results, device=node.device)
        return ops.is_exact_anywhere(bare, [self._facts_of(one).dtype for one in node.inputs])

    def _in_order(self, origin: Any, value: Any) -> Any:
        """An argument whose elements lie one after another if they did so in the recording."""
        if not isinstance(origin, Origin):
            listed = isinstance(origin, list | tuple)
            return tuple(map(self._in_order, origin, value)) if listed else value
        if isinstance(value, PinnedRef):
            return value
        ordered = origin.contiguous
        return self._contiguous(value) if ordered else self._one(self._on_ordered(origin))

    def _contiguous(self, value: Value) -> Value:
        op = "aten.contiguous.default"
        return self._emit(OpCall(op=op, args=(value,), results=(self.facts(value),)))

    def _on_ordered(self, origin: Origin) -> Origin:
        """The same view of memory whose elements lie one after another, if they did so."""
        node = origin.node
        if origin.contiguous and self.follows(origin):
            facts = (self._facts_of(origin),)
            ordered = Call(_ORDERED, (origin,), {}, facts, _device_of(node), (origin,))
            return Origin(ordered, 0, contiguous=True)
        if not isinstance(node, Call) or not _is_view(node.op):
            return origin
        below = self._on_ordered(node.args[0])
        moved = replace(node, args=(below, *node.args[1:]), inputs=(below, *node.inputs[1:]))
        return origin._replace(node=moved)

    def _promoted(self, node: Call, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments of an op that makes floats of whole numbers: no default dtype decides which."""
        wanted = node.results[0].dtype
        dtypes = [self.facts(one).dtype for one in args if isinstance(one, _References)]
        whole = all(map(_is_whole, dtypes)) and not _name(node).startswith("aten.where")
        if not whole or _is_whole(wanted):
            return args
        return tuple(
            self._cast(one, wanted, node.device) if isinstance(one, _References) else one
            for one in args
        )

    def _shaped(self, origin: Origin, slot: Slot) -> Value:
        """The value of a slot; a reshape at its end is left to whoever reads it."""
        value = self.value(origin)
        facts = self.facts(value)
        count = torch.Size(facts.shape).numel()
        if (facts.dtype, count) != (slot.dtype, slot.count):
            found = f"{count} of {facts.dtype}"
            raise _UnwritableError(
                f"the engine has {slot.count} of {slot.dtype} there, not {found}"
            )
        while isinstance(value, CallRef) and self._calls[value.call].op == _RESHAPE:
            value = operands_of(self._calls[value.call])[0]
        return value

    def facts(self, value: Value) -> Tensor:
        """Dtype and shape of what was written."""
        if isinstance(value, SourceRef):
            leaf = self._leaves[value.fqn]
            return Tensor(dtype=leaf.dtype, shape=leaf.shape)
        if isinstance(value, CallRef):
            return self._calls[value.call].results[value.output]
        kept = self._literals[value.name]
        return Tensor(dtype=dtype_name(kept.dtype), shape=tuple(kept.shape))

    # -- what follows from no leaf ----------------------------------------------------------

    def _keep(self, value: torch.Tensor) -> str:
        kept = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        name = f"{LITERAL}{digest(kept)[:16]}-{dtype_name(kept.dtype)}{list(kept.shape)}"
        self._literals.setdefault(name, kept.clone())
        return name

    def _computed_of(self, origin: Origin) -> torch.Tensor:
        node = origin.node
        if isinstance(node, Literal):
            return node.value
        if not isinstance(node, Call):
            raise TypeError(type(node))
        if id(node) not in self._computed:
            self._computed[id(node)] = self._run(node)
            self._alive.append(node)
        return self._computed[id(node)][origin.output]

    def _run(self, node: Call) -> tuple[torch.Tensor, ...]:
        if _name(node).startswith(_UNSET):  # whatever lay there then: now always the same
            return tuple(torch.zeros(r.shape, dtype=dtype_of(r.dtype)) for r in node.results)
        if _name(node) in _SHAPES_ONLY or node.op is _aten.copy_.default:
            args: Any = (_stand_in(self._facts_of(node.args[0])), *node.args[1:])
        else:
            args = node.args
        args, kwargs = tree_map(
            lambda one: self._computed_of(one) if isinstance(one, Origin) else one,
            (args, dict(node.kwargs)),
            is_leaf=lambda one: isinstance(one, Origin),
        )
        if node.op in _LAID_OUT:
            args = (args[0].resolve_conj().resolve_neg().contiguous(), *args[1:])
        try:
            found = call(node.op, args, kwargs)
        except (RuntimeError, TypeError, ValueError) as exc:
            raise _UnwritableError(f"{_name(node)} cannot be computed again: {exc}") from exc
        if tuple(map(_facts_of, found)) != node.results:
            raise _UnwritableError(f"{_name(node)} gives something else when it is computed again")
        return found

    def _facts_of(self, origin: Origin) -> Tensor:
        node = origin.node
        if isinstance(node, Call):
            return node.results[origin.output]
        if isinstance(node, Leaf):
            leaf = self._leaves[node.fqn]
            return Tensor(dtype=leaf.dtype, shape=leaf.shape)
        kept = self._computed_of(origin)
        return Tensor(dtype=dtype_name(kept.dtype), shape=tuple(kept.shape))

    # -- the whole --------------------------------------------------------------------------

    def tried(
        self,
        rows: Sequence[LedgerRow],
        tensors: Mapping[str, torch.Tensor],
        values: Mapping[tuple[str, str], torch.Tensor],
    ) -> list[LedgerRow]:
        """The rows; without recipes that do not give the value that the slot had."""
        found = unlike(
            rows, self._calls, tuple(self._leaves.values()), tensors, self._literals, values
        )
        wrong = set(found)
        return [
            LedgerRow(slot=row.slot, state=SlotState.UNMAPPED, reason=_CHANGED)
            if row.slot.key in wrong
            else row
            for row in rows
        ]

    def recorded(self, rows: Sequence[LedgerRow], guards: Sequence[Guard]) -> Recorded:
        """All of it, without calls and literals that nobody needs in the end."""
        wanted = [row.value for row in rows if row.value] + [guard.value for guard in guards]
        needed: set[int] = set()
        stack = list(wanted)
        while stack:
            value = stack.pop()
            if isinstance(value, CallRef) and value.call not in needed:
                needed.add(value.call)
                stack += operands_of(self._calls[value.call])
        numbers = {old: new for new, old in enumerate(sorted(needed))}
        calls = tuple(_renumbered(self._calls[old], numbers) for old in sorted(needed))
        kept = {v.name for call in calls for v in operands_of(call) if isinstance(v, PinnedRef)}
        kept |= {value.name for value in wanted if isinstance(value, PinnedRef)}
        return Recorded(
            rows=tuple(
                row.model_copy(update={"value": _renumber(row.value, numbers)}) for row in rows
            ),
            calls=calls,
            guards=tuple(
                guard.model_copy(update={"value": _renumber(guard.value, numbers)})
                for guard in guards
            ),
            literals={name: value for name, value in self._literals.items() if name in kept},
        )


def _facts_of(tensor: torch.Tensor) -> Tensor:
    return Tensor(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))


def _is_whole(dtype: str) -> bool:
    return not dtype.startswith(("float", "bfloat", "complex"))


def _bottom_up(origin: Origin, is_known: Callable[[Origin], bool]) -> Iterator[Origin]:
    """Everything that a value is made of, each before what is made of it; without recursion."""
    stack, seen = [(origin, False)], set[tuple[int, int]]()
    while stack:
        one, ready = stack.pop()
        key = id(one.node), one.output
        if ready:
            yield one
        elif isinstance(one.node, Call) and key not in seen and not is_known(one):
            seen.add(key)
            if one is not origin:
                stack.append((one, True))
            stack += [(below, False) for below in one.node.inputs]


def _is_view(op: Any) -> bool:
    """Whether it gives a part of the memory of its first argument, and writes nothing."""
    first, *_ = op._schema.arguments  # noqa: SLF001 - there is no other way
    return first.alias_info is not None and not first.alias_info.is_write


def _device_of(node: object) -> str:
    return node.device if isinstance(node, Call) else "cpu"


def _name(node: Call) -> str:
    return str(node.op)


def _guard(value: Value, escape: Escape) -> Guard:
    return Guard(
        value=value,
        sha256=escape.sha256,
        dtype=escape.facts.dtype,
        shape=escape.facts.shape,
        shown=escape.shown,
        reason=escape.how,
    )


def _stand_in(facts: Tensor) -> torch.Tensor:
    """A tensor of this dtype and shape, of whatever value, in no memory to speak of."""
    return torch.zeros((), dtype=dtype_of(facts.dtype)).expand(facts.shape)


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
