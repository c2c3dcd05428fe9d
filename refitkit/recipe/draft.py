"""Calls and tensors of recipes that are being written: what is the same is there once."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from refitkit.model import CallRef, OpCall, PinnedRef, SourceRef, Tensor
from refitkit.program.bits import digest
from refitkit.program.dtypes import dtype_name, dtype_of
from refitkit.program.views import derive
from refitkit.recipe.literals import encode_literal
from refitkit.recipe.operands import Followed, operands_of
from refitkit.recipe.origins import facts_of_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from refitkit.model import Leaf, Value

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
        self._followed = Followed(self.calls, ties)

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
        names = self._followed.by(value)
        return tuple(name for name in self._leaves if name in names)
