"""How recorded values stand in a plan: calls without anything that belongs to the run itself."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from refitkit.model import OpCall, PinnedRef
from refitkit.recipe import ops
from refitkit.recipe.folding import Folding
from refitkit.recipe.layouts import (
    ORDERED,
    RESHAPES,
    is_anchored,
    is_laid_out,
    is_whole,
    needs_contiguous,
    on_ordered,
)
from refitkit.recipe.lineage import UnwritableError
from refitkit.recipe.literals import encode_literal
from refitkit.recipe.operands import is_reference
from refitkit.recipe.origins import Call, LeafOrigin, Origin, bottom_up, facts_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.model import Leaf
    from refitkit.model import Value
    from refitkit.recipe.draft import Draft
    from refitkit.recipe.lineage import Lineage

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

        See ``Ready.whole`` of :mod:`refitkit.recipe.calls`.
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
