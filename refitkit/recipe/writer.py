"""How recorded values stand in a plan: calls without anything that belongs to the run itself."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map, tree_map_only

from refitkit.errors import raise_if_resource
from refitkit.model import CallRef, OpCall, PinnedRef, SourceRef, Tensor
from refitkit.program.bits import digest
from refitkit.program.dtypes import dtype_name, dtype_of
from refitkit.program.views import derive
from refitkit.recipe import ops
from refitkit.recipe.calls import call
from refitkit.recipe.ops import (
    LeafDependencies,
    aligned,
    encode_literal,
    is_reference,
    operands_of,
    same_settings,
)
from refitkit.recipe.origins import (
    ORDERED,
    RESHAPES,
    Call,
    LeafOrigin,
    Literal,
    Origin,
    UnwritableError,
    bottom_up,
    facts_of,
    facts_of_tensor,
    is_anchored,
    is_laid_out,
    is_whole,
    needs_contiguous,
    on_ordered,
    plainly_laid_out,
    reads_first,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from refitkit.model import Leaf, Value
    from refitkit.recipe.origins import Lineage


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
_CASTS = {_aten._to_copy.default}  # noqa: SLF001 - the op's name
_OF_THE_RUN = frozenset({"device", "pin_memory", "non_blocking", "layout", "memory_format", "copy"})
"""Arguments that say nothing of values."""


class Writer:
    """Writes values of one recording into a draft, each once."""

    def __init__(self, leaves: Mapping[str, Leaf], lineage: Lineage, draft: Draft) -> None:
        """Write nothing yet.

        Args:
            leaves: All leaves of the program, by FQN.
            lineage: Knows what values follow from.
            draft: Where calls are written, and tensors that follow from no leaf.
        """
        self._leaves = leaves
        self._lineage = lineage
        self._draft = draft
        self._folding = Folding(leaves)
        self._written: dict[tuple[object, int], Value] = {}

    def value(self, origin: Origin) -> Value:
        """What is written for a value; calls that it needs are written, too.

        Raises:
            UnwritableError: It cannot stand in a plan.
        """
        for below in bottom_up(origin, lambda one: (one.node, one.output) in self._written):
            with suppress(UnwritableError):  # whether it is needed, its users say
                if self._lineage.follows(below):
                    self._one(below)
        return self._one(origin)

    def _one(self, origin: Origin) -> Value:
        key = origin.node, origin.output
        if key not in self._written:
            try:
                self._written[key] = self._value(origin)
            except RecursionError:
                reason = "too many ops follow one another in what it is made of"
                raise UnwritableError(reason) from None
        return self._written[key]

    def _value(self, origin: Origin) -> Value:
        if not self._lineage.follows(origin):
            return self._draft.keep(self._folding.value(origin))
        if isinstance(origin.node, LeafOrigin):
            return self._draft.leaf(origin.node.fqn)
        if not isinstance(origin.node, Call):
            raise TypeError(type(origin.node))
        return self._of_call(origin.node, origin.output)

    # -- calls ------------------------------------------------------------------------------

    def _of_call(self, node: Call, output: int) -> Value:
        op, shape = node.op, node.results[0].shape
        if op in _SAME or op is ORDERED:
            same = self._one(node.args[0])
            return self._draft.ordered(same, node.args[1]) if op is ORDERED else same
        if op in RESHAPES:
            return self._draft.reshaped(self._one(node.args[0]), shape)
        if op in _CASTS:
            return self._cast(node, self._one(node.args[0]))
        if op is _aten.copy_.default:
            source = self._cast(node, self._one(node.args[1]))
            return self._draft.expanded(source, shape, node.device)
        if op is _aten.expand.default:
            return self._draft.expanded(self._one(node.args[0]), shape, node.device)
        return self._emitted(node, output)

    def _cast(self, node: Call, value: Value) -> Value:
        """A value in the dtype of what a call gives."""
        return self._draft.cast(value, node.results[0].dtype, node.device)

    def _emitted(self, node: Call, output: int) -> Value:
        name = str(node.op)
        if not ops.is_allowed(name):
            raise UnwritableError(f"it needs the op {name}, which no plan may hold")
        args = tuple(self._argument(one) for one in node.args)
        if is_laid_out(node.op):
            args = (self._laid_out(node, args[0]), *args[1:])
        elif torch.Tag.pointwise in node.op.tags:
            args = self._promoted(node, args)
            if self._is_sensitive(node):
                args = tuple(map(self._in_order_unless_whole, node.args, args))
        elif not self._is_exact(node):
            args = tuple(map(self._in_order, node.args, args))
        kwargs = {
            key: self._argument(one)
            for key, one in node.kwargs.items()
            if one is not None and key not in _OF_THE_RUN
        }
        made = OpCall(op=name, args=args, kwargs=kwargs, results=node.results, device=node.device)
        return self._draft.emit(made, output)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Origin):
            return self._one(value)
        if isinstance(value, list | tuple):
            return tuple(self._argument(one) for one in value)
        try:
            return encode_literal(value)
        except TypeError as exc:
            raise UnwritableError(f"an argument of its recipe cannot be written: {exc}") from exc

    def _promoted(self, node: Call, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments of an op that makes floats of whole numbers: no default dtype decides which."""
        dtypes = [self._draft.facts(one).dtype for one in args if is_reference(one)]
        whole = all(map(_is_whole, dtypes)) and not str(node.op).startswith("aten.where")
        if not whole or _is_whole(node.results[0].dtype):
            return args
        return tuple(self._cast(node, one) if is_reference(one) else one for one in args)

    # -- operands as they lie in memory -----------------------------------------------------

    def _laid_out(self, node: Call, value: Value) -> Value:
        """The first argument of a call as it lies in memory when nothing was permuted."""
        steps = ["resolve_conj", "resolve_neg"] if self._draft.is_lazy(value) else []
        if needs_contiguous(node.op):
            if not node.args[0].contiguous:
                raise UnwritableError(f"it needs {node.op} of memory that is not contiguous")
            steps.append("contiguous")
        for step in steps:
            op, facts = f"aten.{step}.default", (self._draft.facts(value),)
            value = self._draft.emit(
                OpCall(op=op, args=(value,), results=facts, device=node.device)
            )
        return value

    def _is_exact(self, node: Call) -> bool:
        """Whether no order in which elements lie in memory can change a bit of the result."""
        bare = OpCall(op=str(node.op), results=node.results, device=node.device)
        dtypes = [facts_of(one, self._leaves).dtype for one in node.inputs]
        return ops.is_exact_anywhere(bare, dtypes)

    def _is_sensitive(self, node: Call) -> bool:
        """Whether it may matter for the result how operands lie in memory."""
        dtypes = [facts_of(one, self._leaves).dtype for one in node.inputs]
        return ops.is_sensitive(str(node.op), dtypes, node.kwargs.get("alpha", 1))

    def _in_order_unless_whole(self, origin: Any, value: Any) -> Any:
        """The same, of an op that gives results like its operands: whole ones are made so anyway.

        See ``PreparedCall.owns_storage`` of :mod:`refitkit.recipe.calls`.
        """
        whole = isinstance(origin, Origin) and is_whole(origin)
        return value if whole else self._in_order(origin, value)

    def _in_order(self, origin: Any, value: Any) -> Any:
        """An argument that lies in memory as it did in the recording."""
        if not isinstance(origin, Origin):
            listed = isinstance(origin, list | tuple)
            return tuple(map(self._in_order, origin, value)) if listed else value
        if isinstance(value, PinnedRef):
            return value
        if not is_anchored(origin):
            return self._draft.contiguous(value)
        return self._one(on_ordered(origin, self._lineage, self._leaves))


def _is_whole(dtype: str) -> bool:
    return not dtype.startswith(("float", "bfloat", "complex"))


# MERGED draft: Calls and tensors of recipes that are being written: what is the same is there
# once.

_LITERAL = "literal:"
"""How names of tensors start that a plan keeps and that are no leaves."""
_LAZY = frozenset({"aten._conj.default", "aten._neg_view.default"})
_RESHAPE = "aten.reshape.default"
_CONTIGUOUS = "aten.contiguous.default"
_PERMUTE = "aten.permute.default"


class Draft:
    """What was written so far.

    Attributes:
        calls: All calls, each after those whose results it takes.
        literals: Tensors that the plan has to keep, by name.
    """

    def __init__(self, leaves: Mapping[str, Leaf], ties: Sequence[Sequence[str]]) -> None:
        """Start with nothing.

        Args:
            leaves: All leaves of the program, by FQN.
            ties: Classes of leaves that are one tensor.
        """
        self.calls: list[OpCall] = []
        self.literals: dict[str, torch.Tensor] = {}
        self._leaves = leaves
        self._twins = {name: tuple(tie) for tie in ties for name in tie}
        self._numbers: dict[str, int] = {}
        self._lazy: set[int] = set()
        self._dependencies = LeafDependencies(self.calls, ties)

    # -- writing ----------------------------------------------------------------------------

    def emit(self, call: OpCall, output: int = 0) -> CallRef:
        """The result of a call."""
        key = call.model_dump_json()
        if key not in self._numbers:
            number = self._numbers[key] = len(self.calls)
            self.calls.append(call)
            below = (one.call for one in operands_of(call) if isinstance(one, CallRef))
            if call.op in _LAZY or not self._lazy.isdisjoint(below):
                self._lazy.add(number)
        return CallRef(call=self._numbers[key], output=output)

    def keep(self, value: torch.Tensor) -> PinnedRef:
        """A tensor that is no leaf and comes from none."""
        kept = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        name = f"{_LITERAL}{digest(kept)[:16]}-{dtype_name(kept.dtype)}{list(kept.shape)}"
        self.literals.setdefault(name, kept.clone())
        return PinnedRef(name=name)

    def leaf(self, fqn: str) -> Value:
        """A leaf; one that shares the memory of others is computed from those."""
        one = self._leaves[fqn]
        if one.derived:
            emit = partial(self._call, one.device.partition(":")[0])
            # what no part covers: a source can bring another value of it than the plan keeps
            return derive(one, self._leaves, self.leaf, lambda name: SourceRef(fqn=name), emit)
        persistent = (name for name in (fqn, *self._twins.get(fqn, ())) if self._is_weight(name))
        return SourceRef(fqn=next(persistent, fqn))

    def _is_weight(self, fqn: str) -> bool:
        return self._leaves[fqn].persistent and not self._leaves[fqn].derived

    def _call(
        self, device: str, op: str, args: tuple[Any, ...], dtype: str, shape: tuple[int, ...]
    ) -> Value:
        written = tuple(encode_literal(one) for one in args)
        results = (Tensor(dtype=dtype, shape=shape),)
        return self.emit(OpCall(op=op, args=written, results=results, device=device))

    # -- calls that change no value: none where nothing would change ----------------------------

    def reshaped(self, value: Value, shape: tuple[int, ...]) -> Value:
        """A value in another shape."""
        facts = self.facts(value)
        if facts.shape == shape:
            return value
        if isinstance(value, CallRef) and self.calls[value.call].op == _RESHAPE:
            return self.reshaped(operands_of(self.calls[value.call])[0], shape)
        result = Tensor(dtype=facts.dtype, shape=shape)
        return self.emit(OpCall(op=_RESHAPE, args=(value, shape), results=(result,)))

    def before_reshapes(self, value: Value) -> Value:
        """What a value was before it got its shape."""
        while isinstance(value, CallRef) and self.calls[value.call].op == _RESHAPE:
            value = operands_of(self.calls[value.call])[0]
        return value

    def cast(self, value: Value, dtype: str, device: str) -> Value:
        """A value in another dtype, as this kind of device casts."""
        facts = self.facts(value)
        if facts.dtype == dtype:
            return value
        return self.emit(
            OpCall(
                op="aten._to_copy.default",
                args=(value,),
                kwargs={"dtype": encode_literal(dtype_of(dtype))},
                results=(Tensor(dtype=dtype, shape=facts.shape),),
                device=device,
            )
        )

    def expanded(self, value: Value, shape: tuple[int, ...], device: str) -> Value:
        """A value repeated to a larger shape."""
        facts = self.facts(value)
        if facts.shape == shape:
            return value
        result = Tensor(dtype=facts.dtype, shape=shape)
        op = "aten.expand.default"
        return self.emit(OpCall(op=op, args=(value, shape), results=(result,), device=device))

    def contiguous(self, value: Value) -> CallRef:
        """A value whose elements lie one after another."""
        if isinstance(value, CallRef) and self.calls[value.call].op == _CONTIGUOUS:
            return value
        return self.emit(OpCall(op=_CONTIGUOUS, args=(value,), results=(self.facts(value),)))

    def ordered(self, value: Value, order: tuple[int, ...] | None) -> CallRef:
        """A value whose elements lie one after another, if its dimensions are put in this order."""
        if order is None:
            return self.contiguous(value)
        back = tuple(map(order.index, range(len(order))))
        return self._permuted(self.contiguous(self._permuted(value, order)), back)

    def _permuted(self, value: Value, order: tuple[int, ...]) -> CallRef:
        facts = self.facts(value)
        result = Tensor(dtype=facts.dtype, shape=tuple(facts.shape[dim] for dim in order))
        return self.emit(OpCall(op=_PERMUTE, args=(value, order), results=(result,)))

    # -- asking -----------------------------------------------------------------------------

    def facts(self, value: Value) -> Tensor:
        """Dtype and shape of what was written."""
        if isinstance(value, SourceRef):
            leaf = self._leaves[value.fqn]
            return Tensor(dtype=leaf.dtype, shape=leaf.shape)
        if isinstance(value, CallRef):
            return self.calls[value.call].results[value.output]
        if value.name in self._leaves:
            leaf = self._leaves[value.name]
            return Tensor(dtype=leaf.dtype, shape=leaf.shape)
        return facts_of_tensor(self.literals[value.name])

    def is_lazy(self, value: Value) -> bool:
        """Whether torch may put off signs or conjugations of its elements."""
        return isinstance(value, CallRef) and value.call in self._lazy

    def sources(self, value: Value) -> tuple[str, ...]:
        """The leaves that it follows from, with all names of those that are one tensor."""
        if isinstance(value, SourceRef):
            return self._twins.get(value.fqn, (value.fqn,))
        names = self._dependencies.of(value)
        return tuple(name for name in self._leaves if name in names)


# MERGED folding: Values that follow from no leaf: they are computed while planning, and a plan
# keeps them.

_UNSET = ("aten.empty", "aten.new_empty")
"""How names of ops begin that leave memory as it is."""


class Folding:
    """Such values of one recording."""

    def __init__(self, leaves: Mapping[str, Leaf]) -> None:
        """Compute nothing yet.

        Args:
            leaves: All leaves of the program, by FQN.
        """
        self._leaves = leaves
        self._computed: dict[Call, tuple[torch.Tensor, ...]] = {}

    def value(self, origin: Origin) -> torch.Tensor:
        """A value that follows from no leaf.

        Raises:
            UnwritableError: It cannot be computed again.
        """
        node = origin.node
        if isinstance(node, Literal):
            return node.value
        if not isinstance(node, Call):
            raise TypeError(type(node))
        if node not in self._computed:
            self._computed[node] = self._run(node)
        return self._computed[node][origin.output]

    def _run(self, node: Call) -> tuple[torch.Tensor, ...]:
        if str(node.op).startswith(_UNSET):  # whatever lay there then: now always the same
            return tuple(torch.zeros(r.shape, dtype=dtype_of(r.dtype)) for r in node.results)
        args: Any = node.args
        if not reads_first(node):
            args = (_stand_in(facts_of(node.args[0], self._leaves)), *node.args[1:])
        args, kwargs = tree_map(
            lambda one: self.value(one) if isinstance(one, Origin) else one,
            (args, dict(node.kwargs)),
            is_leaf=lambda one: isinstance(one, Origin),
        )
        if is_laid_out(node.op):
            args = (plainly_laid_out(args[0]), *args[1:])
        try:
            found = self._called(node, args, kwargs)
        except (RuntimeError, TypeError, ValueError) as exc:
            raise_if_resource(exc, f"{node.op} cannot be computed again")
            raise UnwritableError(f"{node.op} cannot be computed again: {exc}") from exc
        if tuple(map(facts_of_tensor, found)) != node.results:
            raise UnwritableError(f"{node.op} gives something else when it is computed again")
        return found

    def _called(self, node: Call, args: Any, kwargs: Any) -> tuple[torch.Tensor, ...]:
        dtypes = [facts_of(one, self._leaves).dtype for one in node.inputs]
        if not ops.is_sensitive(str(node.op), dtypes, kwargs.get("alpha", 1)):
            return call(node.op, args, kwargs)
        args, kwargs = tree_map_only(torch.Tensor, aligned, (args, kwargs))  # as recorded
        with same_settings():
            return call(node.op, args, kwargs)


def _stand_in(facts: Tensor) -> torch.Tensor:
    """A tensor of this dtype and shape, of whatever value, in no memory to speak of."""
    return torch.zeros((), dtype=dtype_of(facts.dtype)).expand(facts.shape)
