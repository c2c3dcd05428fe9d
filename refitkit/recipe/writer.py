"""Write recorded values as calls of a plan, as few as possible.

A recording contains details of one run: devices, layouts, copies, views. A recipe contains only
what decides the value. So this module drops ops that return their operand, turns views into
reshapes, computes constants now, and writes equal calls once.

Read :class:`Writer` first: it translates nodes of a recording into calls. :class:`Draft` collects
the calls and merges equal ones. :class:`ConstantFolder` computes values that depend on no leaf.
"""

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
    has_dense_base,
    is_stride_dependent,
    is_whole,
    metadata_of,
    metadata_of_tensor,
    needs_contiguous,
    on_ordered_base,
    postorder,
    reads_first_operand,
    resolved_contiguous,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from refitkit.model import Leaf, Value
    from refitkit.recipe.origins import Lineage


_aten = torch.ops.aten
_IDENTITY = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.lift_fresh.default,
    _aten.lift_fresh_copy.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.lift.default,
}
"""Ops that return the values of their operand."""
_CASTS = {_aten._to_copy.default}  # noqa: SLF001 - the op's name
_IGNORED_KWARGS = frozenset(
    {"device", "pin_memory", "non_blocking", "layout", "memory_format", "copy"}
)
"""Keyword arguments that do not change values."""


class Writer:
    """Writes the values of one recording into a draft, each value once."""

    def __init__(self, leaves: Mapping[str, Leaf], lineage: Lineage, draft: Draft) -> None:
        """Start with nothing written.

        Args:
            leaves: All leaves of the program, by FQN.
            lineage: Leaves that the values of the recording depend on.
            draft: Draft that receives the calls, and the tensors that depend on no leaf.
        """
        self._leaves = leaves
        self._lineage = lineage
        self._draft = draft
        self._folder = ConstantFolder(leaves)
        self._written: dict[tuple[object, int], Value] = {}

    def value(self, origin: Origin) -> Value:
        """Write a value with all calls below it, and return the reference to it.

        Raises:
            UnwritableError: No plan can contain the value.
        """
        # Operands are written first, so that _write recurses a few levels at most.
        for below in postorder(origin, lambda one: (one.node, one.output) in self._written):
            with suppress(UnwritableError):  # raised below if the value needs this operand
                if self._lineage.leaves_of(below):
                    self._write(below)
        return self._write(origin)

    def _write(self, origin: Origin) -> Value:
        key = origin.node, origin.output
        if key not in self._written:
            try:
                self._written[key] = self._write_new(origin)
            except RecursionError:
                reason = "the chain of ops that computes it is too long"
                raise UnwritableError(reason) from None
        return self._written[key]

    def _write_new(self, origin: Origin) -> Value:
        if not self._lineage.leaves_of(origin):
            return self._draft.pin(self._folder.value(origin))
        if isinstance(origin.node, LeafOrigin):
            return self._draft.leaf(origin.node.fqn)
        if not isinstance(origin.node, Call):
            raise TypeError(type(origin.node))
        return self._write_call(origin.node, origin.output)

    # -- calls ------------------------------------------------------------------------------

    def _write_call(self, node: Call, output: int) -> Value:
        op, shape = node.op, node.results[0].shape
        if op in _IDENTITY or op is ORDERED:
            same = self._write(node.args[0])
            return self._draft.ordered(same, node.args[1]) if op is ORDERED else same
        if op in RESHAPES:
            return self._draft.reshaped(self._write(node.args[0]), shape)
        if op in _CASTS:
            return self._cast(node, self._write(node.args[0]))
        if op is _aten.copy_.default:
            source = self._cast(node, self._write(node.args[1]))
            return self._draft.expanded(source, shape, node.device)
        if op is _aten.expand.default:
            return self._draft.expanded(self._write(node.args[0]), shape, node.device)
        return self._emit(node, output)

    def _cast(self, node: Call, value: Value) -> Value:
        """Return a value cast to the dtype of a call's result."""
        return self._draft.cast(value, node.results[0].dtype, node.device)

    def _emit(self, node: Call, output: int) -> Value:
        name = str(node.op)
        if not ops.is_allowed(name):
            raise UnwritableError(f"its recipe needs the op {name}, which plans may not contain")
        args = tuple(self._argument(one) for one in node.args)
        # Operands are placed in memory as in the recording only where the bits may depend on it.
        if is_stride_dependent(node.op):
            args = (self._strided_operand(node, args[0]), *args[1:])
        elif torch.Tag.pointwise in node.op.tags:
            args = self._promoted(node, args)
            if self._is_sensitive(node):
                args = tuple(map(self._ordered_unless_whole, node.args, args))
        elif not self._is_exact(node):
            args = tuple(map(self._ordered, node.args, args))
        kwargs = {
            key: self._argument(one)
            for key, one in node.kwargs.items()
            if one is not None and key not in _IGNORED_KWARGS
        }
        written = OpCall(
            op=name, args=args, kwargs=kwargs, results=node.results, device=node.device
        )
        return self._draft.emit(written, output)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Origin):
            return self._write(value)
        if isinstance(value, list | tuple):
            return tuple(self._argument(one) for one in value)
        try:
            return encode_literal(value)
        except TypeError as exc:
            raise UnwritableError(f"a plan cannot store an argument of its recipe: {exc}") from exc

    def _promoted(self, node: Call, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return arguments, cast to the result's dtype if an op turns integers into floats.

        Without the cast, torch's default dtype at the time of the refit would decide the result.
        """
        dtypes = [self._draft.metadata(one).dtype for one in args if is_reference(one)]
        integral = all(map(_is_integral, dtypes)) and not str(node.op).startswith("aten.where")
        if not integral or _is_integral(node.results[0].dtype):
            return args
        return tuple(self._cast(node, one) if is_reference(one) else one for one in args)

    # -- operands in memory -----------------------------------------------------------------

    def _strided_operand(self, node: Call, value: Value) -> Value:
        """Return the first argument of a stride-dependent op, resolved and contiguous.

        Raises:
            UnwritableError: The op needs a contiguous argument, and the recorded one was not.
        """
        steps = ["resolve_conj", "resolve_neg"] if self._draft.is_lazy(value) else []
        if needs_contiguous(node.op):
            if not node.args[0].contiguous:
                raise UnwritableError(
                    f"its recipe needs {node.op} of a tensor that is not contiguous"
                )
            steps.append("contiguous")
        for step in steps:
            op, metadata = f"aten.{step}.default", (self._draft.metadata(value),)
            value = self._draft.emit(
                OpCall(op=op, args=(value,), results=metadata, device=node.device)
            )
        return value

    def _is_exact(self, node: Call) -> bool:
        """Return whether the result has the same bits for all strides of the operands."""
        bare = OpCall(op=str(node.op), results=node.results, device=node.device)
        dtypes = [metadata_of(one, self._leaves).dtype for one in node.inputs]
        return ops.is_exact_anywhere(bare, dtypes)

    def _is_sensitive(self, node: Call) -> bool:
        """Return whether the bits of the result may depend on how operands lie in memory."""
        dtypes = [metadata_of(one, self._leaves).dtype for one in node.inputs]
        return ops.is_sensitive(str(node.op), dtypes, node.kwargs.get("alpha", 1))

    def _ordered_unless_whole(self, origin: Any, value: Any) -> Any:
        """Return an argument as :meth:`_ordered` does, but a whole one unchanged.

        A replay makes whole operands contiguous itself: see ``PreparedCall.owns_storage`` of
        :mod:`refitkit.recipe.calls`.
        """
        whole = isinstance(origin, Origin) and is_whole(origin)
        return value if whole else self._ordered(origin, value)

    def _ordered(self, origin: Any, value: Any) -> Any:
        """Return an argument that lies in memory as in the recording."""
        if not isinstance(origin, Origin):
            listed = isinstance(origin, list | tuple)
            return tuple(map(self._ordered, origin, value)) if listed else value
        if isinstance(value, PinnedRef):
            return value
        if not has_dense_base(origin):
            return self._draft.contiguous(value)
        return self._write(on_ordered_base(origin, self._lineage, self._leaves))


def _is_integral(dtype: str) -> bool:
    """Return whether a dtype is an integer type or bool."""
    return not dtype.startswith(("float", "bfloat", "complex"))


# -- calls and tensors that are being written -------------------------------------------------

_LITERAL = "literal:"
"""Prefix of the names of stored tensors that are not leaves."""
_LAZY = frozenset({"aten._conj.default", "aten._neg_view.default"})
"""Ops whose result has a lazy conjugate or negative bit."""
_RESHAPE = "aten.reshape.default"
_CONTIGUOUS = "aten.contiguous.default"
_PERMUTE = "aten.permute.default"


class Draft:
    """Calls and tensors of recipes that are being written, without duplicates.

    Attributes:
        calls: All calls; each call comes after the calls whose results it uses.
        literals: Tensors that the plan has to store, by name. Leaves are not among them.
    """

    def __init__(self, leaves: Mapping[str, Leaf], ties: Sequence[Sequence[str]]) -> None:
        """Start without calls.

        Args:
            leaves: All leaves of the program, by FQN.
            ties: Groups of FQNs that name one tensor.
        """
        self.calls: list[OpCall] = []
        self.literals: dict[str, torch.Tensor] = {}
        self._leaves = leaves
        self._ties = {name: tuple(tie) for tie in ties for name in tie}
        self._number_of: dict[str, int] = {}
        self._lazy_calls: set[int] = set()
        self._dependencies = LeafDependencies(self.calls, ties)

    # -- writing ----------------------------------------------------------------------------

    def emit(self, call: OpCall, output: int = 0) -> CallRef:
        """Add a call unless an equal one exists, and return the reference to a result.

        Args:
            call: Call to add.
            output: Index of the result.
        """
        key = call.model_dump_json()
        if key not in self._number_of:
            number = self._number_of[key] = len(self.calls)
            self.calls.append(call)
            below = (one.call for one in operands_of(call) if isinstance(one, CallRef))
            if call.op in _LAZY or not self._lazy_calls.isdisjoint(below):
                self._lazy_calls.add(number)
        return CallRef(call=self._number_of[key], output=output)

    def pin(self, value: torch.Tensor) -> PinnedRef:
        """Store a tensor that depends on no leaf, and return the reference to it."""
        # The name contains the content, so equal literals of all slots are stored once.
        kept = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        name = f"{_LITERAL}{digest(kept)[:16]}-{dtype_name(kept.dtype)}{list(kept.shape)}"
        self.literals.setdefault(name, kept.clone())
        return PinnedRef(name=name)

    def leaf(self, fqn: str) -> Value:
        """Return the value of a leaf; a leaf that is a view of others is computed from them."""
        one = self._leaves[fqn]
        if one.derived:
            emit = partial(self._emit_derived, one.device.partition(":")[0])
            # Elements that no part covers come from the source, not from the plan: a source may
            # have another value of them than the plan stores.
            return derive(one, self._leaves, self.leaf, lambda name: SourceRef(fqn=name), emit)
        persistent = (name for name in (fqn, *self._ties.get(fqn, ())) if self._is_weight(name))
        return SourceRef(fqn=next(persistent, fqn))

    def _is_weight(self, fqn: str) -> bool:
        return self._leaves[fqn].persistent and not self._leaves[fqn].derived

    def _emit_derived(
        self, device: str, op: str, args: tuple[Any, ...], dtype: str, shape: tuple[int, ...]
    ) -> Value:
        written = tuple(encode_literal(one) for one in args)
        results = (Tensor(dtype=dtype, shape=shape),)
        return self.emit(OpCall(op=op, args=written, results=results, device=device))

    # -- calls that keep the values ---------------------------------------------------------
    #
    # Each of these methods returns its argument if the call would change nothing.

    def reshaped(self, value: Value, shape: tuple[int, ...]) -> Value:
        """Return a value in another shape."""
        metadata = self.metadata(value)
        if metadata.shape == shape:
            return value
        if isinstance(value, CallRef) and self.calls[value.call].op == _RESHAPE:
            return self.reshaped(operands_of(self.calls[value.call])[0], shape)
        result = Tensor(dtype=metadata.dtype, shape=shape)
        return self.emit(OpCall(op=_RESHAPE, args=(value, shape), results=(result,)))

    def before_reshapes(self, value: Value) -> Value:
        """Return a value without the reshapes at its end."""
        while isinstance(value, CallRef) and self.calls[value.call].op == _RESHAPE:
            value = operands_of(self.calls[value.call])[0]
        return value

    def cast(self, value: Value, dtype: str, device: str) -> Value:
        """Return a value cast to another dtype by a device type."""
        metadata = self.metadata(value)
        if metadata.dtype == dtype:
            return value
        return self.emit(
            OpCall(
                op="aten._to_copy.default",
                args=(value,),
                kwargs={"dtype": encode_literal(dtype_of(dtype))},
                results=(Tensor(dtype=dtype, shape=metadata.shape),),
                device=device,
            )
        )

    def expanded(self, value: Value, shape: tuple[int, ...], device: str) -> Value:
        """Return a value expanded to a larger shape on a device type."""
        metadata = self.metadata(value)
        if metadata.shape == shape:
            return value
        result = Tensor(dtype=metadata.dtype, shape=shape)
        op = "aten.expand.default"
        return self.emit(OpCall(op=op, args=(value, shape), results=(result,), device=device))

    def contiguous(self, value: Value) -> CallRef:
        """Return a value as contiguous memory."""
        if isinstance(value, CallRef) and self.calls[value.call].op == _CONTIGUOUS:
            return value
        return self.emit(OpCall(op=_CONTIGUOUS, args=(value,), results=(self.metadata(value),)))

    def ordered(self, value: Value, order: tuple[int, ...] | None) -> CallRef:
        """Return a value that is contiguous if its dimensions are permuted to an order.

        Args:
            value: Value to place in memory.
            order: Dimensions in their order in memory, slowest first. None is the logical order.
        """
        if order is None:
            return self.contiguous(value)
        inverse = tuple(map(order.index, range(len(order))))
        return self._permuted(self.contiguous(self._permuted(value, order)), inverse)

    def _permuted(self, value: Value, order: tuple[int, ...]) -> CallRef:
        metadata = self.metadata(value)
        result = Tensor(dtype=metadata.dtype, shape=tuple(metadata.shape[dim] for dim in order))
        return self.emit(OpCall(op=_PERMUTE, args=(value, order), results=(result,)))

    # -- queries ----------------------------------------------------------------------------

    def metadata(self, value: Value) -> Tensor:
        """Return the dtype and shape of a written value."""
        if isinstance(value, SourceRef):
            leaf = self._leaves[value.fqn]
            return Tensor(dtype=leaf.dtype, shape=leaf.shape)
        if isinstance(value, CallRef):
            return self.calls[value.call].results[value.output]
        if value.name in self._leaves:
            leaf = self._leaves[value.name]
            return Tensor(dtype=leaf.dtype, shape=leaf.shape)
        return metadata_of_tensor(self.literals[value.name])

    def is_lazy(self, value: Value) -> bool:
        """Return whether a value may have a lazy conjugate or negative bit."""
        return isinstance(value, CallRef) and value.call in self._lazy_calls

    def sources(self, value: Value) -> tuple[str, ...]:
        """Return the FQNs of all leaves that a value depends on, with all names of tied leaves."""
        if isinstance(value, SourceRef):
            return self._ties.get(value.fqn, (value.fqn,))
        names = self._dependencies.of(value)
        return tuple(name for name in self._leaves if name in names)


# -- constants --------------------------------------------------------------------------------

_UNINITIALIZED = ("aten.empty", "aten.new_empty")
"""Prefixes of ops that return uninitialized memory."""


class ConstantFolder:
    """Computes the values of one recording that depend on no leaf; plans store them."""

    def __init__(self, leaves: Mapping[str, Leaf]) -> None:
        """Start with nothing computed; each call is computed once.

        Args:
            leaves: All leaves of the program, by FQN.
        """
        self._leaves = leaves
        self._computed: dict[Call, tuple[torch.Tensor, ...]] = {}

    def value(self, origin: Origin) -> torch.Tensor:
        """Return a value that depends on no leaf.

        Raises:
            UnwritableError: An op fails when it is called again, or returns another dtype or shape.
            ResourceError: The system refused memory.
        """
        node = origin.node
        if isinstance(node, Literal):
            return node.value
        if not isinstance(node, Call):
            raise TypeError(type(node))
        if node not in self._computed:
            self._computed[node] = self._compute(node)
        return self._computed[node][origin.output]

    def _compute(self, node: Call) -> tuple[torch.Tensor, ...]:
        # Plans of one program must be equal, so uninitialized memory becomes zeros.
        if str(node.op).startswith(_UNINITIALIZED):
            return tuple(torch.zeros(r.shape, dtype=dtype_of(r.dtype)) for r in node.results)
        args: Any = node.args
        if not reads_first_operand(node):
            args = (_placeholder(metadata_of(node.args[0], self._leaves)), *node.args[1:])
        args, kwargs = tree_map(
            lambda one: self.value(one) if isinstance(one, Origin) else one,
            (args, dict(node.kwargs)),
            is_leaf=lambda one: isinstance(one, Origin),
        )
        if is_stride_dependent(node.op):
            args = (resolved_contiguous(args[0]), *args[1:])
        try:
            results = self._call_as_recorded(node, args, kwargs)
        except (RuntimeError, TypeError, ValueError) as exc:
            raise_if_resource(exc, f"{node.op} cannot be called again")
            raise UnwritableError(f"{node.op} fails when it is called again: {exc}") from exc
        if tuple(map(metadata_of_tensor, results)) != node.results:
            raise UnwritableError(
                f"{node.op} returns another dtype or shape when it is called again"
            )
        return results

    def _call_as_recorded(self, node: Call, args: Any, kwargs: Any) -> tuple[torch.Tensor, ...]:
        dtypes = [metadata_of(one, self._leaves).dtype for one in node.inputs]
        if not ops.is_sensitive(str(node.op), dtypes, kwargs.get("alpha", 1)):
            return call(node.op, args, kwargs)
        # The tape ran the op on aligned operands, too.
        args, kwargs = tree_map_only(torch.Tensor, aligned, (args, kwargs))
        with same_settings():
            return call(node.op, args, kwargs)


def _placeholder(metadata: Tensor) -> torch.Tensor:
    """Return a tensor with a dtype and a shape that uses memory for one element only."""
    return torch.zeros((), dtype=dtype_of(metadata.dtype)).expand(metadata.shape)
